"""Symmetries of the square: a view of a tile is an index, not a copy on disk."""

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
