"""Labelled images as the detector sees them: grey levels, targets and instances to paste."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from em_data.micrograph import Defect

CORE = 0.5  # the core of a defect: at least this share of its greatest distance from its outline
RING_PX = 3  # pixels around a defect that are pasted with it
LEAST_PASTED_PX = 6  # area of the smallest defect that is pasted


@dataclass(eq=False)
class LabelledImage:
    """One image with its defects.

    Args:
        image: uint8 or uint16 [H, W].
        defects: Boxes and masks in pixels of this image.
        name: Name of the image.
        micrograph: The micrograph that the image is a part of; labels are counted in micrographs.
        specimen: Specimen (or another group that was drawn independently) of the micrograph.
        pixel_size_nm: Side of a pixel in nm; None if unknown.
    """

    image: np.ndarray
    defects: list[Defect]
    name: str
    micrograph: str
    specimen: str
    pixel_size_nm: float | None = None

    @cached_property
    def levels(self) -> np.ndarray:
        """Grey levels of mean 0 and deviation 1, float32 [H, W]; outliers are clipped."""
        levels = self.image.astype(np.float32)
        low, high = np.percentile(levels, (0.5, 99.5)).tolist()
        levels = np.clip(levels, low, high)
        return (levels - levels.mean()) / max(float(levels.std()), 1e-6)


@dataclass(eq=False)
class Instance:
    """A defect cut out for pasting, with a ring of its surroundings."""

    kind: int  # index into the kinds
    contrast: np.ndarray  # float32 [h, w], grey levels less the median of the ring
    mask: np.ndarray  # bool [h, w]
    core: np.ndarray  # bool [h, w]
    weight: np.ndarray  # float32 [h, w], how much the pixels replace those below, 0 to 1


def get_mask(defect: Defect) -> np.ndarray:
    """Return the mask of a defect inside its box; all of the box if it has no mask."""
    x0, y0, x1, y1 = defect.box_px
    if defect.mask is None:
        return np.ones((y1 - y0, x1 - x0), bool)
    if defect.mask.shape != (y1 - y0, x1 - x0):
        return defect.mask[y0:y1, x0:x1]
    return defect.mask


def find_core(mask: np.ndarray) -> np.ndarray:
    """Return the inner part of a mask, bool [h, w]; cores of touching defects do not touch.

    A border of the array does not count as an outline when the mask reaches it.
    """
    padded = np.pad(mask, 1)
    distance = ndimage.distance_transform_edt(padded)[1:-1, 1:-1]
    return distance > CORE * distance.max()


def draw_targets(shape, defects: Sequence[Defect], kinds: Sequence[str]) -> np.ndarray:
    """Return what the network learns, float32 [2 K, H, W] of 0 and 1: masks, then cores, by kind.

    Defects of other kinds are not drawn.
    """
    targets = np.zeros((2, len(kinds), *shape), np.float32)
    for defect in defects:
        if defect.kind not in kinds:
            continue
        k, mask = kinds.index(defect.kind), get_mask(defect)
        x0, y0, x1, y1 = defect.box_px
        targets[0, k, y0:y1, x0:x1][mask] = 1
        targets[1, k, y0:y1, x0:x1][mask] = find_core(mask)[mask]
    return targets.reshape(-1, *shape)


def cut_instances(labelled: LabelledImage, kinds: Sequence[str]) -> list[Instance]:
    """Cut out the defects of an image that have a mask and keep clear of the border."""
    height, width = labelled.image.shape
    instances = []
    for defect in labelled.defects:
        x0, y0, x1, y1 = np.array(defect.box_px) + (-RING_PX, -RING_PX, RING_PX, RING_PX)
        if defect.mask is None or defect.kind not in kinds:
            continue
        mask = np.pad(get_mask(defect), RING_PX)
        if min(x0, y0) < 0 or x1 > width or y1 > height or mask.sum() < LEAST_PASTED_PX:
            continue
        near = ndimage.binary_dilation(mask, iterations=2)
        weight = ndimage.gaussian_filter(near.astype(np.float32), 1.0)
        weight[mask] = 1
        levels = labelled.levels[y0:y1, x0:x1]
        contrast = levels - np.median(levels[~mask])
        kind = kinds.index(defect.kind)
        instances.append(Instance(kind, contrast, mask, find_core(mask), weight))
    return instances
