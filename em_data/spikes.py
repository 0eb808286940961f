"""Spikes: isolated pixels far outside the grey levels of a micrograph.

They are hot and dead pixels of a camera, or X-rays and cosmic rays that hit it.
"""

from collections.abc import Iterator
from math import gcd

import numpy as np

MAX_PIXELS = 4  # of a spike, above half of its height
MARGIN = 0.25  # of the robust range; what lies within it is no spike
TIMES_NOISE = 3.0  # a spike differs so much more from its neighbours than 99 % of the pixels
TIMES_LOCAL = 4.0  # ... and than nearly all pixels around it
REACH = 4  # pixels around a pixel that are compared with it, to each side
SLAB_PIXELS = 2**20  # looked at a time
NUM_SAMPLED = 2**20  # pixels of which percentiles are taken
PERCENTILES = ((1, 99), (0.1, 99.9), (0.01, 99.99))  # the first that differ are the robust range


def find_range(image: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Return the least and largest value of an image without its spikes, and where they are.

    A spike stands out from the pixels around it far more than pixels of this image usually do, and
    has at most 4 pixels above half of its height. Larger structures are never spikes.

    Args:
        image: [H, W] of integers or floats, without NaN. Infinite values can be spikes.

    Returns:
        Least value, largest value, and the sorted flat indices of the spikes (int64 [n]).
    """
    spikes = find_spikes(image)
    low, high = _find_limits(image, spikes)
    if not low < high:  # what would be left is constant: the spikes are what the image shows
        spikes = spikes[:0]
        low, high = _find_limits(image, spikes)
    return low, high, spikes


def find_spikes(image: np.ndarray) -> np.ndarray:
    """Return the sorted flat indices of the spikes of an image, int64 [n]; see `find_range`."""
    none = np.empty(0, np.int64)
    if min(image.shape) <= 2 * REACH:
        return none
    scale = _find_scale(image)
    sample = _convert(take_sample(image), scale)
    for percentiles in PERCENTILES:
        low, high = np.percentile(sample, percentiles)
        if low < high:
            break
    else:
        return none
    margin = MARGIN * (high - low)
    indices = _find_outside(image, low - margin, high + margin, scale)
    if not len(indices):
        return none
    step = max(1, len(sample) // 2**14)
    centres = _find_sample(image)[::step]
    difference = np.abs(_compare_with_surroundings(image, centres, scale)[0])
    noise = np.percentile(difference, percentiles[1])
    height, is_isolated = _compare_with_surroundings(image, indices, scale)
    stands_out = np.abs(height) > TIMES_NOISE * noise
    indices, height, peaks = indices[stands_out], height[stands_out], is_isolated[stands_out]
    return _add_flanks(indices, height > 0, peaks, image.shape)


def iterate_slabs(image: np.ndarray) -> Iterator[slice]:
    """Yield slices of rows that together are the image, each of a million pixels or a row."""
    num_rows = max(1, SLAB_PIXELS // max(1, image[:1].size))
    return (slice(i, i + num_rows) for i in range(0, len(image), num_rows))


def _find_limits(image, spikes):
    """Return the least and largest value of an image without the pixels of these flat indices."""
    lows, highs = [], []
    for rows in iterate_slabs(image):
        start, stop = rows.start * image.shape[1], rows.stop * image.shape[1]
        inside = spikes[np.searchsorted(spikes, start) : np.searchsorted(spikes, stop)] - start
        slab = np.delete(image[rows].reshape(-1), inside) if len(inside) else image[rows]
        if slab.size:
            lows.append(slab.min())
            highs.append(slab.max())
    return float(min(lows)), float(max(highs))


def _find_scale(image):
    """Return a factor that keeps differences of values at the ends of float64 finite."""
    if image.dtype.kind != "f" or image.dtype.itemsize < 8:
        return 1.0
    return 1.0 if max(abs(float(image.min())), abs(float(image.max()))) < 1e300 else 2.0**-8


def _convert(values, scale):
    """Return values as float64; infinite ones become larger than any other."""
    values = values.astype(np.float64) * scale
    return np.nan_to_num(values, copy=False, posinf=1e306, neginf=-1e306)


def _find_sample(image):
    """Return flat indices that spread evenly over rows and columns."""
    step = max(1, image.size // NUM_SAMPLED)
    while gcd(step, image.shape[1]) > 1:
        step += 1
    return np.arange(0, image.size, step)


def take_sample(image: np.ndarray) -> np.ndarray:
    """Return up to about a million pixels that spread evenly over an image."""
    return image[np.unravel_index(_find_sample(image), image.shape)]


def _find_outside(image, low, high, scale):
    """Return the flat indices of pixels outside of low to high."""
    found = []
    with np.errstate(over="ignore"):
        low, high = low / scale, high / scale
    for rows in iterate_slabs(image):
        slab = image[rows]
        if slab.min() < low or slab.max() > high:
            outside = np.flatnonzero((slab < low) | (slab > high))
            found.append(outside + rows.start * image.shape[1])
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _compare_with_surroundings(image, indices, scale):
    """Return how far pixels differ from the median around them, and whether they are isolated."""
    height, is_isolated = np.empty(len(indices)), np.empty(len(indices), bool)
    offsets = np.arange(-REACH, REACH + 1)
    is_flank = np.abs(offsets) <= 1
    is_flank = (is_flank[:, None] & is_flank).ravel()
    for start in range(0, len(indices), 2**14):
        part = slice(start, start + 2**14)
        row, col = np.unravel_index(indices[part], image.shape)
        rows, cols = (
            # reflected at the borders
            (size - 1) - np.abs((size - 1) - np.abs(centre[:, None] + offsets))
            for centre, size in zip((row, col), image.shape)
        )
        around = _convert(image[rows[:, :, None], cols[:, None, :]], scale).reshape(len(row), -1)
        around -= np.median(around, axis=1, keepdims=True)
        height[part] = around[:, around.shape[1] // 2]
        around *= np.sign(height[part])[:, None]
        num_high = (around > np.abs(height[part, None]) / 2).sum(axis=1)
        others = np.abs(around[:, ~is_flank])
        usual = np.partition(others, -MAX_PIXELS - 1, axis=1)[:, -MAX_PIXELS - 1]
        is_isolated[part] = num_high <= MAX_PIXELS
        is_isolated[part] &= np.abs(height[part]) > TIMES_LOCAL * usual
    return height, is_isolated


def _add_flanks(indices, is_bright, peaks, shape):
    """Return the indices of peaks, and of pixels outside the range on the same side around them."""
    chosen = [indices[peaks]]
    for side in (is_bright, ~is_bright):
        candidates, centres = indices[side], indices[side & peaks]
        row, col = np.divmod(centres, shape[1])
        for down in range(-2, 3):
            for right in range(-2, 3):
                is_inside = (col + right >= 0) & (col + right < shape[1])
                near = ((row + down) * shape[1] + col + right)[is_inside]
                chosen.append(candidates[np.isin(candidates, near)] if len(near) else near)
    return np.unique(np.concatenate(chosen))
