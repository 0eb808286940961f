"""The search for the nearest training view that tries everything: slow twin of
em_evaluation.nearest.
"""

import numpy as np

from em_data.views import ELEMENTS, apply_symmetry
from em_evaluation.nearest import MAX_SHIFT_PX, TileReader
from em_evaluation.nearest import _smooth as smooth_images
from em_evaluation.nearest import _standardise as standardise


def correlate_one_by_one(image, tile, margin):
    """Return what `correlate_by_fft` returns, window by window: its slow twin."""
    inside = image.shape[0] - 2 * margin
    inner = standardise(tile[margin : margin + inside, margin : margin + inside].reshape(1, -1))[0]
    windows = np.stack(
        [
            image[
                margin + down : margin + down + inside, margin + right : margin + right + inside
            ].ravel()
            for down in range(-margin, margin + 1)
            for right in range(-margin, margin + 1)
        ]
    )
    return (standardise(windows) @ inner).reshape(2 * margin + 1, -1)


def correlate_all(image, train, max_shift_px=MAX_SHIFT_PX):
    """Return the highest correlation of one uint8 image [H, W] with every tile under every symmetry
    and shift: the slow twin.
    """
    tiles, smooth = TileReader(train), smooth_images(image[None])[0]
    contents = smooth_images(tiles[np.arange(len(tiles))])
    return max(
        float(correlate_one_by_one(apply_symmetry(smooth, name), content, max_shift_px).max())
        for name in ELEMENTS for content in contents
    )  # fmt: skip
