"""From labels as files hold them to defects in the pixels of a micrograph."""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from em_data.labels.masks import fit_box
from em_data.micrograph import IS_CUT, Defect, Micrograph

BEYOND_PX = 1.0  # so far beyond the border, a label is cut off without a word


class BadLabels(ValueError):
    """The labels of one micrograph cannot be used: the reason and a remedy, without its name."""


@dataclass(eq=False)
class Annotation:
    """One label, in pixels of the whole image as the file stores it.

    Args:
        kind: Name of its kind.
        where: What messages call it, such as "annotation 17" or "line 3".
        box: (x0, y0, x1, y1), used where there are neither polygons nor a mask.
        polygons: Float [n, 2] each, corners (x, y); pixel 0 reaches from 0 to 1.
        mask: Bool, the pixels inside `mask_box` (x0, y0, x1, y1). `take_mask` sets both.
        mask_shape: (H, W) of the mask of the whole image that the file holds, or None.
        sizes_nm: Diameter and length in nm, or None.
        metadata: Anything else.
    """

    kind: str
    where: str
    box: tuple | None = None
    polygons: list[np.ndarray] = field(default_factory=list)
    mask: np.ndarray | None = None
    mask_box: tuple | None = None
    mask_shape: tuple | None = None
    sizes_nm: tuple = (None, None)
    metadata: dict = field(default_factory=dict)

    def take_mask(self, whole: np.ndarray) -> None:
        """Keep what is True of the mask of the whole image, bool [H, W]."""
        self.mask_shape = whole.shape
        box, mask = fit_box((0, 0), whole) or ((0, 0, 0, 0), np.empty((0, 0), bool))
        self.mask_box, self.mask = box, mask.copy()


def read_sizes(fields, where: str) -> tuple[float | None, float | None]:
    """Return the `diameter_nm` and `length_nm` among the fields of a label, None where unknown."""
    sizes = [fields.get("diameter_nm"), fields.get("length_nm")]
    for each in sizes:
        if each is not None and not (isinstance(each, int | float) and math.isfinite(each)):
            raise BadLabels(f"{where} has the size {each!r} nm, which is no number. Correct it.")
    diameter_nm, length_nm = (None if each is None else float(each) for each in sizes)
    return diameter_nm, length_nm


def place(
    annotations, micrograph: Micrograph, stated_shape=None, *, is_turned: bool = False
) -> list[Defect]:
    """Return the defects of a micrograph that annotations describe; say what is cut off or dropped.

    Coordinates follow the pixels: what lies in a cropped label bar or border is cut off. Notices
    of the micrograph count the labels without an area, outside, cut off, turned and thinner than a
    pixel.

    Args:
        annotations: `Annotation`s.
        micrograph: Its metadata have "full_shape" and "corner_px" if it was cropped.
        stated_shape: (H, W) of the image by the labels, or None.
        is_turned: Whether the labels were turned by an orientation tag of their own.

    Raises:
        BadLabels: The labels are of an image of another size, or have impossible coordinates.
    """
    full_shape = tuple(micrograph.metadata.get("full_shape", micrograph.image.shape))
    if "frame" in micrograph.metadata:
        raise BadLabels("a stack of frames. Save each frame to a file of its own, with its labels.")
    if stated_shape is not None and tuple(stated_shape) != full_shape:
        raise BadLabels(
            f"they are of an image of {stated_shape[0]} x {stated_shape[1]} pixels, but the image "
            f"has {full_shape[0]} x {full_shape[1]}. Export labels and image in one size."
        )
    orientation = micrograph.metadata.get("orientation", 1)
    is_clear = orientation >= 5 and stated_shape is not None and full_shape[0] != full_shape[1]
    if orientation != 1 and not (is_turned or is_clear):
        raise BadLabels(
            f"the image is turned by its orientation tag ({orientation}), but the labels do not "
            "tell whether they are. Save the image without this tag, as the labels show it."
        )
    top, left = micrograph.metadata.get("corner_px", (0, 0))
    height, width = micrograph.image.shape
    defects, told = [], Counter()
    for each in annotations:
        drawn = _draw(each, full_shape, told)
        if drawn is None:
            continue
        (x0, y0, x1, y1), mask = drawn
        x0, y0, x1, y1 = x0 - left, y0 - top, x1 - left, y1 - top
        box = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        fitted = None
        if box[0] < box[2] and box[1] < box[3]:
            inside = np.s_[box[1] - y0 : box[3] - y0, box[0] - x0 : box[2] - x0]
            fitted = (box, None) if mask is None else fit_box(box, mask[inside])
        if fitted is None:
            told["not used: they lie in what was cropped from the image"] += 1
            continue
        diameter_nm, length_nm = each.sizes_nm
        metadata = each.metadata | ({IS_CUT: True} if box != (x0, y0, x1, y1) else {})
        box, mask = fitted
        defects.append(Defect(each.kind, box, mask, diameter_nm, length_nm, metadata))
    notices = micrograph.metadata.setdefault("notices", [])
    notices += [f"{num} of {len(annotations)} labels {what}" for what, num in told.items()]
    return defects


def _draw(annotation, shape, told):
    """Return (box in whole pixels, mask inside it or None) in an image of `shape`, or None."""
    if annotation.mask is not None:
        stated = annotation.mask_shape
        if stated is not None and stated != shape:
            raise BadLabels(
                f"{annotation.where} has a mask of {stated[0]} x {stated[1]} pixels, but the image "
                f"has {shape[0]} x {shape[1]}. Export labels and image in one size."
            )
        drawn = fit_box(annotation.mask_box, annotation.mask)
        if drawn is None:
            told["not used: their masks are empty"] += 1
        return drawn
    if annotation.polygons:
        return _draw_polygons(annotation, shape, told)
    if annotation.box is None:
        told["not used: they have neither a box nor an outline"] += 1
        return None
    x0, y0, x1, y1 = _check_numbers(annotation.box, annotation)
    if x1 < x0 or y1 < y0:
        told["turned round: their corners are reversed"] += 1
        x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    if x0 == x1 or y0 == y1:
        told["not used: they have no area"] += 1
        return None
    if not _reaches_in((x0, y0, x1, y1), shape, told):
        return None
    rounded = []
    for low, high, length in ((x0, x1, shape[1]), (y0, y1, shape[0])):
        start = min(max(round(low), 0), length - 1)
        rounded.append((start, min(max(round(high), start + 1), length)))
    (x0, x1), (y0, y1) = rounded
    return (x0, y0, x1, y1), None


def _draw_polygons(annotation, shape, told):
    polygons = [_check_numbers(each, annotation) for each in annotation.polygons]
    polygons = [each for each in polygons if len(each) >= 3 and np.ptp(each, axis=0).any()]
    if not polygons:
        told["not used: they have no area"] += 1
        return None
    points = np.concatenate(polygons)
    extent = *points.min(axis=0), *points.max(axis=0)
    if not _reaches_in(extent, shape, told):
        return None
    limits = np.array(shape[::-1])
    x0, y0 = np.clip(np.floor(points.min(axis=0)), 0, limits - 1).astype(int).tolist()
    x1, y1 = np.clip(np.ceil(points.max(axis=0)), (x0 + 1, y0 + 1), limits).astype(int).tolist()
    mask = np.zeros((y1 - y0, x1 - x0), bool)
    for each in polygons:
        mask |= fill_polygon(each - (x0, y0), mask.shape)
    if not mask.any():
        told["thinner than a pixel: one pixel is kept"] += 1
        x, y = (points.mean(axis=0) - (x0, y0)).clip(0, (x1 - x0 - 1, y1 - y0 - 1)).astype(int)
        mask[y, x] = True
    return fit_box((x0, y0, x1, y1), mask)


def fill_polygon(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return bool [H, W]: the pixels whose centres lie inside a polygon, by the even-odd rule.

    Args:
        points: Float [n, 2], corners (x, y); the centre of the first pixel is (0.5, 0.5).
        shape: (H, W).
    """
    height, width = shape
    mask, columns = np.zeros(shape, bool), np.arange(width) + 0.5
    for (x, y), (x_next, y_next) in zip(points.tolist(), np.roll(points, -1, axis=0).tolist()):
        if y == y_next:
            continue
        low, high = (np.clip(np.ceil(each - 0.5), 0, height) for each in sorted((y, y_next)))
        rows = np.arange(int(low), int(high))
        crossing = x + (rows + 0.5 - y) * ((x_next - x) / (y_next - y))
        mask[rows] ^= columns > crossing[:, None]
    return mask


def _check_numbers(numbers, annotation):
    numbers = np.asarray(numbers, np.float64)
    if not np.isfinite(numbers).all():
        raise BadLabels(f"{annotation.where} has a coordinate that is no number. Correct it.")
    return numbers


def _reaches_in(extent, shape, told):
    """Return True if an extent reaches into an image; count what lies outside or reaches beyond."""
    x0, y0, x1, y1 = extent
    height, width = shape
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        told[f"not used: they lie outside of the image of {height} x {width} pixels"] += 1
        return False
    if min(x0, y0) < -BEYOND_PX or x1 > width + BEYOND_PX or y1 > height + BEYOND_PX:
        told["reach beyond the image: cut off at its border"] += 1
    return True
