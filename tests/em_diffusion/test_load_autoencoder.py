"""`load_autoencoder`: one grey interface to every autoencoder, and colour ones folded exactly."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from em_diffusion.autoencoder import decode, encode, find_codes
from em_diffusion.grey import fold_to_grey
from em_diffusion.load_autoencoder import KINDS, load_autoencoder

SHAPE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def create_vq(channels=3, seed=0):
    torch.manual_seed(seed)
    model = VQModel(
        in_channels=channels, out_channels=channels, num_vq_embeddings=32, **SHAPE
    ).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def create_kl(channels=3, seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(in_channels=channels, out_channels=channels, **SHAPE).eval()


@pytest.fixture
def images():
    return torch.rand(3, 1, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def assert_agrees(value, expected):
    error = float((value - expected).detach().abs().max() / expected.detach().std())
    assert error < 1e-5, f"off by {error:.1e} of the deviation"


@torch.no_grad()
def test_vq_model_folded_to_grey_is_repeat_and_average(tmp_path, images):
    model = create_vq()
    model.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    latents, indices = encode(loaded, images), find_codes(loaded, encode(loaded, images))
    expected = model.encode(images.repeat(1, 3, 1, 1)).latents
    assert_agrees(latents, expected)
    assert torch.equal(indices, model.quantize(expected)[2][2].reshape(3, 8, 12))
    assert indices.unique().numel() > 1
    assert_agrees(decode(loaded, latents), model.decode(expected).sample.mean(1, True))
    assert (KINDS[type(loaded)], loaded.config.num_vq_embeddings) == ("VQ", 32)


@torch.no_grad()
def test_kl_model_folded_to_grey_is_repeat_and_average(tmp_path, images):
    model = create_kl()
    model.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    latents = encode(loaded, images)
    expected = model.encode(images.repeat(1, 3, 1, 1)).latent_dist.mean
    assert find_codes(loaded, latents) is None
    assert_agrees(latents, expected)
    assert_agrees(decode(loaded, latents), model.decode(expected).sample.mean(1, True))
    assert KINDS[type(loaded)] == "KL"


@pytest.mark.parametrize("create", [create_vq, create_kl])
def test_folded_model_saves_and_loads_as_a_grey_one(tmp_path, create, images):
    folded = fold_to_grey(create())
    folded.save_pretrained(tmp_path)
    loaded = type(folded).from_pretrained(tmp_path)
    assert loaded.config.in_channels == loaded.config.out_channels == 1
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), folded.state_dict().values())
    )
    assert {p.requires_grad for p in folded.parameters()} == {True}


def test_grey_model_is_not_touched(tmp_path):
    model = create_vq(channels=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fold_to_grey(model) is model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match="in_channels = 4; only grey"):
        fold_to_grey(create_vq(channels=4))


@pytest.mark.parametrize("folder", ["", "autoencoder/vqvae", "pipeline/vqvae", "vqvae", "vae"])
def test_found_in_runs_pipelines_and_models(tmp_path, folder, images):
    create_vq(channels=1).save_pretrained(tmp_path / folder)
    if folder:
        (tmp_path / "config.json").write_text('{"data": "synthetic"}')  # a run's own
    assert load_autoencoder(str(tmp_path)).config.num_vq_embeddings == 32


def test_folder_without_an_autoencoder(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="there is no autoencoder in"):
        load_autoencoder(tmp_path)


class Hub(http.server.BaseHTTPRequestHandler):
    """The piece of the Hub that downloads need: /owner/name/resolve/revision/path, with the file's hash and a commit."""

    folder, asked = None, None

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        owner, name, *parts = self.path.split("?")[0].split("/")[1:]
        parts = parts[2:]
        path = self.folder.joinpath(owner, name, *parts)
        self.send_response(200 if path.is_file() else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        if not path.is_file():
            self.send_header(
                "X-Error-Code",
                "EntryNotFound" if path.parents[len(parts) - 1].is_dir() else "RepoNotFound",
            )
        data = path.read_bytes() if path.is_file() else b""
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """Serves a folder as the Hub; call it with Python code to run against it, which returns what the code printed."""
    handler = type("Handler", (Hub,), {"folder": tmp_path / "hub", "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def run(code):
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("HF_")
        }
        environment |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder, run.asked = handler.folder, handler.asked
    yield run
    server.shutdown()
    thread.join()
    server.server_close()


def test_from_the_hub(hub, tmp_path, images):
    """In one process, since each costs seconds: a model, a pipeline, a repository without one, and one that is not there."""
    expected = {}
    for repository, model in (("lab/model", create_vq()), ("lab/pipeline/vqvae", create_kl())):
        model.save_pretrained(hub.folder / repository)
        (hub.folder / repository / "code.py").write_text("raise AssertionError")
        expected[repository] = load_autoencoder(hub.folder / repository)
    (hub.folder / "lab" / "pipeline" / "model_index.json").write_text("{}")
    (hub.folder / "lab" / "other").mkdir()
    (hub.folder / "lab" / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    torch.save(images, tmp_path / "images.pt")
    code = """
import torch
from em_diffusion.autoencoder import encode
from em_diffusion.load_autoencoder import load_autoencoder
images = torch.load("images.pt")
for name in ("model", "pipeline"):
    torch.save(encode(load_autoencoder(f"lab/{name}"), images), f"{name}.pt")
for name in ("other", "nothing"):
    try:
        load_autoencoder(f"lab/{name}")
    except ValueError as error:
        print(error)
"""
    other, nothing = hub(code).splitlines()
    assert "the Hub repository lab/other has no autoencoder" in other
    assert "lab/nothing is no file or folder, and cannot be downloaded from the Hub" in nothing
    for name, repository in (("model", "lab/model"), ("pipeline", "lab/pipeline/vqvae")):
        assert_agrees(torch.load(tmp_path / f"{name}.pt"), encode(expected[repository], images))
    fetched = {
        line.split("/")[-1] for line in hub.asked if line.startswith("GET") and "/resolve/" in line
    }
    assert fetched == {"config.json", "diffusion_pytorch_model.safetensors"}
