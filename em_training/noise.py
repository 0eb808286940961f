"""Power and strength of the noise in images, for grain that is drawn anew."""

import math

import torch

CHUNK = 64  # images at a time
MAX_PIXELS = 2**26  # to measure on: 1,000 images of 256 x 256, which take about 1.5 GB of memory


def measure_noise(relative, power):
    """Return the power of noise at each frequency and each image's strength.

    The power is the median over images, the strength the median over frequencies: structure in some
    images and at some frequencies is not taken for noise. The power of Gaussian noise at a
    frequency is exponentially distributed, with a median of ln 2 times the mean. Frequencies
    without noise say nothing about its strength.

    Args:
        relative: Noise and some structure [N, 1, H, W], such as residuals over their deviation.
        power: Their mean power [H, W // 2 + 1].

    Returns:
        Two tensors, [H, W // 2 + 1] and [N].
    """
    powers = torch.cat(
        [torch.fft.rfft2(part[:, 0]).abs().square() for part in relative.split(CHUNK)]
    )
    powers /= relative.shape[-2] * relative.shape[-1]  # [N, H, W // 2 + 1]
    typical = torch.minimum(powers.median(dim=0).values / math.log(2), power)
    noisy = typical > 0.01 * typical.mean()
    if not noisy.any():
        return typical, torch.ones(len(relative))
    return typical, ((powers[:, noisy] / typical[noisy]).median(dim=1).values / math.log(2)).sqrt()


def measure_power(images):
    """Return mean squared Fourier amplitudes of images [N, 1, H, W] per pixel: [H, W // 2 + 1]."""
    total = sum(
        torch.fft.rfft2(part[:, 0].double()).abs().square().sum(dim=0)
        for part in images.split(CHUNK)
    )
    return (total / (len(images) * images.shape[-1] * images.shape[-2])).float()
