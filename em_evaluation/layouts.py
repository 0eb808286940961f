"""Do drawn layouts of defects look like real ones? Counts, sizes, distances and overlaps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import spatial, stats

from em_data.micrograph import Defect

NUM_PERMUTATIONS = 299
Layout = Sequence[Defect]


@dataclass(frozen=True)
class LayoutTest:
    """A two-sample test of one quantity of real and drawn layouts.

    quantity: "count", "size", "distance" or "overlap". kind: of the defects, or "all".
    unit: of the means. real, drawn: means.
    statistic: largest distance of the two distribution functions (Kolmogorov-Smirnov).
    p_value: by permutation of whole images, since the values of one image are not independent.
    """

    quantity: str
    kind: str
    unit: str
    real: float
    drawn: float
    statistic: float
    p_value: float


def compare_layouts(
    real: Sequence[Layout],
    drawn: Sequence[Layout],
    real_shapes: Sequence[tuple[int, int]],
    drawn_shapes: Sequence[tuple[int, int]],
    pixel_size_nm: float | None,
    kinds: Sequence[str],
    seed: int = 0,
) -> list[LayoutTest]:
    """Compare layouts by two-sample tests of counts, sizes, distances and overlaps.

    - count: of each kind, per 10,000 pixels, or per um^2 if the pixel size is known.
    - size: diameter of a disc of the same area, of defects that do not touch the border.
    - distance: from the centre of each defect to the nearest other one in its image.
    - overlap: 1 for a defect that shares a pixel with another one, else 0.

    Sizes and distances depend on the size of the image, because large defects are seldom whole in
    small images: compare images of equal size.

    Args:
        real, drawn: Defects of each image.
        real_shapes, drawn_shapes: Height and width of each image in pixels.
        pixel_size_nm: Of all images; None if unknown.
        kinds: Which kinds to compare; quantities without a value on one side are left out.
        seed: Of the permutations.
    """
    sides = [
        [measure_layout(*each, pixel_size_nm, kinds) for each in zip(layouts, shapes)]
        for layouts, shapes in ((real, real_shapes), (drawn, drawn_shapes))
    ]
    unit = "px" if pixel_size_nm is None else "nm"
    per_area = "per 10,000 px" if pixel_size_nm is None else "per um^2"
    units = {"count": per_area, "size": unit, "distance": unit, "overlap": "share"}
    tests = []
    for quantity, kind in sides[0][0] if sides[0] else ():
        first, second = ([each[quantity, kind] for each in side] for side in sides)
        values = [np.concatenate(each) for each in (first, second)]
        if all(map(len, values)):
            result = compare_by_image(first, second, seed)
            mean, other = (float(each.mean()) for each in values)
            tests.append(LayoutTest(quantity, kind, units[quantity], mean, other, *result))
    return tests


def describe_tests(tests: Sequence[LayoutTest]) -> str:
    """Return a table of tests for people, one line each; KS is the statistic."""
    lines = [f"{'quantity':9} {'kind':12} {'real':>9} {'drawn':>9}  {'unit':13} {'KS':>5} {'p':>6}"]
    for each in tests:
        lines.append(
            f"{each.quantity:9} {each.kind:12} {each.real:9.3g} {each.drawn:9.3g}  {each.unit:13} "
            f"{each.statistic:5.2f} {each.p_value:6.2g}"
        )
    return "\n".join(lines)


def measure_layout(layout, shape, pixel_size_nm, kinds) -> dict[tuple[str, str], np.ndarray]:
    """Return {(quantity, kind): values} of one image, see `compare_layouts`."""
    layout = [each for each in layout if each.kind in kinds]
    scale = 1.0 if pixel_size_nm is None else pixel_size_nm
    area = math.prod(shape) * (1e-4 if pixel_size_nm is None else (scale / 1000) ** 2)
    masks = [_get_mask(each) for each in layout]
    names = np.array([each.kind for each in layout], dtype=object)
    boxes = np.array([each.box_px for each in layout], dtype=float).reshape(-1, 4)
    sizes = np.array([2 * math.sqrt(mask.sum() / math.pi) * scale for mask in masks])
    is_whole = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < np.array(shape)[::-1]).all(1)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    distances = np.empty(0)
    if len(centres) > 1:
        distances = spatial.cKDTree(centres).query(centres, k=2)[0][:, 1] * scale
    values = {}
    for kind in (*kinds, "all") if len(kinds) > 1 else kinds:
        mine = np.full(len(layout), True) if kind == "all" else names == kind
        values["count", kind] = np.array([mine.sum() / area])
        values["size", kind] = sizes[mine & is_whole]
        values["distance", kind] = distances[mine] if len(distances) else distances
        values["overlap", kind] = _find_overlaps(layout, masks, shape)[mine].astype(float)
    return values


def compare_by_image(first, second, seed=0) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov statistic of values by image, and p by permuted images.

    Args:
        first, second: Values of each image, [n] arrays.
    """
    values = [*first, *second]

    def measure(ids, others):
        return _find_statistic(
            *(np.concatenate([values[i] for i in each]) for each in (ids, others))
        )

    ids = np.arange(len(values))
    result = stats.permutation_test(
        (ids[: len(first)], ids[len(first) :]),
        measure,
        n_resamples=NUM_PERMUTATIONS,
        vectorized=False,
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    return float(result.statistic), float(result.pvalue)


def _find_statistic(first, second):
    """Return the largest distance of two distribution functions; 0 if one has no value."""
    if not len(first) or not len(second):
        return 0.0
    first, second = np.sort(first), np.sort(second)
    points = np.concatenate([first, second])
    below = [np.searchsorted(each, points, side="right") / len(each) for each in (first, second)]
    return float(np.abs(below[0] - below[1]).max())


def _get_mask(defect):
    """Return the mask of a defect inside its box, bool [h, w]."""
    x0, y0, x1, y1 = defect.box_px
    if defect.mask is None:
        return np.ones((y1 - y0, x1 - x0), dtype=bool)
    whole = defect.mask.shape != (y1 - y0, x1 - x0)
    return defect.mask[y0:y1, x0:x1] if whole else defect.mask


def _find_overlaps(layout, masks, shape):
    """Return whether each defect shares a pixel with another one, bool [N]."""
    cover = np.zeros(shape, dtype=np.int32)
    boxes = [np.s_[y0:y1, x0:x1] for x0, y0, x1, y1 in (each.box_px for each in layout)]
    for box, mask in zip(boxes, masks):
        cover[box] += mask
    return np.array([(cover[box][mask] > 1).any() for box, mask in zip(boxes, masks)], dtype=bool)
