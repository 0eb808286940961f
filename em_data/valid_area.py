"""Pixels without a value: borders of aligned series, fill values, and dead pixels."""

import numpy as np
from scipy import ndimage

from em_data.refusal import Refusal
from em_data.spikes import find_range, take_sample

MAX_ISOLATED = 4  # pixels that touch each other
MAX_ISOLATED_SHARE = 1e-4  # of the image
MIN_AREA_SHARE = 0.5  # of the image, that must have values
FILL_SHARE = 1e-3  # of the pixels, at least, have a fill value
FILL_GAP = 10.0  # times the range of the other values lies between these and a fill value


def mark_fill(image: np.ndarray, notices: list[str]) -> np.ndarray:
    """Return an image whose fill values, such as -9999, have become NaN.

    A fill value is the least or the largest value of an image. At least 0.1 % of the pixels have
    it, and it lies ten times the range of the other values, spikes apart, away from these. Images
    of two values have none. Infinite values are not fill values.

    Args:
        image: Integers or floats [H, W]; may hold NaN.
        notices: What was found is appended to it.

    Returns:
        Float [H, W], or the image itself if it has no fill value or would lose more than half of
        its area.
    """
    marked, found = image, []
    while (value := _find_fill(marked)) is not None:
        is_fill = marked == value
        found.append(f"{np.count_nonzero(is_fill)} pixels have the fill value {value:.6g}")
        if marked.dtype.kind != "f":
            marked = marked.astype(np.float32 if marked.dtype.itemsize <= 2 else np.float64)
        marked = np.where(is_fill, marked.dtype.type(np.nan), marked)
    if not found:
        return image
    top, bottom, left, right = find_largest_rectangle(~np.isnan(marked))
    share = (bottom - top) * (right - left) / image.size
    if share < MIN_AREA_SHARE:
        notices += [
            f"{each}, but the largest rectangle without it is {100 * share:.3g} % of the image: "
            "kept, though it takes the contrast. Crop the image, or replace them"
            for each in found
        ]
        return image
    notices += [f"{each}: taken as NaN" for each in found]
    return marked


def _find_fill(image):
    """Return the least or largest value if it is a fill value, else None."""
    sample = take_sample(image)
    for reduce in (np.fmin.reduce, np.fmax.reduce):
        value = reduce(image, axis=None)  # NaN only if all are
        num = np.count_nonzero(image == value)
        others = sample[(sample != value) & np.isfinite(sample)]
        if not np.isfinite(value) or num < FILL_SHARE * image.size or not len(others):
            continue
        # most images end here, before anything of their size is made
        if not _is_far(value, *np.percentile(others.astype(np.float64), (0.1, 99.9))):
            continue
        filled = image.copy()
        filled[(image == value) | (image != image)] = np.sort(others)[len(others) // 2]
        if _is_far(value, *find_range(filled)[:2]):
            return value
    return None


def _is_far(value, low, high) -> bool:
    gap = max(float(low) - float(value), float(value) - float(high))
    return low < high and gap > FILL_GAP * (float(high) - float(low))


def remove_nan(image, notices) -> tuple[np.ndarray, tuple[int, int]]:
    """Return an image without NaN, single dead pixels filled and borders cropped, and its corner.

    The corner is the (row, column) of its first pixel in the image that was given.

    Groups of up to 4 pixels, 0.01 % of the image or 4 pixels in all, become the median of the
    values in the 5 x 5 pixels around them. Else the largest rectangle with values is cropped out.

    Args:
        image: Float [H, W].
        notices: What was done is appended to it.

    Raises:
        Refusal: The rectangle is less than half of the image.
    """
    is_bad = np.isnan(image)
    num_bad = np.count_nonzero(is_bad)
    if not num_bad:
        return image, (0, 0)
    isolated = _find_isolated(is_bad)
    num = len(isolated)
    if 0 < num <= max(MAX_ISOLATED, MAX_ISOLATED_SHARE * image.size):
        image = image.copy()
        image[tuple(isolated.T)] = [_median_around(image, row, col) for row, col in isolated]
        is_bad[tuple(isolated.T)] = np.isnan(image[tuple(isolated.T)])
        notices.append(f"{num} isolated NaN pixels replaced by the median around them")
    if not is_bad.any():
        return image, (0, 0)
    top, bottom, left, right = find_largest_rectangle(np.logical_not(is_bad, out=is_bad))
    share = (bottom - top) * (right - left) / image.size
    height, width = image.shape
    if share < MIN_AREA_SHARE:
        raise Refusal(
            f"{num_bad} pixels are NaN: the largest rectangle without them is {100 * share:.3g} % "
            "of the image. Replace them or crop the image."
        )
    notices.append(
        f"borders of NaN cropped: {bottom - top} x {right - left} of {height} x {width} pixels, "
        f"from row {top} and column {left}"
    )
    return np.ascontiguousarray(image[top:bottom, left:right]), (top, left)


def _find_isolated(is_bad):
    """Return the positions [n, 2] of True pixels in groups of at most `MAX_ISOLATED`."""
    labels, _ = ndimage.label(is_bad, np.ones((3, 3), bool))
    positions = np.argwhere(is_bad)
    groups = labels[is_bad]
    return positions[np.bincount(groups)[groups] <= MAX_ISOLATED]


def _median_around(image, row, col):
    around = image[max(0, row - 2) : row + 3, max(0, col - 2) : col + 3]
    return np.nanmedian(around) if np.isfinite(around).any() else np.nan


def find_largest_rectangle(mask) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) of the largest rectangle of True, the ends exclusive.

    Exact: for each row, the highest column of True above each pixel is widened as far as all
    columns are as high. All pixels of a row are widened at once.

    Args:
        mask: Bool [H, W].
    """
    width = mask.shape[1]
    columns = np.arange(width)
    num_above = np.zeros(width, np.int64)  # rows of True that end at this row
    first = np.zeros(width, np.int64)  # left and right end of the columns as high
    last = np.full(width, width)
    best, rectangle = 0, (0, 0, 0, 0)
    for row, is_valid in enumerate(mask):
        start = np.maximum.accumulate(np.where(is_valid, 0, columns + 1))
        stop = np.minimum.accumulate(np.where(is_valid, width, columns)[::-1])[::-1]
        num_above = np.where(is_valid, num_above + 1, 0)
        first = np.where(is_valid, np.maximum(first, start), 0)
        last = np.where(is_valid, np.minimum(last, stop), width)
        areas = np.where(is_valid, num_above * (last - first), 0)
        i = int(areas.argmax())
        if areas[i] > best:
            best = areas[i]
            rectangle = (row + 1 - int(num_above[i]), row + 1, int(first[i]), int(last[i]))
    return rectangle
