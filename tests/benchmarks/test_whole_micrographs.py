"""The benchmark of whole micrographs: its arms and its measure of seams."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from support.models import make_ldm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    path = ROOT / "benchmarks" / "whole_micrographs.py"
    spec = importlib.util.spec_from_file_location("benchmark_whole_micrographs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(pipe):
    rng = torch.Generator().manual_seed(0)
    return pipe.decode(pipe.denoise(1, [rng], height=40, width=24), [rng])


def test_the_first_arm_is_what_the_pipeline_does_and_the_others_are_not(script):
    pipe = make_ldm()
    expected = draw(pipe)
    for name, options in script.DENOISING.items():
        with script.change_windows(options):
            drawn = draw(pipe)
        assert drawn.shape == expected.shape
        is_equal = torch.allclose(drawn, expected, atol=1e-5)
        assert is_equal == (name == "smooth, shifted"), name
    assert torch.equal(draw(pipe), expected)


def test_seams_are_measured(script):
    noise = np.random.default_rng(0).normal(128, 10, (6, 128, 128))
    plain = script.measure_seams(noise, 32, 8)
    assert all(each["value"] == pytest.approx(1, abs=0.03) for each in plain.values())
    steps = noise + np.kron(np.indices((4, 4)).sum(0) % 2 * 20, np.ones((32, 32)))
    stepped = script.measure_seams(steps, 32, 8)
    assert stepped["seam_edge"]["value"] > 1.5
    assert stepped["seam_level"]["value"] > 5
    phase = np.abs((np.arange(128) + 16) % 32 - 16)  # faint halfway between the borders
    faint = 128 + (noise - 128) * np.where(phase < 8, 1, 0.5)
    assert script.measure_seams(faint, 32, 8)["seam_contrast"]["value"] > 1.3
