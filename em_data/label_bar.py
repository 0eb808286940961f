"""Find the bar with scale and text that scanning microscopes burn into the bottom of an image."""

import numpy as np

from em_data.spikes import iterate_slabs

MIN_SHARE, MAX_SHARE = 0.015, 0.25  # of the image's height


def find_label_bar(image) -> int:
    """Return the number of rows of a label bar at the bottom of an image, or 0 if there is none.

    A bar is a band of rows across the whole width on a flat ground. The rows above it hold hardly
    any pixel of the ground's exact grey level, and its first rows hardly any other. A dark or
    saturated region of the specimen has no such straight upper edge.

    Args:
        image: uint8 or uint16 [H, W].
    """
    height, width = image.shape
    if height < 32 or width < 32:
        return 0
    band = image[int(height * (1 - MAX_SHARE)) - 16 :]
    num_rows = _find_sharp(band, height, image.dtype)
    if image.dtype != np.uint8:
        return num_rows
    num_rows = num_rows or _find_blurred(band, height)
    return num_rows + _count_blurred_lines(band[: len(band) - num_rows][-24:]) if num_rows else 0


def _find_sharp(band, height, dtype):
    """Find a bar whose ground has exactly one grey level."""
    tolerance = 0 if dtype == np.uint16 else 3
    ground = int(_count_levels(band[-max(4, int(height * MIN_SHARE)) :]).argmax())
    share = _find_shares(band, ground, tolerance)
    is_line = _find_shares(band, band[:, :1], tolerance) > 0.98
    top, gap = len(band), 0
    for row in range(len(band) - 1, -1, -1):
        if share[row] >= 0.3 or is_line[row]:
            top, gap = row, 0
        else:
            gap += 1
            if gap > 2:
                break
    num_rows = len(band) - top
    if top < 16 or num_rows < max(6, MIN_SHARE * height):
        return 0
    edge = slice(top, top + 3)
    is_flat = np.all((share[edge] > 0.9) | is_line[edge]) and share[top:].mean() > 0.5
    is_new = share[top - 8 : top].mean() < 0.1 and np.all(share[top - 2 : top] < 0.3)
    return num_rows if is_flat and is_new else 0


def _count_levels(band):
    """Return how many pixels have each grey level, from 0 to the largest of the type."""
    num_levels = np.iinfo(band.dtype).max + 1
    return sum(
        np.bincount(band[rows].ravel(), minlength=num_levels) for rows in iterate_slabs(band)
    )


def _find_shares(band, levels, tolerance):
    """Return the share of each row's pixels within a tolerance of a level, or of one per row."""
    levels = np.broadcast_to(np.int32(levels), (len(band), 1))
    shares = np.empty(len(band))
    for rows in iterate_slabs(band):
        difference = band[rows] - levels[rows]
        shares[rows] = (np.abs(difference, out=difference) <= tolerance).mean(axis=1)
    return shares


def _find_blurred(band, height):
    """Find a bar in an image that was compressed by JPEG, which blurs its edge and its text.

    In blocks of 8 x 8 pixels that hold neither edge nor text, the ground still has one level. The
    bar begins where the shares of the rows' pixels near this level, less a threshold, have the
    largest sum.
    """
    levels = _count_levels(band[-16:])
    ground = int(np.convolve(levels, np.ones(3), "same").argmax())
    distance = np.median(np.abs(band[:16].astype(np.int32) - ground))  # micrograph from ground
    share = _find_shares(band, ground, np.clip(distance / 2, 2, 12))
    threshold = (np.median(share[:16]) + 0.85) / 2
    top = int(np.cumsum((share - threshold)[::-1])[::-1].argmax())
    num_rows = len(band) - top
    if top < 16 or num_rows < max(6, MIN_SHARE * height):
        return 0
    edge, above = share[top : top + 3], share[top - 16 : top]
    is_flat = edge.mean() > 0.75 and share[top:].mean() > 0.5
    is_new = above.max() < 0.6 and edge.min() > 1.5 * above[-2:].max()
    return num_rows if is_flat and is_new else 0


def _count_blurred_lines(rows):
    """Return the number of rows, at the end of these, of a drawn line that JPEG has blurred."""
    medians = np.median(rows, axis=1)
    spread = np.mean(np.abs(rows - medians[:, None]), axis=1)
    others = slice(-24, -8)
    contrast = max(3.0, np.median(spread[others]))
    is_line = spread < contrast / 3
    departs = np.abs(medians - np.median(medians[others])) > 6 * contrast
    is_line |= departs & (spread < 2 * contrast)
    return int(np.cumprod(is_line[:-5:-1]).sum())
