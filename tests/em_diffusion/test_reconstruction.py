import math

import numpy as np
import pytest
import torch

from em_diffusion.reconstruction import psnr, spectrum_difference_db, spectrum_error_db, ssim
from em_evaluation.micrograph_statistics import ring_powers


def random_images(num=3, height=24, width=32, seed=0):
    return torch.rand(num, 1, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_a_known_error():
    images = random_images()
    for error in (0.2, 0.02):
        expected = 20 * math.log10(2 / error)
        assert psnr(images, images + error).tolist() == pytest.approx([expected] * 3, abs=1e-3)
    shifts = torch.tensor([0.2, 0.02, 0.1]).view(-1, 1, 1, 1)
    assert psnr(images, images - shifts).tolist() == pytest.approx(
        [20, 40, 20 * math.log10(20)], abs=1e-3
    )
    assert psnr(images, images).tolist() == pytest.approx([10 * math.log10(4e10)] * 3)


def slow_ssim(x, y):
    """SSIM window by window, as the paper writes it, of two float64 arrays [H, W] with a range of
    2.
    """
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variance_a, variance_b = (
                (weights * (a - mean_a) ** 2).sum(),
                (weights * (b - mean_b) ** 2).sum(),
            )
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            values.append(
                numerator / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
            )
    return np.mean(values)


def test_ssim_equals_its_slow_twin_and_is_one_for_equal_images():
    images = random_images()
    others = (0.7 * images + 0.2 * random_images(seed=1) + 0.1).clamp(-1, 1)
    expected = [
        slow_ssim(x[0].double().numpy(), y[0].double().numpy()) for x, y in zip(images, others)
    ]
    assert ssim(images, others).tolist() == pytest.approx(expected, abs=1e-5)
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert torch.allclose(ssim(images, others), ssim(others, images), atol=1e-6)
    negative = ssim(0.5 + 0.3 * images, 0.5 - 0.3 * images)
    assert (negative < 0).all()


def test_the_spectrum_of_white_noise_is_flat_and_a_wave_lies_in_its_own_bin():
    noise = torch.randn(200, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    spectrum = ring_powers(noise.numpy()).mean(0)
    assert spectrum.shape == (16,)
    assert spectrum[2:] == pytest.approx(np.full(14, 0.3**2), rel=0.1)
    x = torch.arange(32) * 2 * math.pi / 32
    for direction in (torch.cos(6 * x)[None, :], torch.cos(6 * x)[:, None]):
        wave = ring_powers(direction.expand(32, 32)[None].numpy())[0]
        assert int(wave.argmax()) == 5  # the sixth bin
        assert wave[4:7].sum() > 0.99 * wave.sum()


def test_the_spectrum_equals_that_of_the_full_transform():
    """The half transform counts each frequency as often as the whole one, for all sides."""
    for height, width in ((16, 20), (15, 17)):
        images = random_images(2, height, width)[:, 0].double().numpy()
        centred = images - images.mean((1, 2), keepdims=True)
        window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
        power = np.abs(np.fft.fft2(centred * window)) ** 2 / (window**2).sum()
        radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
        ring = np.rint(radius * min(height, width))
        expected = [power[:, ring == k].mean() for k in range(1, min(height, width) // 2 + 1)]
        assert ring_powers(images).mean(0) == pytest.approx(np.array(expected), rel=1e-6)


def test_the_spectrum_error_is_the_gain_in_db():
    images = random_images(70)  # more than one chunk
    assert spectrum_error_db(images, images) == 0
    for gain in (0.5, 2.0):
        difference = spectrum_difference_db(images, gain * images)
        assert difference.numpy() == pytest.approx(np.full(12, 20 * math.log10(gain)), abs=1e-5)
        assert spectrum_error_db(images, gain * images) == pytest.approx(
            20 * abs(math.log10(gain)), abs=1e-5
        )
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    difference = spectrum_difference_db(images, blurred)
    assert difference[0] > -2
    assert difference[-1] < -8
    assert torch.isfinite(spectrum_difference_db(images, torch.zeros_like(images))).all()


@pytest.mark.parametrize("function", [psnr, ssim, spectrum_difference_db])
def test_images_of_other_shapes_are_refused(function):
    with pytest.raises(ValueError, match=r"\[N, 1, H, W\]"):
        function(random_images(), random_images(num=2))
    with pytest.raises(ValueError, match=r"\[N, 1, H, W\]"):
        function(random_images()[:, 0], random_images()[:, 0])


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="11 x 11 pixels or more"):
        ssim(random_images(height=10), random_images(height=10))
