"""A classical detector of dislocation loops, black dots and dislocation lines.

Background flattening, hysteresis threshold, components, hole filling, ellipses by moments; no
training. `em_evaluation.calibrate_detector` measures how reliable it is.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from em_evaluation.micrograph_statistics import BLOCK, flatten_background, robust_deviation

KINDS = ("loop", "dot", "line")
IN_PLANE_4 = np.stack(
    [np.zeros((3, 3)), ndimage.generate_binary_structure(2, 1), np.zeros((3, 3))]
).astype(bool)
IN_PLANE_8 = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))]).astype(bool)


@dataclass(frozen=True)
class DetectorSettings:
    """The detector's settings, tuned on other micrographs than `calibrate_detector` draws.

    Lengths are in nanometres, or in pixels if the pixel size is unknown; thresholds are in robust
    deviations of the image.

    background: deviation of the bell that flattens. smoothing: of the Gaussian before thresholding.
    low, high: a defect lies above `low` and reaches `high` somewhere (hysteresis, Canny 1986).
    closing: gaps in a ring of up to about twice this are closed. ring: how far around a hole dark
    pixels belong to its loop. smallest: diameter of a disc of the least area. dot: least long side
    of a loop; a dot has less. dot_smoothing, dot_low, dot_high: of the search for dots. line: least
    length of a line; slender: its least length over width.
    """

    background: float = 10.0
    smoothing: float = 1.0
    low: float = 1.6
    high: float = 3.6
    closing: float = 1.5
    ring: float = 9.0
    smallest: float = 3.5
    dot: float = 12.0
    dot_smoothing: float = 1.0
    dot_low: float = 1.7
    dot_high: float = 3.0
    line: float = 60.0
    slender: float = 7.0


@dataclass(frozen=True)
class Defects:
    """Detected defects of a set of images, one entry of each array [D] per defect.

    image: index of its image. kind: index into KINDS. box_px: (y0, x0, y1, x1), the last two
    exclusive. centre_px: (y, x). major, minor: full axes of the ellipse with its second moments,
    filled, in the settings' unit. length: of a line, else the major axis. angle: of the major axis
    in radians [0, pi), from x towards y. is_cut: touches its image's border.
    """

    image: np.ndarray
    kind: np.ndarray
    box_px: np.ndarray
    centre_px: np.ndarray
    major: np.ndarray
    minor: np.ndarray
    length: np.ndarray
    angle: np.ndarray
    is_cut: np.ndarray

    def __len__(self):
        return len(self.image)

    def select(self, mask):
        return Defects(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


def detect_defects(images, pixel_size_nm=None, settings=None) -> Defects:
    """Detect loops, dots and lines on grey images [N, H, W] of any number type.

    Each image is searched by itself, averaged over squares first if pixels are finer than half of
    the unit. A defect that the border cuts is found as far as it is visible, and marked.
    pixel_size_nm None: the settings' lengths are pixels.
    """
    settings = settings or DetectorSettings()
    unit_px = 1.0 if pixel_size_nm is None else 1.0 / pixel_size_nm
    factor = choose_factor(images.shape[1:], pixel_size_nm)
    blocks, scale = [], unit_px / factor
    for start in range(0, max(len(images), 1), BLOCK):
        block = _average(images[start : start + BLOCK], factor)
        objects, num_with_hole = _segment(block, scale, settings)
        blocks.append(_measure(objects, num_with_hole, scale, settings, start))
    names = Defects.__dataclass_fields__
    found = Defects(*(np.concatenate([getattr(each, name) for each in blocks]) for name in names))
    found.box_px[...] *= factor
    found.centre_px[...] = (found.centre_px + 0.5) * factor - 0.5
    return found


def choose_factor(shape, pixel_size_nm=None) -> int:
    """Return the side of the squares over which images (H, W) are averaged before the search."""
    unit_px = 1.0 if pixel_size_nm is None else 1.0 / pixel_size_nm
    return max(1, min(int(unit_px), min(shape) // 16))


def _average(images, factor):
    images = np.asarray(images, np.float32)
    if factor == 1:
        return images
    num, height, width = len(images), images.shape[1] // factor, images.shape[2] // factor
    return (
        images[:, : height * factor, : width * factor]
        .reshape(num, height, factor, width, factor)
        .mean((2, 4))
    )


def _segment(images, unit_px, settings):
    """Return labels int [N, H, W] of separate filled objects; the first `num` ones have a hole."""
    flat = flatten_background(images, settings.background * unit_px)
    dark = _threshold(_smooth(flat, settings.smoothing * unit_px), settings.low, settings.high)
    dark = _close(dark, settings.closing * unit_px)
    least_area = np.pi / 4 * (settings.smallest * unit_px) ** 2
    holes, specks = _find_holes(dark, least_area)
    objects = _separate(dark | specks, holes, round(settings.ring * unit_px))
    large = _longest_axis(objects) >= settings.dot * unit_px
    large[: holes.max() + 1] = True
    large[0] = False
    objects = np.where(large, np.cumsum(large), 0)[objects]
    # dots are searched separately, with a narrower background
    spot = _smooth(flat, settings.dot_smoothing * unit_px) - _smooth(
        flat, settings.dot / 2 * unit_px
    )
    spots = _threshold(
        spot, settings.dot_low, settings.dot_high, ndimage.maximum_filter(objects, (1, 3, 3)) == 0
    )
    spots, num = ndimage.label(spots, IN_PLANE_8)
    area = np.bincount(spots.ravel(), minlength=num + 1)
    is_dot = (area >= least_area) & (_longest_axis(spots) < settings.dot * unit_px)
    is_dot[0] = False
    number = np.where(is_dot, objects.max() + np.cumsum(is_dot), 0)
    return np.where(objects > 0, objects, number[spots]), int(holes.max())


def _smooth(images, sigma):
    return ndimage.gaussian_filter(images, (0, sigma, sigma), truncate=3)


def _threshold(images, low, high, mask=True):
    """Return what lies above `low` robust deviations of its image and reaches `high`."""
    images = images / np.maximum(robust_deviation(images), 1e-3)
    labels, num = ndimage.label((images > low) & mask, IN_PLANE_8)
    strong = np.zeros(num + 1, bool)
    strong[labels[(images > high) & mask]] = True
    strong[0] = False
    return strong[labels]


def _longest_axis(labels):
    """Return the longest side of the box of each label in pixels, from label 0."""
    sides = [0] + [
        0 if box is None else max(s.stop - s.start for s in box[1:])
        for box in ndimage.find_objects(labels)
    ]
    return np.array(sides)


def _close(dark, radius):
    """Close gaps of up to about twice `radius` pixels by a disc, image by image."""
    reach = int(radius)
    if reach < 1:
        return dark
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (x**2 + y**2 <= radius**2)[None]
    padded = np.pad(dark, ((0, 0), (reach, reach), (reach, reach)))
    return ndimage.binary_closing(padded, disc)[:, reach:-reach, reach:-reach] | dark


def _find_holes(dark, least_area):
    """Return labels of large islands that dark pixels enclose, and a mask of the small ones."""
    labels, num = ndimage.label(~dark, IN_PLANE_4)
    is_island = np.ones(num + 1, bool)
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        is_island[edge] = False
    is_island[0] = False
    area = np.bincount(labels.ravel(), minlength=num + 1)
    is_hole = is_island & (area >= least_area)
    number = np.where(is_hole, np.cumsum(is_hole), 0)
    return number[labels], (is_island & ~is_hole)[labels]


def _separate(dark, holes, num_steps):
    """Return labels: each hole with the ring around it, and what is left of the dark.

    Holes grow `num_steps` pixels into the dark, by the four and the eight neighbours in turn.
    """
    objects = holes.copy()
    for step in range(num_steps):
        footprint = IN_PLANE_4 if step % 2 else IN_PLANE_8
        grown = ndimage.grey_dilation(objects, footprint=footprint[1:2])
        objects = np.where((objects == 0) & dark, grown, objects)
    labels, _ = ndimage.label(dark & (objects == 0), IN_PLANE_8)
    return np.where(objects > 0, objects, np.where(labels > 0, labels + holes.max(), 0))


def _measure(objects, num_with_hole, unit_px, settings, first_image):
    """Return the Defects of labels [N, H, W]: ellipses by second moments, boxes, kinds."""
    height, width = objects.shape[1:]
    image, y, x = np.nonzero(objects)
    label = objects[image, y, x]
    used, label = np.unique(label, return_inverse=True)
    num = len(used)

    def total(values):
        return np.bincount(label, values, minlength=num)

    area = np.bincount(label, minlength=num)
    centre_y, centre_x = total(y) / area, total(x) / area
    dy, dx = y - centre_y[label], x - centre_x[label]
    # 1 / 12 of whole pixels
    yy, xx, xy = (
        total(dy * dy) / area + 1 / 12,
        total(dx * dx) / area + 1 / 12,
        total(dx * dy) / area,
    )
    mean, half = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    major = 4 * np.sqrt(mean + half) / unit_px
    minor = 4 * np.sqrt(np.maximum(mean - half, 0)) / unit_px
    angle = (0.5 * np.arctan2(2 * xy, xx - yy)) % np.pi
    boxes = [each for each in ndimage.find_objects(objects) if each]
    sides = ((i.start, y.start, x.start, y.stop, x.stop) for i, y, x in boxes)
    first, *box = np.array([*sides], int).reshape(-1, 5).T
    box = np.stack(box, 1)
    is_cut = (box[:, :2] == 0).any(1) | (box[:, 2] == height) | (box[:, 3] == width)
    # unlike that of an ellipse, the width of a wavy line follows from its area
    diagonal = np.hypot(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]) / unit_px
    length = np.maximum(diagonal, major * 0.866)
    mean_width = area / unit_px**2 / length
    is_line = (
        (used > num_with_hole)
        & (length >= settings.line)
        & (length / mean_width >= settings.slender)
    )
    is_dot = ~is_line & (major < settings.dot)
    loop, dot, line = range(len(KINDS))
    kind = np.select([is_line, is_dot], [line, dot], loop)
    length = np.where(is_line, length, major)
    centre = np.stack([centre_y, centre_x], 1)
    image = first + first_image
    found = Defects(image, kind, box, centre, major, minor, length, angle, is_cut)
    return found.select(np.argsort(found.image, kind="stable"))


# ---------------------------------------------------------------- what their numbers say


def count_weights(defects, shape, pixel_size_nm=None) -> np.ndarray:
    """Return how much each defect counts [D]: 0 if the border cuts it.

    A defect wholly inside an image of `shape` (H, W) counts H W / ((H - h - f) (W - w - f)), with
    h, w the sides of its box and f that of the averaged squares: the larger it is, the fewer places
    it has. Numbers and sizes are then unbiased for any size of image (Miles 1974; Lantuéjoul 1980).
    """
    factor, box = choose_factor(shape, pixel_size_nm), defects.box_px
    height, width = (side // factor * factor for side in shape)  # that were searched
    places = (height - (box[:, 2] - box[:, 0]) - factor) * (
        width - (box[:, 3] - box[:, 1]) - factor
    )
    whole = ~defects.is_cut & (places > 0)
    return np.where(whole, shape[0] * shape[1] / np.where(whole, places, 1), 0.0)


def sum_by_image(defects, kind, values, num_images) -> np.ndarray:
    """Return the sum of `values` [D] of one kind of defect in each image [num_images]."""
    mine = defects.kind == KINDS.index(kind)
    return np.bincount(defects.image[mine], values[mine], minlength=num_images)


def histogram_by_image(defects, mine, values, weights, edges, num_images) -> np.ndarray:
    """Return the weighted histogram of `values` [D] in each image [num_images, bins]."""
    bins = np.clip(np.searchsorted(edges, values[mine], "right") - 1, 0, len(edges) - 2)
    flat = defects.image[mine] * (len(edges) - 1) + bins
    return np.bincount(flat, weights[mine], minlength=num_images * (len(edges) - 1)).reshape(
        num_images, -1
    )
