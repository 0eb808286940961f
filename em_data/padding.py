"""Padding: what lies around the pixels of a mosaic or of a shifted frame."""

from itertools import pairwise

import numpy as np

MIN_ROWS, MIN_DEPTH = 16, 4  # of a strip of padding in pixels, along the border and away from it


def find_padding(image: np.ndarray) -> np.ndarray | None:
    """Return where an image is padding, bool [H, W], or None if it is so nowhere.

    Padding begins at the border of the image, has one grey level, and ends at a straight edge along
    the rows or columns. Dark or saturated regions of a specimen have no such edges.

    Args:
        image: uint8 or uint16 [H, W].
    """
    padding = None
    for turns in range(4):
        for start, stop, depth in _find_strips(np.rot90(image, turns)):
            if padding is None:
                padding = np.zeros(image.shape, bool)
            np.rot90(padding, turns)[start:stop, :depth] = True
    return padding


def _find_strips(image):
    """Yield (first row, last row + 1, depth) of strips of padding at the left border."""
    height, width = image.shape
    if width < MIN_DEPTH or height < MIN_ROWS:
        return
    level, depth = image[:, 0], np.zeros(height, np.int64)
    rows = np.flatnonzero((image[:, :MIN_DEPTH] == level[:, None]).all(axis=1))
    for part in np.array_split(rows, len(rows) // 1024 + 1):
        differs = image[part] != level[part, None]
        depth[part] = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
    for row in np.flatnonzero(depth == width).tolist():
        yield row, row + 1, width
    if len(rows) < MIN_ROWS:
        return
    # pixels beside the edge may have the level by chance
    depth = np.where(depth > 0, _find_least(depth), 0)
    is_new = (np.diff(depth) != 0) | (np.diff(level.astype(np.int32)) != 0)
    bounds = [0, *(np.flatnonzero(is_new) + 1).tolist(), height]
    for start, stop in pairwise(bounds):
        here = depth[start]
        beside = [depth[i] for i in (start - 1, stop) if 0 <= i < height]
        is_straight = all(abs(each - here) >= MIN_DEPTH for each in beside)
        if here >= MIN_DEPTH and stop - start >= MIN_ROWS and is_straight:
            yield start, stop, int(here)


def _find_least(depth):
    """Return the least depth of five rows around each row, among rows that have any."""
    large = np.where(depth > 0, depth, np.iinfo(np.int64).max)
    around = np.stack([np.roll(np.pad(large, 2, mode="edge"), i) for i in range(-2, 3)])
    return around.min(axis=0)[2:-2]
