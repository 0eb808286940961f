import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch

from em_data import DataConfig, load_data
from em_diffusion import PRESETS
from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.latents import encode_latents, measure_latents
from em_training.latents import Latents

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package


@pytest.fixture
def accelerator():
    return accelerate.Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture(scope="session")
def tiles(tmp_path_factory):
    config = DataConfig(
        resolution=32, downsample=4, num_micrographs=4, micrograph_size=256,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )  # fmt: skip
    return load_data("synthetic", config, log=lambda line: None).train


@pytest.fixture(scope="session")
def paths(tiles, tmp_path_factory):
    from data_loading import write_png_tiles

    return write_png_tiles(tiles, tmp_path_factory.mktemp("png"))


@pytest.fixture
def vqvae():
    torch.manual_seed(0)
    model = create_autoencoder(PRESETS["test"]().autoencoder, 32)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()


@pytest.fixture
def latents(vqvae, tiles, accelerator, tmp_path):
    array, _ = encode_latents(
        vqvae, tiles, tmp_path / "latents", accelerator=accelerator, view_ids=np.arange(12)
    )
    return Latents(array, *measure_latents(array))
