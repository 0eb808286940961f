import numpy as np
import pytest
from scipy import ndimage

from em_data.look.structure_size import measure_structure_size

SIDE = 512
BACKGROUND = np.sin(np.linspace(0, 2, SIDE))[:, None] * np.cos(np.linspace(0, 1.5, SIDE))[None]


def draw_discs(diameter, rng, share=0.1, side=SIDE):
    """Return bright discs on a dark ground, covering about this share of the image."""
    y, x = np.mgrid[:side, :side]
    image = np.zeros((side, side))
    for _ in range(int(share * side**2 / (np.pi / 4 * diameter**2))):
        row, column = rng.uniform(0, side, 2)
        image = np.maximum(image, np.clip(diameter / 2 - np.hypot(y - row, x - column) + 0.5, 0, 1))
    return image


def draw_texture(correlation_px, rng):
    """Return Gaussian noise whose autocorrelation is exp(-(distance / correlation_px)^2)."""
    image = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), correlation_px / 2, mode="wrap")
    return image / image.std()


@pytest.mark.parametrize("noise", [0, 1])
@pytest.mark.parametrize("diameter", [6, 12, 25, 50])
def test_diameter_of_discs(diameter, noise):
    rng = np.random.default_rng(diameter)
    image = draw_discs(diameter, rng) + noise * rng.normal(size=(SIDE, SIDE))
    for each in (image, image + 3 * BACKGROUND, 255 - image):
        assert measure_structure_size(each).diameter_px == pytest.approx(diameter, rel=0.2)


@pytest.mark.parametrize("noise", [0, 0.7])
@pytest.mark.parametrize("correlation", [4, 8, 16, 32])
def test_correlation_length_of_textures(correlation, noise):
    rng = np.random.default_rng(correlation)
    image = draw_texture(correlation, rng) + noise * rng.normal(size=(SIDE, SIDE))
    for each in (image, image + 3 * BACKGROUND):
        assert measure_structure_size(each).correlation_px == pytest.approx(correlation, rel=0.2)


def test_grain_does_not_hide_structures():
    """Detectors and JPEG correlate the noise of neighbours."""
    rng = np.random.default_rng(3)
    grain = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 1)
    image = draw_discs(40, rng) + 0.3 * grain / grain.std()
    assert measure_structure_size(image).diameter_px == pytest.approx(40, rel=0.2)


def test_hot_pixels_change_little():
    rng = np.random.default_rng(4)
    image = draw_discs(20, rng)
    image[rng.integers(0, SIDE, 20), rng.integers(0, SIDE, 20)] = 1000
    assert measure_structure_size(image).diameter_px == pytest.approx(20, rel=0.2)


def test_large_micrographs_are_averaged_unless_their_structures_are_fine():
    rng = np.random.default_rng(5)
    tile = (255 * draw_discs(6, rng)).astype(np.uint8)
    assert measure_structure_size(np.tile(tile, (5, 5))).diameter_px == pytest.approx(6, rel=0.2)
    coarse = np.kron((255 * draw_discs(25, rng)).astype(np.uint8), np.ones((8, 8), np.uint8))
    assert measure_structure_size(coarse).diameter_px == pytest.approx(200, rel=0.2)


def test_no_size_without_structures():
    for seed in range(10):
        noise = np.random.default_rng(seed).normal(size=(SIDE, SIDE))
        assert measure_structure_size(noise) is None
        assert measure_structure_size(noise + 9 * BACKGROUND) is None
    rng = np.random.default_rng(6)
    assert measure_structure_size(np.full((SIDE, SIDE), 7, np.uint8)) is None
    assert measure_structure_size(rng.integers(0, 99, (16, 400), np.uint8)) is None


def test_oblong_micrographs():
    rng = np.random.default_rng(7)
    image = draw_discs(20, rng)[:200]
    assert measure_structure_size(image).diameter_px == pytest.approx(20, rel=0.2)
    assert measure_structure_size(image.T).diameter_px == pytest.approx(20, rel=0.2)
