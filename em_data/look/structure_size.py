"""How large the structures of a micrograph are, in pixels, without knowing what they are.

Both measures come from the radial power spectrum, so that white noise is one number, its floor, and
a slow background is a few of the lowest frequencies.
"""

from dataclasses import dataclass

import numpy as np
from scipy import fft, special

MAX_SIDE_PX = 2048  # larger images are averaged first
LEAST_SIDE_PX = 32
LEAST_SIZE_PX = 3.0
GRAIN_PX = 8.0  # a maximum below is taken for grain if there is another one above
LARGEST_SHARE = 0.25  # of the shorter side; what is larger is background
NOISE_BAND = 0.4  # cycles per pixel; what is above is taken for noise
SCALES_PER_OCTAVE = 6
DISC_PER_SIGMA = 2.52  # a disc of this diameter has its maximum at sigma = 1; measured
LEAST_PROMINENCE = 0.05  # of a maximum over the minima beside it
LEAST_DEVIATIONS = 5.0  # of a maximum over the minima beside it, in deviations of the noise
MODES_PER_RING = 1.4  # independent ones, over the ring's number: pi / 1.5^2, by the Hann window


@dataclass(frozen=True)
class StructureSize:
    """Size of the typical structures of an image.

    diameter_px: of the disc that answers most strongly at the same scale of the Laplacian of a
    Gaussian. correlation_px: distance at which the autocorrelation has fallen to 1/e, without noise
    and slow background.
    """

    diameter_px: float
    correlation_px: float


def measure_structure_size(image: np.ndarray) -> StructureSize | None:
    """Return the typical size in a grey image [H, W], or None if no size stands out.

    The diameter is where the variance of the scale-normalised Laplacian of a Gaussian has its
    highest maximum over scales (Lindeberg, IJCV 30, 1998), with the floor of white noise subtracted
    from the power spectrum and a quadratic background from the image. Structures larger than a
    quarter of the shorter side count as background.
    """
    image = np.asarray(image)
    factor = -(-min(image.shape) // MAX_SIDE_PX)
    size = _measure(_average(image, factor))
    if factor > 1 and (size is None or size.diameter_px < GRAIN_PX):
        top, left = ((length - MAX_SIDE_PX) // 2 for length in image.shape)
        return _measure(image[top : top + MAX_SIDE_PX, left : left + MAX_SIDE_PX])
    return size and StructureSize(size.diameter_px * factor, size.correlation_px * factor)


def _average(image, factor):
    height, width = (length // factor * factor for length in image.shape)
    image = image[:height, :width].astype(np.float32)
    if factor == 1:
        return image
    return image.reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3))


def _measure(image):
    if min(image.shape) < LEAST_SIDE_PX or image.min() == image.max():
        return None
    frequencies, power = measure_radial_power(subtract_background(image.astype(np.float32)))
    noise = np.median(power[frequencies > NOISE_BAND])
    signal = power - noise
    signal[0] = 0
    diameter = _find_diameter(frequencies, signal, noise, min(image.shape))
    if diameter is None:
        return None
    return StructureSize(diameter, _find_correlation(frequencies, signal, diameter))


def subtract_background(image: np.ndarray) -> np.ndarray:
    """Return a float image [H, W], clipped, less the quadratic surface that fits it best."""
    image = np.clip(image, *np.percentile(image[::4, ::4], [0.1, 99.9]))
    y, x = (np.linspace(-1, 1, length, dtype=np.float32) for length in image.shape)
    y, x = y[:, None], x[None]
    one = np.ones_like(image[::8, ::8])
    terms = [lambda y, x: 1, lambda y, x: y, lambda y, x: x, lambda y, x: y * x]
    terms += [lambda y, x: y * y, lambda y, x: x * x]
    design = np.stack([(term(y[::8], x[:, ::8]) * one).ravel() for term in terms], axis=1)
    weights = np.linalg.lstsq(design, image[::8, ::8].ravel(), rcond=None)[0]
    for weight, term in zip(weights, terms):
        image = image - weight * term(y, x)
    return image


def measure_radial_power(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return frequencies in cycles per pixel and the mean power around each, float64 [n].

    The image [H, W] is weighted by a Hann window. The sum of power over all frequencies in two
    dimensions is its variance times its number of pixels.
    """
    height, width = image.shape
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    window = window.astype(np.float32)
    centred = (image - (image * window).sum() / window.sum()) * window
    power = np.abs(fft.rfft2(centred)) ** 2 / (window**2).sum()
    frequency = np.hypot(fft.fftfreq(height)[:, None], fft.rfftfreq(width)[None])
    side = min(image.shape)
    ring = np.rint(frequency * side).astype(np.int32)
    is_inside = ring <= side // 2
    num = np.bincount(ring[is_inside], minlength=side // 2 + 1)
    total = np.bincount(ring[is_inside], power[is_inside], minlength=side // 2 + 1)
    return np.arange(side // 2 + 1) / side, total / num


def _find_diameter(frequencies, signal, noise, side):
    """Return the diameter in pixels of the highest maximum over scales, or None."""
    largest = LARGEST_SHARE * side
    num = int(SCALES_PER_OCTAVE * np.log2(2 * largest / LEAST_SIZE_PX)) + 2
    sigmas = LEAST_SIZE_PX / DISC_PER_SIGMA * 2 ** (np.arange(-2, num) / SCALES_PER_OCTAVE)
    phases = (2 * np.pi * sigmas[:, None] * frequencies) ** 2  # [scales, frequencies]
    response = phases**2 * np.exp(-phases) * frequencies
    variance = response @ signal
    rings = np.maximum(np.arange(len(frequencies)), 1)
    least = LEAST_DEVIATIONS * noise * np.sqrt(response**2 @ (1 / (MODES_PER_RING * rings)))
    maxima = []
    for i in range(1, len(sigmas) - 1):
        if variance[i - 1] < variance[i] >= variance[i + 1]:
            prominence = variance[i] - max(_find_valleys(variance, i))
            if prominence > max(LEAST_PROMINENCE * variance[i], least[i]):
                low, mid, high = np.log(np.maximum(variance[i - 1 : i + 2], 1e-30))
                shift = 0.5 * (low - high) / min(low - 2 * mid + high, -1e-9)
                diameter = DISC_PER_SIGMA * sigmas[i] * 2 ** (shift / SCALES_PER_OCTAVE)
                maxima.append((variance[i], diameter))
    maxima = [each for each in maxima if LEAST_SIZE_PX <= each[1] <= largest]
    coarse = [each for each in maxima if each[1] >= GRAIN_PX]
    return float(max(coarse or maxima)[1]) if maxima else None


def _find_valleys(values, i):
    """Return the least values between a maximum and the next higher value to each side."""
    valleys = []
    for side in (values[:i][::-1], values[i + 1 :]):
        higher = np.flatnonzero(side > values[i])
        valleys.append(side[: higher[0] + 1 if len(higher) else None].min())
    return valleys


def _find_correlation(frequencies, signal, diameter):
    """Return the distance in pixels at which the autocorrelation has fallen to 1/e."""
    background = np.exp(-2 * (np.pi * frequencies * 2 * diameter) ** 2)
    weights = signal * (1 - background) ** 2 * frequencies
    lags = np.arange(int(2 * diameter) + 3)
    correlation = special.j0(2 * np.pi * lags[:, None] * frequencies) @ weights
    correlation /= correlation[0]
    below = np.flatnonzero(correlation < np.exp(-1))
    i = int(below[0]) if len(below) else len(lags) - 1
    step = correlation[i - 1] - correlation[i]
    return float(i - 1 + (correlation[i - 1] - np.exp(-1)) / max(step, 1e-9))
