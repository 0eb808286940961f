"""Grain for StyleGAN2: the noise that reduced images lack, measured and added when sampling.

A generator with little training draws an oriented hatching in place of noise that is finer than
its structures. With a `reduction` it draws images without that noise.
"""

import torch
import torch.nn.functional as F

from em_training.noise import MAX_PIXELS, measure_noise, measure_power

MOST_TILES = 1000


def reduce_images(images, reduction: int):
    """Return images [B, C, H, W] at 1 / reduction of their side, low-pass filtered."""
    if reduction == 1:
        return images
    return F.interpolate(images, scale_factor=1 / reduction, mode="bicubic", antialias=True)


def measure_grain(images, reduction: int):
    """Measure the grain that images lack after `reduce_images` and enlargement.

    Args:
        images: Float32 [N, 1, H, W].

    Returns:
        |h| at each frequency, [H, W // 2 + 1] in the order of `torch.fft.rfft2`, for white noise of
        variance 1; and mean and deviation of the strength's logarithm, [2].
    """
    reduced = reduce_images(images, reduction)
    residuals = images - F.interpolate(reduced, scale_factor=reduction, mode="bicubic")
    typical, strengths = measure_noise(residuals, measure_power(residuals))
    logs = strengths.clamp(min=1e-3).log()
    return typical.sqrt(), torch.stack([logs.mean(), logs.std(correction=0)])


def set_grain_of_tiles(model, tiles) -> None:
    """Give a generator with a reduction the grain of training tiles; leave others as they are."""
    if getattr(model, "reduction", 1) > 1:
        set_grain(model, read_tiles(tiles))


@torch.no_grad()
def set_grain(model, images) -> None:
    """Give a generator with a reduction the grain of training images [N, 1, R, R]."""
    if getattr(model, "reduction", 1) > 1:
        amplitude, strength = measure_grain(images, model.reduction)
        model.grain_amplitude.copy_(amplitude)
        model.grain_strength.copy_(strength)


def read_tiles(tiles):
    """Return one view each of evenly spaced tiles, float32 [N, 1, R, R].

    They are at most 1,000, and have at most 67 million pixels, which bounds the memory.
    """
    views_per_tile = max(1, len(tiles) // tiles.num_tiles)
    most = min(MOST_TILES, max(1, MAX_PIXELS // tiles.resolution**2))
    step = -(-tiles.num_tiles // most)
    return tiles.batch(range(0, len(tiles), step * views_per_tile))
