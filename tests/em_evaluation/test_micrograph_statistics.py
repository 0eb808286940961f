"""Spectrum, noise, correlation and distances of histograms against closed forms and slow twins."""

import numpy as np
import pytest

from em_evaluation.bootstrap import (
    circular_wasserstein,
    compare_means,
    histogram_of_values,
    resample_means,
    root_mean_square_difference,
    wasserstein,
)
from em_evaluation.micrograph_statistics import (
    flatten_background,
    frequency_bins,
    grey_level_histogram,
    noise_level,
    radial_power_spectrum,
    signal_to_noise,
    two_point_correlation,
)


def noise(deviation, num=64, side=64, seed=0):
    levels = 128 + deviation * np.random.default_rng(seed).standard_normal((num, side, side))
    return levels.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("deviation", [3.0, 12.0])
def test_white_noise_has_a_flat_spectrum_of_its_variance(deviation):
    power = 10 ** (radial_power_spectrum(noise(deviation)) / 10)  # [N, K]
    assert power.shape == (64, 32)
    assert np.allclose(power.mean(0)[2:], deviation**2 + 2 / 12, rtol=0.08)


def test_a_wave_has_its_power_in_its_own_ring():
    y = np.arange(64)
    wave = (128 + 50 * np.sin(2 * np.pi * 8 / 64 * y))[None, :, None] * np.ones((1, 1, 64))
    spectrum = radial_power_spectrum(wave.round().astype(np.uint8))[0]
    assert frequency_bins((64, 64))[spectrum.argmax()] == 8 / 64
    assert radial_power_spectrum(np.full((1, 64, 64), 7, np.uint8))[0] == pytest.approx(
        10 * np.log10(1 / 12)
    )


@pytest.mark.parametrize("deviation", [2.0, 10.0])
def test_noise_level_is_that_of_the_noise_and_blind_to_planes(deviation):
    images = noise(deviation, num=32)
    assert noise_level(images).mean() == pytest.approx(np.hypot(deviation, 12**-0.5), rel=0.02)
    y, x = np.mgrid[:64, :64]
    plane = (x + 2 * y)[None].astype(np.uint8)
    assert noise_level(plane)[0] == 0
    wave = 40 * np.sin(2 * np.pi * x / 32)
    mixed = (images.astype(float) + wave).round().clip(0, 255).astype(np.uint8)
    assert signal_to_noise(mixed).mean() == pytest.approx(
        40 / 2**0.5 / np.hypot(deviation, 12**-0.5), rel=0.05
    )


def test_two_point_correlation_of_random_pixels_and_its_slow_twin():
    rng = np.random.default_rng(1)
    flat = rng.random((50, 32, 32)).astype(np.float32)
    curve = two_point_correlation(flat, 0.7).mean(0)
    assert curve[0] == pytest.approx(0.3, abs=0.01)
    assert np.allclose(curve[1:], 0.09, atol=0.005)

    small = rng.random((1, 12, 12)).astype(np.float32)
    dark = small[0] > 0.6
    lags = {}
    for dy in range(-3, 4):
        for dx in range(-3, 4):
            a = dark[max(dy, 0) : 12 + min(dy, 0), max(dx, 0) : 12 + min(dx, 0)]
            b = dark[max(-dy, 0) : 12 + min(-dy, 0), max(-dx, 0) : 12 + min(-dx, 0)]
            lags.setdefault(round(np.hypot(dy, dx)), []).append((a & b).mean())
    both = [np.mean(lags[r]) for r in range(4)]
    assert two_point_correlation(small, 0.6)[0] == pytest.approx(both, abs=1e-9)


def test_background_is_taken_away_and_a_dark_spot_stays():
    y, x = np.mgrid[:128, :128]
    image = 100 + 30 * np.sin(2 * np.pi * x / 256) + 0.1 * y
    image[60:66, 60:66] -= 40
    flat = flatten_background(image[None])[0]
    assert flat[62, 62] == pytest.approx(40, abs=3)
    flat[55:71, 55:71] = 0
    assert np.abs(flat[16:-16, 16:-16]).max() < 4


def test_wasserstein_of_a_shift_is_the_shift():
    dark, bright = (
        grey_level_histogram(np.full((2, 8, 8), level, np.uint8)).mean(0) for level in (20, 57)
    )
    assert wasserstein(1)(dark, bright) == pytest.approx(37)
    rows, width = histogram_of_values(np.array([1.0, 3.0]), 100, 0, 5)
    other, _ = histogram_of_values(np.array([2.0, 4.0]), 100, 0, 5)
    assert wasserstein(width)(rows.mean(0), other.mean(0)) == pytest.approx(1.0, abs=width)
    assert np.isnan(wasserstein(1)(np.zeros(5), np.ones(5)))


def test_mass_on_a_circle_goes_the_short_way():
    a, b = np.zeros(36), np.zeros(36)
    a[0], b[35] = 1, 1  # 0 and 175 degrees of a circle of 180
    assert circular_wasserstein(5)(a, b) == pytest.approx(5)
    assert wasserstein(5)(a, b) == pytest.approx(175)


def test_intervals_hold_the_difference_and_the_common_reference_cancels():
    rng = np.random.default_rng(2)
    truth, inside = 0.5, 0
    for trial in range(60):
        a, b = rng.normal(truth, 1, (200, 1)), rng.normal(0, 1, (150, 1))
        distance = compare_means(
            root_mean_square_difference,
            resample_means(a, seed=trial),
            resample_means(b, seed=trial + 999),
        )
        interval = distance.interval()
        inside += interval.low <= truth <= interval.high
    assert inside >= 51  # of 60; 57 are expected
    first = compare_means(
        root_mean_square_difference, resample_means(a, seed=0), resample_means(b, seed=1)
    )
    assert (first - first).interval().high == 0


def test_few_groups_scatter_more_than_their_images():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(10), 20)
    rows = rng.normal(0, 1, 10)[groups][:, None] + 0.1 * rng.normal(0, 1, (200, 1))
    spread = resample_means(rows, groups)[1:].std()
    assert spread == pytest.approx(rows.reshape(10, 20).mean(1).std(ddof=1) / 10**0.5, rel=0.15)
    assert spread > 2 * resample_means(rows)[1:].std()
