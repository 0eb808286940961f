from dataclasses import replace

import pytest

from em_stable_diffusion import PRESETS, train_lora
from em_stable_diffusion.base_source import find_base
from em_stable_diffusion.bases import open_base
from support.tiny_bases import MAKERS


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory):
    """{kind: folder of a tiny base}."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: make(root / kind) for kind, make in MAKERS.items()}


@pytest.fixture(params=MAKERS)
def base(request, base_folders):
    return open_base(find_base(str(base_folders[request.param])))


@pytest.fixture(scope="session")
def make_config(base_folders, tmp_path_factory):
    """(out, kind, fields of training) -> the test preset with a tiny base; 8 steps of 4 images."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(out, kind="stable-diffusion", **training):
        config = PRESETS["test"]()
        lengths = {"num_images": 32, "validate_every": 16, "sample_every": 32, "log_every": 8}
        lengths |= {"checkpoint_every": 16, "num_sample_steps": 2, "num_sample_images": 2}
        lengths |= {"gradient_checkpointing": False, "learning_rate": 1e-2}
        return replace(
            config,
            base=str(base_folders[kind]),
            out=str(out),
            precision="no",
            num_inference_steps=3,
            tiles=replace(config.tiles, cache_dir=cache),
            training=replace(config.training, **lengths | training),
        )

    return make


@pytest.fixture(scope="session")
def runs(make_config, tmp_path_factory):
    """{kind: folder of a finished run}."""
    root = tmp_path_factory.mktemp("runs")
    return {kind: train_lora(make_config(root / kind, kind)) for kind in MAKERS}
