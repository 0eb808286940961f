"""The linear autoencoder of patches, and a run that fits one."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from em_diffusion import PRESETS, EMLatentDiffusionPipeline, train_ldm
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.patch_basis import fit_patch_basis, fit_to_tiles
from em_diffusion.reconstruction import psnr


def fit(images, patch_size, channels):
    return fit_patch_basis(lambda: images.split(7), patch_size, channels)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def images():
    """Blurred noise [60, 1, 32, 32] in [-1, 1]."""
    noise = torch.randn(60, 1, 36, 36, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 5, stride=1).clamp(-1, 1)


def test_latents_are_principal_components_of_the_patches(images):
    model = fit(images, 8, 5)
    latents = model.encode(images).latents
    assert latents.shape == (60, 5, 4, 4)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    patches = images.reshape(60, 4, 8, 4, 8).permute(0, 1, 3, 2, 4).reshape(-1, 64).double()
    variances = torch.linalg.svdvals(patches - patches.mean(0)) ** 2 / len(patches)
    measured = latents.double().var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(measured, variances[:5], rtol=1e-4, atol=0)
    correlation = torch.corrcoef(latents.movedim(1, 0).flatten(1))
    torch.testing.assert_close(correlation, torch.eye(5), rtol=0, atol=1e-3)


def test_the_decoder_is_the_best_linear_one_of_three_by_three_latents(images):
    model = fit(images, 8, 5)
    error = (model(images).sample - images).square().mean()
    with torch.enable_grad():
        decoder = model.decoder.requires_grad_(True)
        latents = model.encode(images).latents.detach()
        loss = (F.pixel_shuffle(decoder(latents), 8) - images).square().mean()
        gradients = torch.autograd.grad(loss, list(decoder.parameters()))
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-5
    mean = images.reshape(60, 4, 8, 4, 8).mean(dim=(0, 1, 3)).repeat(4, 4)  # of all patches
    own = mean + F.conv_transpose2d(latents, model.encoder.weight, stride=8)  # no neighbours
    assert error < 0.9 * (own - images).square().mean()


def test_all_components_keep_everything(images):
    assert psnr(images, fit(images, 4, 16)(images).sample).min() > 60


def test_the_fit_is_repeatable_and_does_not_depend_on_the_batches(images):
    first, again = fit(images, 8, 5), fit_patch_basis(lambda: [images], 8, 5)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(weight, again.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_more_components_than_pixels_are_refused(images):
    with pytest.raises(ValueError, match=r"16 components, fewer than 17.*latent-channels"):
        fit(images, 4, 17)


def test_views_are_spread_over_all_tiles(tiles):
    fit_to_tiles(tiles, 6, 4, 3)
    assert len(tiles.seen) == 6
    assert max(tiles.seen) - min(tiles.seen) > 15


def test_a_run_fits_it_and_ends_in_a_pipeline(tmp_path):
    config = PRESETS["test"]()
    torch.set_grad_enabled(True)
    config = dataclasses.replace(
        config,
        out=str(tmp_path / "run"),
        precision="no",
        tiles=dataclasses.replace(config.tiles, cache_dir=str(tmp_path / "cache")),
        autoencoder=dataclasses.replace(
            config.autoencoder, kind="basis", patch_size=2, latent_channels=3, num_images=48
        ),
    )
    out = train_ldm(config)
    run = json.loads((out / "run.json").read_text())
    assert run["num_images_seen_by_stage"]["autoencoder"] == 48
    assert run["train_seconds_by_stage"]["autoencoder"] > 0
    assert list((out / "autoencoder" / "samples").glob("*.png"))
    line = json.loads((out / "autoencoder" / "stats.jsonl").read_text())
    assert line["held_out_psnr"] > 15
    pipe = EMLatentDiffusionPipeline.from_pretrained(out / "pipeline")
    assert type(pipe.vqvae).__name__ == "EMPatchBasis"
    images = pipe(2, torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 1, 32, 32)
    assert images.std() > 0.01
    again = load_autoencoder(out)
    torch.testing.assert_close(again.decoder.weight, pipe.vqvae.decoder.weight, rtol=0, atol=0)
    weights = out / "autoencoder" / "vqvae" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    train_ldm(config)  # is finished
    assert weights.stat().st_mtime_ns == before
