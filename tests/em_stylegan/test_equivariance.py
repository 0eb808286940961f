"""StyleGAN3 commutes with shifts and turns, StyleGAN2 does not; and the measure is right where the
answer is known.
"""

import math

import pytest
import torch

from em_stylegan.em_stylegan1_generator import StyleGAN1Generator
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from support import equivariance
from support.equivariance import (
    rotation_equivariance,
    sample_image,
    transformed_input,
    translation_equivariance,
)

SMALL = {"z_dim": 8, "w_dim": 8, "mapping_depth": 2}
QUARTER = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.fixture(scope="module")
def generators():
    torch.manual_seed(0)
    return {
        "t": StyleGAN3Generator(32, channel_base=512, max_channels=16, **SMALL).eval(),
        "r": StyleGAN3Generator(
            32, channel_base=1024, max_channels=32, kernel_size=1, radial_filters=True, **SMALL
        ).eval(),
        "2": StyleGAN2Generator(32, channel_base=512, max_channels=16, **SMALL).eval(),
    }


def peak(generator):
    """Four deviations: random weights do not make images of [-1, 1]."""
    with torch.no_grad():
        return 4 * generator(torch.randn(4, 8), noise_mode="none").std().item()


def measure(generator, function, **options):
    return function(generator, 4, peak=peak(generator), **options)


def test_translation(generators):
    for fractional in (False, True):
        t, r, two = (
            measure(generators[name], translation_equivariance, fractional=fractional)
            for name in "tr2"
        )
        assert min(t, r) > 35
        assert two < 25


def test_rotation(generators):
    t, r, two = (measure(generators[name], rotation_equivariance) for name in "tr2")
    assert r > 40
    assert max(t, two) < 20


@torch.no_grad()
def test_quarter_turn_of_r_is_exact(generators):
    generator = generators["r"]
    ws = generator.mapping(torch.randn(2, 8))
    images = generator.synthesis(ws)
    with transformed_input(generator, QUARTER):
        turned = generator.synthesis(ws)
    expected = torch.rot90(images, -1, (2, 3))
    assert (turned - expected).abs().max() / images.std() < 3e-5
    assert torch.equal(generator.synthesis(ws), images), "the transform ends with the context"


@torch.no_grad()
def test_quarter_turn_of_the_constant_is_exact(generators):
    const = generators["2"].synthesis_network.blocks[0].const
    before = const.clone()
    with transformed_input(generators["2"], QUARTER):
        torch.testing.assert_close(const, torch.rot90(before, -1, (1, 2)))
    assert torch.equal(const, before)


@torch.no_grad()
def test_the_first_stylegan_can_be_measured():
    torch.manual_seed(0)
    generator = StyleGAN1Generator(
        16, z_dim=8, w_dim=8, mapping_depth=2, channel_base=128, max_channels=8
    ).eval()
    assert translation_equivariance(generator, 2, peak=peak(generator)) < 25


def test_samples_of_a_known_image():
    """A slow wave, shifted and turned by formula."""

    def wave(x, y):
        return torch.sin(2 * torch.pi * (2.0 * x - 1.5 * y) + 0.3)

    size = 32
    position = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / size
    y, x = torch.meshgrid(position, position, indexing="ij")
    c, s = math.cos(0.4), math.sin(0.4)
    transform = torch.tensor([[c, s, 0.03], [-s, c, -0.02], [0, 0, 1]], dtype=torch.float64)
    result, known = sample_image(wave(x, y)[None, None], transform)
    expected = wave(c * x + s * y + 0.03, -s * x + c * y - 0.02)
    assert known.sum() > 300
    assert (result[0, 0] - expected)[known].abs().max() < 0.02
    shifted, known = sample_image(x[None, None], equivariance._shift(2 / size, -1 / size))
    torch.testing.assert_close(shifted[0, 0][known], torch.roll(x, (-1, 2), (0, 1))[known])


def test_a_generator_that_ignores_its_input_scores_the_scatter_of_its_image(
    generators, monkeypatch
):
    """EQ of images that do not move is the range against their own change under the shift: of white
    noise, twice its variance.
    """
    generator = generators["t"]
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(generator, "synthesis", lambda ws, mode: noise)
    value = translation_equivariance(generator, 20)
    assert value == pytest.approx(10 * math.log10(4 / 2), abs=0.7)
