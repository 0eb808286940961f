"""Power spectrum, grey levels, noise and two-point correlation of micrographs.

Each function takes uint8 images [N, H, W] and returns one row or number per image, so that sets can
be resampled by image.
"""

import numpy as np
from scipy import fft, ndimage

BLOCK = 64  # images at once
QUANTISATION_POWER = 1 / 12  # variance of rounding to whole grey levels (Widrow 1956)


def frequency_bins(shape):
    """Return the centres [K] of the rings of `radial_power_spectrum` in cycles per pixel."""
    side = min(shape)
    return np.arange(1, side // 2 + 1) / side


def radial_power_spectrum(images):
    """Return the radially averaged power spectrum of each image [N, H, W] in dB, [N, K].

    10 log10 of `ring_powers` in grey levels squared, so white noise of deviation s gives
    20 log10 s. The power of rounding, 1/12, is added.
    """
    return 10 * np.log10(ring_powers(images) + QUANTISATION_POWER)


def ring_powers(images):
    """Return the power of each image [N, H, W] in rings of spatial frequency, [N, K].

    |FFT|^2 of the image less its mean under a Hann window (Harris 1978), over the window's energy,
    averaged over rings of width 1 / side: white noise of deviation s gives s^2.
    """
    height, width = images.shape[1:]
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    weight = (window**2).sum()
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    ring = np.rint(radius * min(height, width)).astype(int)  # [H, W/2 + 1], 0 is the mean
    num_rings = min(height, width) // 2
    twice = np.full(ring.shape, 2.0)  # rfft keeps one of two conjugates
    twice[:, 0] = 1
    if width % 2 == 0:
        twice[:, -1] = 1
    used = (ring >= 1) & (ring <= num_rings)
    assign = np.zeros((used.sum(), num_rings))
    assign[np.arange(used.sum()), ring[used] - 1] = twice[used]
    assign /= assign.sum(0)
    powers = np.empty((len(images), num_rings))
    for rows in _blocks(len(images)):
        block = images[rows].astype(np.float64)
        block = (block - block.mean((1, 2), keepdims=True)) * window
        powers[rows] = (np.abs(fft.rfft2(block)) ** 2 / weight)[:, used] @ assign
    return powers


def grey_level_histogram(images):
    """Return the share of pixels at each grey level of each image, [N, 256]."""
    pixels = images.shape[1] * images.shape[2]
    return np.stack([np.bincount(image.ravel(), minlength=256) / pixels for image in images])


def noise_level(images):
    """Return the standard deviation of each image's noise in grey levels [N] (Immerkær 1996).

    sqrt(pi / 2) / 6 times the mean magnitude under [[1, -2, 1], [-2, 4, -2], [1, -2, 1]], which
    does not see planes and straight steps along the axes. Exact for white noise.
    """
    levels = np.empty(len(images))
    for rows in _blocks(len(images)):
        difference = np.diff(images[rows].astype(np.float64), n=2, axis=1)
        difference = np.diff(difference, n=2, axis=2)  # [B, H - 2, W - 2]
        levels[rows] = np.sqrt(np.pi / 2) * np.abs(difference).mean((1, 2)) / 6
    return levels


def signal_to_noise(images, noise=None):
    """Return each image's signal-to-noise ratio [N].

    sqrt(max(variance - noise^2, 0)) / noise, with `noise` [N] from `noise_level`, at least that of
    rounding. Any contrast counts as signal.
    """
    noise = noise_level(images) if noise is None else noise
    noise = np.maximum(noise, np.sqrt(QUANTISATION_POWER))
    variance = np.concatenate(
        [images[rows].astype(np.float64).var((1, 2)) for rows in _blocks(len(images))]
    )
    return np.sqrt(np.maximum(variance - noise**2, 0)) / noise


def flatten_background(images, scale_px=10.0, num_passes=2):
    """Return images [N, H, W] less their background, float32 grey levels; dark is positive.

    The background is a mean under a bell of deviation `scale_px`, at most a quarter of the side.
    After the first pass, pixels that stand out by more than two robust deviations no longer count
    for it (normalised convolution, Knutsson & Westin 1993).
    """
    scale = min(scale_px, min(images.shape[1:]) / 4)
    # three boxes have the variance (width^2 - 1) / 4
    width = 2 * round((np.sqrt(4 * scale**2 + 1) - 1) / 2) + 1
    flat = np.empty(images.shape, np.float32)
    for rows in _blocks(len(images)):
        block = images[rows].astype(np.float32)
        residual = _blur(block, width) - block
        for _ in range(num_passes - 1):
            weight = (np.abs(residual) <= 2 * robust_deviation(residual) + 1e-6).astype(np.float32)
            residual = _blur(block * weight, width) / np.maximum(_blur(weight, width), 1e-3) - block
        flat[rows] = residual
    return flat


def robust_deviation(images):
    """Return the median magnitude of each image over 0.6745 [N, 1, 1]: a normal's deviation."""
    return np.median(np.abs(images), (1, 2), keepdims=True) / 0.6745


def _blur(images, width):
    for _ in range(3):
        images = ndimage.uniform_filter(images, (1, width, width), mode="reflect")
    return images


def dark_phase_threshold(flat, fraction=0.1):
    """Return the level above which the darkest `fraction` of flattened images [N, H, W] lies."""
    return float(np.quantile(flat, 1 - fraction))


def two_point_correlation(flat, threshold):
    """Return the two-point probability S2(r) of the dark phase of flattened images, [N, R].

    The probability that two pixels r = 0, 1, ... side / 4 apart are both dark, averaged over
    directions (Torquato 2002, chapter 2). By FFT with zero padding; each lag is divided by its
    number of pairs.
    """
    height, width = flat.shape[1:]
    longest = min(height, width) // 4
    shape = [fft.next_fast_len(side + longest, real=True) for side in (height, width)]
    # the other half mirrors this one
    down, across = np.arange(-longest, longest + 1), np.arange(0, longest + 1)
    distance = np.rint(np.hypot(down[:, None], across[None, :])).astype(int)
    used = (distance <= longest) & ~((across == 0) & (down < 0)[:, None])
    pairs = (height - np.abs(down))[:, None] * (width - across)[None, :]
    assign = np.zeros((used.sum(), longest + 1))
    assign[np.arange(used.sum()), distance[used]] = 1
    assign /= assign.sum(0)
    curves = np.empty((len(flat), longest + 1))
    for rows in _blocks(len(flat)):
        dark = (flat[rows] > threshold).astype(np.float64)
        spectrum = fft.rfft2(dark, s=shape)
        counts = fft.irfft2(np.abs(spectrum) ** 2, s=shape)[:, down][:, :, across]
        curves[rows] = (counts / pairs)[:, used] @ assign
    return curves


def _blocks(num):
    return [slice(start, min(start + BLOCK, num)) for start in range(0, num, BLOCK)]
