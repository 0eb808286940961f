"""Masks of defects: inside their boxes, of whole micrographs, and as instance masks."""

import numpy as np

from em_data.micrograph import Defect


def draw_instance_mask(micrograph) -> np.ndarray:
    """Return uint16 [H, W]: 0 for the matrix, k for the k-th defect. Later defects lie on top."""
    if len(micrograph.defects) >= 2**16:
        raise ValueError(
            f"{micrograph.name} has {len(micrograph.defects)} defects, but an instance mask holds "
            "at most 65,535."
        )
    return draw_instances(micrograph.defects, micrograph.image.shape)


def draw_instances(defects, shape) -> np.ndarray:
    """Return the instance mask of defects in an image of `shape` (H, W), uint16 [H, W]."""
    instances = np.zeros(shape, dtype=np.uint16)
    for k, defect in enumerate(defects, start=1):
        instances[draw_whole_mask(defect, instances.shape)] = k
    return instances


def draw_whole_mask(defect: Defect, shape) -> np.ndarray:
    """Return the mask of a defect as bool [H, W] of the micrograph; its box if it has no mask."""
    x0, y0, x1, y1 = defect.box_px
    if defect.mask is not None and defect.mask.shape == shape and (y1 - y0, x1 - x0) != shape:
        return defect.mask
    whole = np.zeros(shape, dtype=bool)
    whole[y0:y1, x0:x1] = True if defect.mask is None else defect.mask
    return whole


def crop_mask(defect: Defect, shape) -> np.ndarray | None:
    """Return the mask of a defect inside its box, bool [y1 - y0, x1 - x0], or None without one.

    shape: (H, W) of the micrograph.
    """
    x0, y0, x1, y1 = defect.box_px
    if defect.mask is None or defect.mask.shape == (y1 - y0, x1 - x0):
        return defect.mask
    if defect.mask.shape != tuple(shape):
        raise ValueError(
            f"the mask of a defect ({defect.kind}) is {list(defect.mask.shape)}, but must be that "
            f"of its box [{y1 - y0}, {x1 - x0}] or of the micrograph {list(shape)}."
        )
    return defect.mask[y0:y1, x0:x1]


def fit_box(box, mask) -> tuple[tuple[int, int, int, int], np.ndarray] | None:
    """Return the least box around the True pixels of a mask inside `box`, and the mask inside it.

    None if there is no True pixel.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    x0, y0 = box[:2]
    return (x0 + left, y0 + top, x0 + right, y0 + bottom), mask[top:bottom, left:right]
