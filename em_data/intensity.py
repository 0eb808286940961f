"""The only place where integer grey levels become floats in [-1, 1], and back."""

import numpy as np
import torch

from em_data.spikes import find_range, iterate_slabs, take_sample

FULL_RANGE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
SLAB_PIXELS = 65_536  # converted at a time, so that all passes stay in the processor's cache
NARROW = 0.25  # share of the range of levels; less contrast is said
Levels = float | np.ndarray | None


def from_uint(array: np.ndarray, low: Levels = None, high: Levels = None) -> torch.Tensor:
    """Map grey levels to floats: y = 2 (x - low) / (high - low) - 1, clamped to [-1, 1].

    Args:
        array: uint8 or uint16 [...].
        low, high: Levels that become -1 and 1: numbers, or arrays [B] for a batch [B, ...].
            Default: the full range of the type. `to_uint8` and `to_uint16` are then the exact
            inverse.

    Returns:
        Float32 [...].
    """
    array = np.asarray(array)
    if array.dtype not in FULL_RANGE:
        raise ValueError(
            f"grey levels are {array.dtype}, but must be uint8 or uint16; use "
            "em_data.read_micrograph."
        )
    full = FULL_RANGE[array.dtype]
    low = np.asarray(0 if low is None else low, dtype=np.float32)
    high = np.asarray(full if high is None else high, dtype=np.float32)
    if np.any(high <= low):
        raise ValueError("high must be above low: a constant image has no intensity scale.")
    images = np.empty(array.shape, np.float32)
    if low.ndim or high.ndim:
        shape = (len(array),) + (1,) * (array.ndim - 1)
        low, high = (np.broadcast_to(each, len(array)).reshape(shape) for each in (low, high))
        num = max(1, SLAB_PIXELS // max(1, array[:1].size))
        for slab in (slice(i, i + num) for i in range(0, len(array), num)):
            _scale(array[slab], low[slab], high[slab], full, images[slab])
    else:
        _scale(array, low, high, full, images)
    return torch.from_numpy(images)


def _scale(array, low, high, full, out):
    out[...] = array
    if low.any():
        out -= low
    out *= np.float32(2) / (high - low)
    out -= np.float32(1)
    if low.any() or np.any(high < full):  # on the full range the result is in [-1, 1] anyway
        np.clip(out, -1, 1, out=out)


def to_uint8(images: torch.Tensor | np.ndarray) -> np.ndarray:
    """Map float images [...] in [-1, 1] to uint8. Clamp values outside; refuse NaN."""
    return _to_uint(images, np.uint8)


def to_uint16(images: torch.Tensor | np.ndarray) -> np.ndarray:
    """Map float images [...] in [-1, 1] to uint16. Clamp values outside; refuse NaN."""
    return _to_uint(images, np.uint16)


def _to_uint(images, dtype):
    images = torch.as_tensor(images).detach().float().cpu()
    if torch.isnan(images).any():
        raise ValueError("The images hold NaN: the model that generated them has diverged.")
    half = FULL_RANGE[np.dtype(dtype)] / 2
    return images.clamp(-1, 1).add(1).mul(half).round_().numpy().astype(dtype)


def find_levels(image, intensity="auto", percentiles=(0.1, 99.9)) -> tuple[int, int, float]:
    """Return the grey levels of an image that become -1 and 1, and the fraction of pixels outside.

    "auto" is "full" for 8 bits. For 16 bits it is the least and the largest level, spikes apart.
    """
    full = FULL_RANGE[image.dtype]
    if intensity == "full" or (intensity == "auto" and full == 255):
        return 0, full, 0.0
    if intensity == "auto":
        low, high, spikes = find_range(image)
        return int(low), int(high), len(spikes) / image.size
    counts = np.zeros(full + 1, np.int64)
    for rows in iterate_slabs(image):
        counts += np.bincount(image[rows].ravel(), minlength=full + 1)
    shares = np.cumsum(counts) / image.size
    low = int(np.searchsorted(shares, percentiles[0] / 100))
    high = min(int(np.searchsorted(shares, percentiles[1] / 100)), full)
    if high <= low:  # the image is nearly constant
        low, high = int(image.min()), int(image.max())
    return low, high, float(1 - counts[low : high + 1].sum() / image.size)


def describe_spikes(num, num_pixels) -> str:
    """Return words for the spikes of an image of so many pixels."""
    share = 100 * num / num_pixels
    return f"{num} spike{'s' if num > 1 else ''} (isolated outliers, {share:.2g} % of the pixels)"


def describe_narrow(image: np.ndarray, low: int, high: int) -> list[str]:
    """Return a sentence if nearly all pixels of an image fill a small part of low to high."""
    first, last = np.percentile(np.clip(take_sample(image), low, high), (0.1, 99.9))
    if last - first >= NARROW * (high - low):
        return []
    return [
        f"99.8 % of the pixels fill only {(last - first) / (high - low):.2g} of the grey levels "
        f"{low} to {high}, so a few pixels take the contrast: use --tiles.intensity percentile if "
        "they are a dead column, a bar or a fill value"
    ]


def float_to_uint16(image):
    """Return an image scaled to uint16, the values that became 0 and 65535, and the spikes.

    The values are the least and the largest one, spikes apart, to which spikes are clipped. But
    whole numbers with a span of at most 16 bits are kept if they lie in 0 to 65535, and shifted
    otherwise. A constant image of fractions becomes 0.

    Args:
        image: [H, W] of integers or floats without NaN; infinite values can be spikes.

    Returns:
        uint16 [H, W], the two values, and the flat indices of the spikes (int64 [n]).

    Raises:
        ValueError: Infinite values are no spikes.
    """
    offset = 0
    if image.dtype.kind in "iu" and image.dtype.itemsize == 8:  # more digits than a float64 has
        offset = int(image.min())
        image = image.astype(np.uint64)
        image -= np.uint64(offset % 2**64)
    low, high, spikes = find_range(image)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("infinite values are no spikes")
    slabs = list(iterate_slabs(image))
    is_whole = image.dtype.kind in "iu" or all(
        np.array_equal(slab, np.rint(slab))
        for slab in (np.clip(image[rows], low, high) for rows in slabs)
    )
    scaled = np.empty(image.shape, np.uint16)
    if high - low <= 65535 and is_whole:
        first = low
        if low + offset >= 0 and high + offset <= 65535:
            first = -float(offset)
        for rows in slabs:
            scaled[rows] = np.clip(image[rows].astype(np.float64), low, high) - first
        return scaled, first + offset, first + offset + 65535.0, spikes
    # differences of values at either end of the range of float64 stay finite
    exponent = np.frexp(max(abs(low), abs(high)))[1]
    first, last = np.ldexp(low, -exponent), np.ldexp(high, -exponent)
    factor = 65535 / (last - first) if last > first else 0.0
    for rows in slabs:
        values = np.ldexp(np.clip(image[rows].astype(np.float64), low, high), -exponent)
        scaled[rows] = np.rint((values - first) * factor)
    return scaled, low + offset, high + offset, spikes
