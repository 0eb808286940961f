"""Pictures of images with the outlines of their defects."""

from collections.abc import Iterable

import numpy as np

from em_data.micrograph import Defect
from em_evaluation.detector.labelled import LabelledImage, get_mask

FOUND, MISSED, INVENTED = "#00c896", "#ff9500", "#ff4fd8"
COLOURS = {"found": FOUND, "missed": MISSED, "invented": INVENTED}


def to_display(image: np.ndarray) -> np.ndarray:
    """Return grey levels stretched to uint8 [H, W]."""
    low, high = np.percentile(image, (0.5, 99.5))
    scaled = (image.astype(np.float64) - low) / max(high - low, 1e-9)
    return (255 * scaled.clip(0, 1)).round().astype(np.uint8)


def draw_outlines(
    image: np.ndarray, outlined: Iterable[tuple[str, Iterable[Defect]]], scale: int = 4
) -> np.ndarray:
    """Return an image enlarged `scale` times with thin outlines, uint8 [scale H, scale W, 3].

    Args:
        image: uint8 or uint16 [H, W].
        outlined: (colour as #rrggbb, defects) pairs; later ones lie on top.
        scale: A whole factor.
    """
    picture = np.repeat(np.repeat(to_display(image), scale, 0), scale, 1)
    picture = np.stack([picture] * 3, -1)
    for colour, defects in outlined:
        levels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        for defect in defects:
            x0, y0 = defect.box_px[:2]
            mask = np.pad(get_mask(defect), 1)
            mask = np.repeat(np.repeat(mask, scale, 0), scale, 1)
            inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1]
            inner &= mask[1:-1, :-2] & mask[1:-1, 2:]
            y, x = np.nonzero(mask[1:-1, 1:-1] & ~inner)
            y, x = y + 1 + (y0 - 1) * scale, x + 1 + (x0 - 1) * scale
            inside = (y >= 0) & (x >= 0) & (y < picture.shape[0]) & (x < picture.shape[1])
            picture[y[inside], x[inside]] = levels
    return picture


def draw_kinds(labelled: LabelledImage, colours: dict[str, str], scale: int = 4) -> np.ndarray:
    """Return an image with the outlines of its labels in the colours of their kinds."""
    by_kind = [
        (colour, [d for d in labelled.defects if d.kind == k]) for k, colour in colours.items()
    ]
    return draw_outlines(labelled.image, by_kind, scale)


def join(pictures: list[np.ndarray], num_columns: int, gap: int = 6) -> np.ndarray:
    """Return pictures [H, W, 3] of one size side by side, with transparent gaps, [.., .., 4]."""
    height, width = pictures[0].shape[:2]
    num_rows = -(-len(pictures) // num_columns)
    shape = (num_rows * (height + gap) - gap, num_columns * (width + gap) - gap, 4)
    sheet = np.zeros(shape, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // num_columns) * (height + gap), (i % num_columns) * (width + gap)
        sheet[top : top + height, left : left + width, :3] = picture[:height, :width]
        sheet[top : top + height, left : left + width, 3] = 255
    return sheet
