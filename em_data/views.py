"""Symmetries of the square: a view of a tile is an index, not a copy on disk."""

import hashlib

import numpy as np

from em_data.spikes import iterate_slabs

# Each element of D4 is: transpose or not, then turn the rows upside down or not, then the columns.
ELEMENTS = {
    "identity": (False, False, False),
    "turn_90": (True, True, False),  # counter-clockwise, as np.rot90
    "turn_180": (False, True, True),
    "turn_270": (True, False, True),
    "flip_columns": (False, False, True),  # left becomes right
    "flip_rows": (False, True, False),  # top becomes bottom
    "transpose": (True, False, False),
    "anti_transpose": (True, True, True),
}

SYMMETRIES = {
    "none": ("identity",),
    "paper": ("identity", "turn_90", "turn_180", "turn_270", "flip_columns", "flip_rows"),
    "d4": tuple(ELEMENTS),
}


def apply_symmetry(image, name):
    """Return an array [..., H, W] under the named symmetry, as a view without a copy."""
    transpose, flip_rows, flip_columns = ELEMENTS[name]
    if transpose:
        image = image.swapaxes(-1, -2)
    if flip_rows:
        image = image[..., ::-1, :]
    if flip_columns:
        image = image[..., ::-1]
    return image


def hash_pixels(image) -> str:
    """Return a hash of an image [H, W] that its rotated and flipped copies share.

    It is the hash of one view in a normal position: the view whose sums over rows and columns come
    first in order or, of several such views, the one with the least hash.
    """
    rows, columns = image.sum(axis=1, dtype=np.int64), image.sum(axis=0, dtype=np.int64)
    profiles = {}
    for name, (transpose, flip_rows, flip_columns) in ELEMENTS.items():
        down, across = (columns, rows) if transpose else (rows, columns)
        down, across = down[::-1] if flip_rows else down, across[::-1] if flip_columns else across
        profiles[name] = (len(down), down.tolist(), across.tolist())
    first = min(profiles.values())
    digests = []
    for name in (name for name, profile in profiles.items() if profile == first):
        view = apply_symmetry(image, name)
        digest = hashlib.blake2b(repr((view.shape, view.dtype.str)).encode(), digest_size=16)
        for part in iterate_slabs(view):
            digest.update(np.ascontiguousarray(view[part]).data)
        digests.append(digest.hexdigest())
    return min(digests)
