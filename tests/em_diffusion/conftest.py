import dataclasses

import accelerate
import numpy as np
import pytest
import torch

from em_diffusion import PRESETS, EMLatentDiffusionPipeline
from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.denoiser import create_denoiser, create_scheduler


class FakeTiles:
    """Smooth random tiles that differ under every symmetry; reads like `em_data.Tiles`."""

    def __init__(self, num_views=24, resolution=16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(num_views, 1, resolution // 4, resolution // 4, generator=generator)
        self.images = torch.nn.functional.interpolate(
            coarse, scale_factor=4, mode="bilinear"
        ).clamp(-1, 1)
        self.num_views, self.resolution, self.fingerprint = (
            num_views,
            resolution,
            f"fake-{seed}-{num_views}",
        )
        self.seen = set()

    def __len__(self):
        return self.num_views

    def locate(self, view_ids):
        """Each view is a tile of its own, as it is."""
        return np.asarray(view_ids), np.zeros(len(view_ids), np.int64)

    def batch(self, view_ids):
        self.seen.update(np.asarray(view_ids).tolist())
        return self.images[torch.as_tensor(np.asarray(view_ids))]


@pytest.fixture
def tiles():
    return FakeTiles()


@pytest.fixture
def held_out():
    return FakeTiles(num_views=6, seed=1)


@pytest.fixture
def accelerator(tmp_path):
    return accelerate.Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture
def config():
    """The test preset at 16 px, where the denoiser's attention sees 4 x 4 positions."""
    preset = PRESETS["test"]()
    return dataclasses.replace(preset, tiles=dataclasses.replace(preset.tiles, resolution=16))


@pytest.fixture
def vqvae(config):
    torch.manual_seed(0)
    model = create_autoencoder(config.autoencoder, 16)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    model.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[0.5, 1.5, 2.0, 0.8])
    return model.eval()


@pytest.fixture
def pipeline(config, vqvae):
    torch.manual_seed(1)
    unet = create_denoiser(
        config.denoiser, config.latent_size, config.autoencoder.latent_channels
    ).eval()
    pipe = EMLatentDiffusionPipeline(
        vqvae, unet, create_scheduler(config.denoiser), pixel_size_nm=0.5
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
