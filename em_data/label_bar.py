"""Find the bar with scale and text that scanning microscopes burn into the bottom of an image."""

import numpy as np

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
    band = image[int(height * (1 - MAX_SHARE)) - 16 :].astype(np.int32)
    tolerance = 0 if image.dtype == np.uint16 else 3  # JPEG compression blurs a flat ground
    ground = int(np.bincount(band[-max(4, int(height * MIN_SHARE)) :].ravel()).argmax())
    share = (np.abs(band - ground) <= tolerance).mean(axis=1)  # [rows] of the ground's level
    is_line = (np.abs(band - band[:, :1]) <= tolerance).mean(axis=1) > 0.98
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
