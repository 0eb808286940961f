"""Grain for StyleGAN2: the noise that reduced images lack, measured and added when sampling.

A generator with little training draws an oriented hatching in place of noise that is finer than
its structures. With a `reduction` it draws images without that noise.
"""

import math

import torch
import torch.nn.functional as F

MOST_TILES = 1000


def reduce_images(images, reduction: int):
    """Return images [B, C, H, W] at 1 / reduction of their side, low-pass filtered."""
    if reduction == 1:
        return images
    return F.interpolate(images, scale_factor=1 / reduction, mode="bicubic", antialias=True)


def measure_grain(images, reduction: int):
    """Measure the grain that images lack after `reduce_images` and enlargement.

    The spectrum is the median over images and the strength the median over frequencies, so that
    structure in some images and at some frequencies is not taken for noise. The power of Gaussian
    noise at a frequency is exponentially distributed, with a median of ln 2 times the mean.

    Args:
        images: Float32 [N, 1, H, W].

    Returns:
        |h| at each frequency, [H, W // 2 + 1] in the order of `torch.fft.rfft2`, for white noise of
        variance 1; and mean and deviation of the strength's logarithm, [2].
    """
    reduced = reduce_images(images, reduction)
    residuals = images - F.interpolate(reduced, scale_factor=reduction, mode="bicubic")
    powers = torch.fft.rfft2(residuals[:, 0]).abs().square() / images[0].numel()
    typical = torch.minimum(powers.median(dim=0).values / math.log(2), powers.mean(dim=0))
    noisy = typical > 0.01 * typical.mean()
    if not noisy.any():
        return typical, torch.zeros(2)
    logs = (powers[:, noisy] / typical[noisy]).median(dim=1).values.clamp(min=1e-6).log() / 2
    logs = logs - math.log(math.log(2)) / 2
    return typical.sqrt(), torch.stack([logs.mean(), logs.std(correction=0)])


@torch.no_grad()
def set_grain(model, images) -> None:
    """Give a generator with a reduction the grain of training images [N, 1, R, R]."""
    if getattr(model, "reduction", 1) > 1:
        amplitude, strength = measure_grain(images, model.reduction)
        model.grain_amplitude.copy_(amplitude)
        model.grain_strength.copy_(strength)


def read_tiles(tiles):
    """Return one view of at most 1,000 evenly spaced tiles, float32 [N, 1, R, R]."""
    views_per_tile = max(1, len(tiles) // tiles.num_tiles)
    step = -(-tiles.num_tiles // MOST_TILES)
    return tiles.batch(range(0, len(tiles), step * views_per_tile))
