import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.latents import encode_latents, measure_latents
from em_training import latents as latents_module
from em_training.latents import Latents, encode_views
from support.commands import TORCHRUN

sys.path.insert(0, str(Path(__file__).parent))
from encode_latents_in_processes import make_parts

ROOT = Path(__file__).parents[2]


def test_latents_are_encoded_view_by_view_once_and_normalised(vqvae, tiles, accelerator, tmp_path):
    array, seconds = encode_latents(vqvae, tiles, tmp_path, accelerator=accelerator, batch_size=7)
    assert array.shape == (24, 4, 8, 8)
    assert tiles.seen == set(range(24))
    with torch.no_grad():
        one = vqvae.encode(tiles.batch([5])).latents
    torch.testing.assert_close(torch.from_numpy(array[[5]]).float(), one, rtol=1e-3, atol=1e-3)
    latents = Latents(array, *measure_latents(array, chunk=5))
    normalised = latents.batch(range(24))
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        normalised.std(dim=(0, 2, 3), unbiased=False), torch.ones(4), rtol=0, atol=1e-3
    )

    tiles.seen.clear()
    encode_latents(vqvae, tiles, tmp_path, accelerator=accelerator)
    assert not tiles.seen  # read from the cache
    torch.nn.init.normal_(vqvae.quant_conv.weight)
    other, _ = encode_latents(vqvae, tiles, tmp_path, accelerator=accelerator)
    assert tiles.seen == set(range(24))  # other weights, other latents
    assert abs(other - array).max() > 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]
    assert seconds > 0


def test_an_encoder_does_not_commute_with_a_flip(vqvae, tiles):
    """The reason to encode every view: turning latents instead would be wrong."""
    images = tiles.batch([0])
    with torch.no_grad():
        a, b = vqvae.encode(images.flip(-1)).latents, vqvae.encode(images).latents.flip(-1)
    assert (a - b).abs().max() > 0.1 * b.std()


def test_latents_that_cannot_be_stored_are_refused(vqvae, tiles, accelerator, tmp_path):
    vqvae.quant_conv.bias.data.fill_(1e6)
    with pytest.raises(ValueError, match="not finite"):
        encode_latents(vqvae, tiles, tmp_path, accelerator=accelerator)
    assert not list(tmp_path.glob("train-*.npy"))


def test_kl_latents_are_cached_as_means(config, tiles, accelerator, tmp_path):
    torch.manual_seed(0)
    model = create_autoencoder(dataclasses.replace(config.autoencoder, kind="kl"), 16).eval()
    array, _ = encode_latents(model, tiles, tmp_path, accelerator=accelerator, batch_size=5)
    with torch.no_grad():
        expected = model.encode(tiles.batch(range(24))).latent_dist.mean
    torch.testing.assert_close(
        torch.from_numpy(np.array(array)).float(), expected, rtol=1e-3, atol=1e-3
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_at", [1, 5, 6, 9])
def test_a_killed_encoding_goes_on_chunk_by_chunk(
    vqvae, tiles, accelerator, tmp_path, monkeypatch, killed_at
):
    """Batches of 2 views, chunks of 8 of 24; stopped in the first chunk, in a write, between
    chunks, in the last chunk.
    """
    whole, _ = encode_latents(
        vqvae, tiles, tmp_path / "whole", accelerator=accelerator, batch_size=2
    )
    count = 0

    def mortal(*arguments):
        nonlocal count
        count += 1
        if count == killed_at:
            raise Killed
        return encode_views(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(latents_module, "encode_views", mortal)
        if killed_at == 5:  # the first chunk: half of it is on the disk, not under its name
            patch.setattr("em_data.files.os.replace", die)
        with pytest.raises(Killed):
            encode_latents(vqvae, tiles, tmp_path / "parts", accelerator=accelerator, batch_size=2)
    assert not list((tmp_path / "parts").glob("*.npy"))
    tiles.seen.clear()
    parts, seconds = encode_latents(
        vqvae, tiles, tmp_path / "parts", accelerator=accelerator, batch_size=2
    )
    num_done = {1: 0, 5: 0, 6: 8, 9: 16}[killed_at]  # four calls a chunk
    assert tiles.seen == set(range(num_done, 24))
    assert np.array_equal(parts, whole)
    assert seconds > 0
    assert sorted(path.suffix for path in (tmp_path / "parts").iterdir()) == [".json", ".npy"]


def die(*_):
    raise Killed


def test_an_unfinished_file_of_other_weights_or_chunks_is_not_gone_on_with(
    vqvae, tiles, accelerator, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(latents_module, "join_chunks", die)
        with pytest.raises(Killed):
            encode_latents(vqvae, tiles, tmp_path, accelerator=accelerator, batch_size=2)
    tiles.seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(latents_module, "join_chunks", die)
        with pytest.raises(Killed):
            encode_latents(vqvae, tiles, tmp_path, accelerator=accelerator, batch_size=3)
    assert tiles.seen == set(range(24))
    torch.nn.init.normal_(vqvae.quant_conv.weight)
    tiles.seen.clear()
    encode_latents(vqvae, tiles, tmp_path, accelerator=accelerator, batch_size=3)
    assert tiles.seen == set(range(24))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]


def run_two_processes(folder, killed_after):
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    script = str(Path(__file__).with_name("encode_latents_in_processes.py"))
    command = [*TORCHRUN, script]
    return subprocess.run(
        [*command, str(folder), str(killed_after)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_share_the_encoding_and_survive_a_kill(accelerator, tmp_path):
    """SIGKILL of one process after two of its chunks; the second start encodes only what was not
    done, each view once.
    """
    killed = run_two_processes(tmp_path, 2)
    assert killed.returncode != 0
    assert not list((tmp_path / "latents").glob("*.npy"))
    before = {int(path.stem) for path in (tmp_path / "latents").glob("*.chunks-4/*.npz")}
    assert 2 <= len(before) < 12
    done = run_two_processes(tmp_path, 1000)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [set(json.loads((tmp_path / f"seen-{rank}.json").read_text())) for rank in range(2)]
    assert not (seen[0] & seen[1])
    assert seen[0]
    assert seen[1]
    assert seen[0] | seen[1] == set(range(48)) - {
        view for number in before for view in range(4 * number, 4 * number + 4)
    }
    (path,) = (tmp_path / "latents").glob("*.npy")
    model, tiles = make_parts()
    alone, _ = encode_latents(
        model, tiles, tmp_path / "alone", accelerator=accelerator, batch_size=1
    )
    assert np.array_equal(np.load(path), alone)
    assert path.name == next((tmp_path / "alone").glob("*.npy")).name


def test_a_collapsed_channel_is_named():
    array = torch.randn(8, 3, 2, 2).numpy()
    array[:, 1] = 0.5
    with pytest.raises(ValueError, match=r"channels \[1\]"):
        measure_latents(array)
