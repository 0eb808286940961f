"""The only place where integer grey levels become floats in [-1, 1], and back."""

import numpy as np
import torch

FULL_RANGE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
SLAB_PIXELS = 65_536  # converted at a time, so that all passes stay in the processor's cache
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

    "auto" is "full" for 8 bits, and the least and the largest level for 16 bits.
    """
    full = FULL_RANGE[image.dtype]
    if intensity == "full" or (intensity == "auto" and full == 255):
        return 0, full, 0.0
    if intensity == "auto":
        return int(image.min()), int(image.max()), 0.0
    counts = np.bincount(image.ravel(), minlength=full + 1)
    shares = np.cumsum(counts) / image.size
    low = int(np.searchsorted(shares, percentiles[0] / 100))
    high = min(int(np.searchsorted(shares, percentiles[1] / 100)), full)
    if high <= low:  # the image is nearly constant
        low, high = int(image.min()), int(image.max())
    return low, high, float(1 - counts[low : high + 1].sum() / image.size)


def float_to_uint16(image):
    """Return a finite image scaled to uint16, and the values that became 0 and 65535.

    They are its least and largest value, but whole numbers with a span of at most 16 bits are kept
    if they lie in 0 to 65535, and shifted otherwise. A constant image of fractions becomes 0.
    """
    low, high = float(image.min()), float(image.max())
    is_whole = np.issubdtype(image.dtype, np.integer) or np.all(image == np.round(image))
    if high - low <= 65535 and is_whole:
        low = 0.0 if low >= 0 and high <= 65535 else low
        return (image.astype(np.float64) - low).astype(np.uint16), low, low + 65535.0
    if high == low:
        return np.zeros(image.shape, np.uint16), low, high
    scaled = (image.astype(np.float64) - low) * (65535 / (high - low))
    return np.rint(scaled).astype(np.uint16), low, high
