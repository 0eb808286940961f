"""How labelled defects look, and what lies behind them: measured on labelled images, drawn again.

Both need no simulator of the material. Images are float32 [H, W] in [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from em_data.labels import draw_whole_mask
from em_data.micrograph import Defect

REACH_PX = 6  # beyond the outline of a defect, where it may still be seen
DEPTH_PX = 24  # inside the outline; deeper pixels are taken to look alike
RING_PX = (REACH_PX, REACH_PX + 5)  # around a defect, which tells what is behind it
SOFT_PX = 0.7  # deviation of the blur that hides the steps of an outline
GROUND_PX = 6.0  # deviation of the blur that leaves the ground


@dataclass(frozen=True, eq=False)
class Appearance:
    """The mean contrast of each kind by the distance from the outline, and how it varies.

    profiles: {kind: [K] contrast against the ground at distances -REACH_PX to DEPTH_PX in pixels;
        positive distances are inside}.
    strengths: {kind: factors of the profile of single defects}.
    """

    profiles: dict[str, np.ndarray]
    strengths: dict[str, np.ndarray]

    def draw(self, layout: Sequence[Defect], shape, rng: np.random.Generator) -> np.ndarray:
        """Return the contrast of a layout, float32 [H, W]; where defects overlap, it adds up."""
        contrast = np.zeros(shape, np.float32)
        for defect in layout:
            profile = self.profiles.get(defect.kind)
            if profile is None:
                continue
            window, mask = cut_window(defect, shape, REACH_PX)
            strength = rng.choice(self.strengths[defect.kind])
            drawn = np.interp(find_distance(mask) + REACH_PX, np.arange(len(profile)), profile)
            contrast[window] += strength * ndimage.gaussian_filter(drawn, SOFT_PX, mode="nearest")
        return contrast


def measure_appearance(
    images: Sequence[np.ndarray], layouts: Sequence[Sequence[Defect]]
) -> Appearance:
    """Measure how defects look in labelled images [H, W].

    Pixels of other defects do not count. The strength of a defect is the slope of its contrast over
    the mean profile of its kind, between 0.5 and 1.5.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for image, layout in zip(images, layouts):
        masks = [draw_whole_mask(defect, image.shape) for defect in layout]
        covered = np.sum(masks, axis=0) if masks else np.zeros(image.shape)
        for defect, mask in zip(layout, masks):
            seen = _look_at(image, defect, covered - mask > 0)
            if seen is not None:
                found.setdefault(defect.kind, []).append(seen)
    profiles, strengths = {}, {}
    for kind, seen in found.items():
        index = np.concatenate([each for each, _ in seen])
        values = np.concatenate([each for _, each in seen])
        profiles[kind] = _average(index, values)
        slopes = []
        for index, values in seen:
            expected = profiles[kind][index]
            slopes.append((values * expected).sum() / max((expected**2).sum(), 1e-9))
        strengths[kind] = np.clip(slopes, 0.5, 1.5)
    return Appearance(profiles, strengths)


def _look_at(image, defect, others):
    """Return (distance indices, contrasts) of the pixels of a defect; None without a ground."""
    window, mask = cut_window(defect, image.shape, RING_PX[1])
    index, free = index_distance(mask), ~others[window]
    outside = ndimage.distance_transform_edt(~mask)
    ring = free & (outside > RING_PX[0]) & (outside <= RING_PX[1])
    if ring.sum() < 8 or not mask.any():
        return None
    near = free & (outside <= REACH_PX)
    return index[near], image[window][near] - np.median(image[window][ring])


def _average(index, values):
    """Return the mean of values at each distance [K]; distances without any take the next one's."""
    size = REACH_PX + DEPTH_PX + 1
    counts = np.bincount(index, minlength=size)
    sums = np.bincount(index, values, minlength=size)
    known = np.flatnonzero(counts)
    profile = np.interp(np.arange(size), known, sums[known] / counts[known])
    profile[:2] *= (0, 0.5)  # fades into the ground
    return profile.astype(np.float32)


def index_distance(mask) -> np.ndarray:
    """Return the distance of each pixel from the outline, as an index into a profile."""
    return np.rint(find_distance(mask)).astype(int) + REACH_PX


def find_distance(mask) -> np.ndarray:
    """Return the distance from the outline: 1, 2 ... inside, 0, -1 ... outside, within limits."""
    inside = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] if mask.any() else 0
    outside = ndimage.distance_transform_edt(~mask)
    return np.clip(np.where(mask, inside, 1 - outside), -REACH_PX, DEPTH_PX)


def cut_window(defect: Defect, shape, margin: int):
    """Return the slices of a defect's box with a margin, inside the image, and the mask in it."""
    x0, y0, x1, y1 = defect.box_px
    window = np.s_[
        max(0, y0 - margin) : min(shape[0], y1 + margin),
        max(0, x0 - margin) : min(shape[1], x1 + margin),
    ]
    return window, draw_whole_mask(defect, shape)[window]


def estimate_ground(image: np.ndarray, layout: Sequence[Defect]) -> np.ndarray:
    """Return the image [H, W] without its defects: a blur of the pixels that are far from them."""
    covered = np.zeros(image.shape, bool)
    for defect in layout:
        covered |= draw_whole_mask(defect, image.shape)
    free = (~ndimage.binary_dilation(covered, iterations=3)).astype(np.float32)
    if not free.any():
        return np.full(image.shape, np.median(image), np.float32)
    # a wide blur reaches where the narrow one sees no free pixel
    ground = np.full(image.shape, (image * free).sum() / free.sum(), np.float32)
    for sigma in (2 * GROUND_PX, GROUND_PX):
        weight = ndimage.gaussian_filter(free, sigma, mode="nearest")
        blurred = ndimage.gaussian_filter(image * free, sigma, mode="nearest")
        share = np.clip(weight / 0.2, 0, 1)
        ground = share * blurred / np.maximum(weight, 1e-6) + (1 - share) * ground
    return ground.astype(np.float32)


def draw_piece(ground: np.ndarray, shape, rng: np.random.Generator) -> np.ndarray:
    """Return a piece [H, W] of a ground, turned or mirrored; a smaller ground is stretched."""
    turned = np.rot90(ground, int(rng.integers(4)))
    if rng.integers(2):
        turned = turned[:, ::-1]
    top, left = (int(rng.integers(max(n - side, 0) + 1)) for n, side in zip(turned.shape, shape))
    piece = turned[top : top + shape[0], left : left + shape[1]]
    if piece.shape == tuple(shape):
        return np.ascontiguousarray(piece)
    factors = [side / own for side, own in zip(shape, piece.shape)]
    return ndimage.zoom(piece, factors, order=1, grid_mode=True, mode="nearest")


def match_levels(images: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return knots (from, to) of the rising map that gives `images` the levels of `references`.

    Apply it by `numpy.interp`. Both are arrays of any shape.
    """
    shares = np.linspace(0, 1, 129)
    low, high = (np.quantile(each, shares) for each in (images, references))
    return low + np.arange(len(low)) * 1e-7, high  # numpy.interp needs rising knots
