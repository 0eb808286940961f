"""Defects cut from labelled images, and pasted into others."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from em_data.labels import draw_whole_mask
from em_data.labels.masks import fit_box
from em_data.micrograph import Defect

MARGIN_PX = 5  # around a defect that is copied with it
SOLID_PX = 1.5  # of these, as opaque as the defect
CLEAR_PX = 4  # around other defects, which are not copied: opacity rises from 0 over so many pixels
FEW_ALONE = 5
RING_PX = 3  # outermost pixels of a window, which tell what is behind


@dataclass(frozen=True, eq=False)
class Instance:
    """A defect in a window of its own.

    pixels: float32 [h, w], less the grey level around the defect. opacity: float32 [h, w], 1 on the
    defect, falling to 0 at the border of the window. mask: bool [h, w]. is_alone: whether no other
    defect touches it; others leave hard edges.
    """

    kind: str
    pixels: np.ndarray
    opacity: np.ndarray
    mask: np.ndarray
    is_alone: bool = True

    def turn(self, symmetry: int) -> "Instance":
        """Return the instance under symmetry 0 to 7: quarter turns, the last four mirrored."""

        def apply(array):
            turned = np.rot90(array, symmetry % 4)
            return np.ascontiguousarray(turned[:, ::-1] if symmetry >= 4 else turned)

        pixels, opacity, mask = map(apply, (self.pixels, self.opacity, self.mask))
        return replace(self, pixels=pixels, opacity=opacity, mask=mask)


def collect_instances(image: np.ndarray, layout: Sequence[Defect]) -> list[Instance]:
    """Return the defects of an image [H, W] that keep clear of its border.

    Other defects in a window are transparent, so that they are not copied without a label. Defects
    that others cover to more than a third are left out.
    """
    masks = [draw_whole_mask(defect, image.shape) for defect in layout]
    covered = np.sum(masks, axis=0) if masks else None
    found = []
    for defect, mask in zip(layout, masks):
        x0, y0, x1, y1 = defect.box_px
        x0, y0, x1, y1 = x0 - MARGIN_PX, y0 - MARGIN_PX, x1 + MARGIN_PX, y1 + MARGIN_PX
        if x0 < 0 or y0 < 0 or x1 > image.shape[1] or y1 > image.shape[0] or not mask.any():
            continue
        window = np.s_[y0:y1, x0:x1]
        others = (covered - mask)[window] > 0
        inside, pixels = mask[window], image[window].astype(np.float32)
        if (others & inside).sum() > inside.sum() / 3:
            continue
        distance = ndimage.distance_transform_edt(~inside)
        opacity = np.clip((MARGIN_PX - distance) / (MARGIN_PX - SOLID_PX), 0, 1)
        if others.any():
            apart = ndimage.distance_transform_edt(~others)
            opacity = np.where(inside, opacity, opacity * np.clip((apart - 1) / CLEAR_PX, 0, 1))
        ring = (distance > MARGIN_PX - RING_PX) & ~others
        behind = np.median(pixels[ring]) if ring.any() else np.median(pixels)
        is_alone = not (others & (distance <= SOLID_PX)).any()
        pixels, opacity = pixels - behind, opacity.astype(np.float32)
        found.append(Instance(defect.kind, pixels, opacity, inside.copy(), is_alone))
    return found


def choose_instances(found: Sequence[Instance]) -> list[Instance]:
    """Return the instances that are alone, but all of a kind that has few of these."""
    alone = Counter(each.kind for each in found if each.is_alone)
    return [each for each in found if each.is_alone or alone[each.kind] < FEW_ALONE]


def paste(image: np.ndarray, instance: Instance, centre: tuple[float, float]) -> Defect | None:
    """Paste an instance into image [H, W] in place, on the grey level that is there.

    Args:
        centre: (y, x) of the middle of its window.

    Returns:
        The defect as it lies in the image; None if it is outside.
    """
    height, width = instance.mask.shape
    top, left = round(centre[0] - height / 2), round(centre[1] - width / 2)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + height, image.shape[0]), min(left + width, image.shape[1])
    if y0 >= y1 or x0 >= x1:
        return None
    seen = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    fitted = fit_box((x0, y0, x1, y1), instance.mask[seen])
    if fitted is None:
        return None
    place, opacity = image[y0:y1, x0:x1], instance.opacity[seen]
    place += opacity * (np.median(place) + instance.pixels[seen] - place)
    np.clip(place, -1, 1, out=place)
    return Defect(instance.kind, fitted[0], fitted[1].copy())
