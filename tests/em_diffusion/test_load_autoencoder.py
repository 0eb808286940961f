"""`load_autoencoder`: one grey interface to every autoencoder, and colour ones folded exactly."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, VQModel

from em_diffusion.autoencoder import decode, encode, find_codes
from em_diffusion.grey import fold_to_grey
from em_diffusion.load_autoencoder import KINDS, WEIGHTS, load_autoencoder
from support import hub_server

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


def create_flux2(channels=3, seed=0):
    torch.manual_seed(seed)
    return AutoencoderKLFlux2(in_channels=channels, out_channels=channels, **SHAPE).eval()


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
@pytest.mark.parametrize("create", [create_kl, create_flux2])
def test_kl_model_folded_to_grey_is_repeat_and_average(tmp_path, create, images):
    """It may be a part of a text-to-image model, which names it so."""
    model = create()
    model.save_pretrained(tmp_path / "vae")
    loaded = load_autoencoder(tmp_path)
    model, loaded, images = model.double(), loaded.double(), images.double()
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


def publish(hub, repository, folder):
    """Serve the files of a folder as a repository."""
    repo = hub.repos["models", repository] = hub_server.Repo(private=False)
    files = {
        path.relative_to(folder).as_posix(): hub.store(path.read_bytes(), path.suffix != ".json")
        for path in folder.rglob("*")
        if path.is_file()
    }
    hub.commit(repo, "main", "weights", files)


def test_from_the_hub(hub, tmp_path, images):
    """A model, a pipeline, a repository without an autoencoder, and one that is not there."""
    for name, model in (("model", create_vq()), ("pipeline/vqvae", create_kl())):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "code.py").write_text("raise AssertionError")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for name in ("model", "pipeline", "other"):
        publish(hub, f"lab/{name}", tmp_path / name)
    for name in ("model", "pipeline"):
        expected, loaded = load_autoencoder(tmp_path / name), load_autoencoder(f"lab/{name}")
        assert_agrees(encode(loaded, images), encode(expected, images))
    resolved = [path for _, path, _ in hub.requests if "/resolve/" in path]
    assert {path.split("/")[-1].split("?")[0] for path in resolved} == {"config.json", WEIGHTS}
    with pytest.raises(ValueError, match="there is no autoencoder in the Hub repository lab/other"):
        load_autoencoder("lab/other")
    with pytest.raises(ValueError, match="lab/nothing: there is no such repository"):
        load_autoencoder("lab/nothing")
