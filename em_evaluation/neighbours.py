"""Precision, recall, density and coverage: fidelity and variety from nearest neighbours."""

from dataclasses import dataclass

import numpy as np

from em_evaluation.distances import check_features
from em_evaluation.interval import Interval

MANIFOLD_NEIGHBOURS = 3  # precision and recall (Kynkaanniemi et al. 2019)
DENSITY_NEIGHBOURS = 5  # density and coverage (Naeem et al. 2020)
NUM_HALVES = 64
MOST_IN_HALF = 2048
TIE = 1e-9  # of a squared radius: rounding of images on the surface of a ball


@dataclass(frozen=True)
class NeighbourMetrics:
    """Numbers or intervals: precision, recall and coverage in [0, 1], density from 0 on."""

    precision: float | Interval
    recall: float | Interval
    density: float | Interval
    coverage: float | Interval


def measure_neighbours(
    generated, real, *, num_manifold=MANIFOLD_NEIGHBOURS, num_density=DENSITY_NEIGHBOURS, block=2048
) -> NeighbourMetrics:
    """Return the four metrics of features `generated` [N, D] against `real` [M, D].

    A ball around each image reaches to its k-th nearest neighbour in its own set. precision: share
    of generated images in some real ball; recall: share of real images in some generated ball
    (Kynkäänniemi et al. 2019, eq. 1, k = 3). density: number of real balls that hold a generated
    image, over k, averaged; coverage: share of real balls that hold a generated image (Naeem et al.
    2020, eqs. 3 and 4, k = 5; open balls, so that equal sets have density 1). Compare them only at
    equal numbers of images. The memory is O(block x max(N, M)).
    """
    generated, real = _check(generated, real, num_manifold, num_density)
    real_radii = _radii(real, (num_manifold, num_density), block)
    (generated_radii,) = _radii(generated, (num_manifold,), block)
    precise, num_balls = np.zeros(len(generated), bool), np.zeros(len(generated))
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for start in range(0, len(generated), block):
        rows = slice(start, start + block)
        squares = _squared_distances(generated[rows], real)  # [B, M]
        precise[rows] = (squares <= real_radii[0] * (1 + TIE)).any(1)
        recalled |= (squares <= generated_radii[rows, None] * (1 + TIE)).any(0)
        inside = squares < real_radii[1] * (1 - TIE)
        num_balls[rows] = inside.sum(1)
        covered |= inside.any(0)
    return NeighbourMetrics(
        float(precise.mean()),
        float(recalled.mean()),
        float(num_balls.mean() / num_density),
        float(covered.mean()),
    )


def measure_neighbour_intervals(
    generated,
    real,
    *,
    groups_generated=None,
    groups_real=None,
    num_manifold=MANIFOLD_NEIGHBOURS,
    num_density=DENSITY_NEIGHBOURS,
    num_halves=NUM_HALVES,
    seed=0,
) -> NeighbourMetrics:
    """Return the four metrics with 95 % intervals from half-samples without replacement.

    A bootstrap would give every duplicate a neighbour at distance 0. The scatter of halves about
    their mean is that of the whole (delete-half jackknife, Shao & Wu 1989): the interval is 1.96
    deviations about the value at all images, cut to the possible range. `groups_*` name what was
    drawn independently; whole groups are drawn. Above 4,096 images, halves are thinned to 2,048;
    with groups, the interval is then too wide.
    """
    generated, real = _check(generated, real, num_manifold, num_density)
    options = {"num_manifold": num_manifold, "num_density": num_density}
    values = measure_neighbours(generated, real, **options)
    least = 2 * (max(num_manifold, num_density) + 1)
    check_features(generated, real, least)
    sides = ((generated, groups_generated), (real, groups_real))
    whole = max(len(generated), len(real)) <= 2 * MOST_IN_HALF
    # the reference's halves are common to all models
    rngs = [np.random.default_rng([seed, side]) for side in range(2)]
    squares = None
    if whole:
        squares = [
            _squared_distances(x, y)
            for x, y in ((generated, generated), (real, real), (generated, real))
        ]
    halves, scale = [], 1.0
    for _ in range(num_halves):
        (rows, scale_a), (columns, scale_b) = (
            _draw_half(len(features), groups, least // 2 + 1, rng)
            for (features, groups), rng in zip(sides, rngs)
        )
        if whole:
            half = _measure_from_squares(
                *(
                    each[np.ix_(i, j)]
                    for each, i, j in zip(squares, (rows, columns, rows), (rows, columns, columns))
                ),
                **options,
            )
        else:
            half = measure_neighbours(generated[rows], real[columns], **options)
        halves.append([half.precision, half.recall, half.density, half.coverage])
        scale = max(scale_a, scale_b)
    deviations = scale * np.std(halves, axis=0, ddof=1)
    names = ("precision", "recall", "density", "coverage")
    intervals = []
    for name, half in zip(names, 1.96 * deviations):
        value = getattr(values, name)
        interval = Interval(value, value - half, value + half)
        intervals.append(interval.limited(0.0, np.inf if name == "density" else 1.0))
    return NeighbourMetrics(*intervals)


def _check(generated, real, *num_neighbours):
    generated, real = check_features(generated, real, least=max(num_neighbours) + 1)
    centre = real.mean(0)  # near the origin, differences of squares keep their digits
    return generated - centre, real - centre


def _squared_distances(x, y):
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * (x @ y.T)
    return np.maximum(squares, 0.0, out=squares)


def _radii(features, num_neighbours, block):
    """Return the squared distance to the k-th neighbour of each row, for each k: [K, N]."""
    parts = []
    for start in range(0, len(features), block):
        squares = _squared_distances(features[start : start + block], features)
        squares[np.arange(len(squares)), np.arange(start, start + len(squares))] = 0.0
        parts.append(np.partition(squares, num_neighbours, axis=1)[:, num_neighbours].T)
    return np.concatenate(parts, 1)


def _measure_from_squares(within_generated, within_real, across, *, num_manifold, num_density):
    """The same four from matrices of squared distances [N, N], [M, M], [N, M]."""
    for within in (within_generated, within_real):
        np.fill_diagonal(within, 0.0)
    generated_radius = np.partition(within_generated, num_manifold, axis=1)[:, num_manifold]
    real_radii = np.partition(within_real, (num_manifold, num_density), axis=1)[
        :, [num_manifold, num_density]
    ].T
    inside = across < real_radii[1] * (1 - TIE)
    return NeighbourMetrics(
        float((across <= real_radii[0] * (1 + TIE)).any(1).mean()),
        float((across <= generated_radius[:, None] * (1 + TIE)).any(0).mean()),
        float(inside.sum(1).mean() / num_density),
        float(inside.any(0).mean()),
    )


def _draw_half(num, groups, least, rng):
    """Return the rows of half of the groups or images, and the factor for their scatter."""
    if groups is None or len(np.unique(groups)) < 2:
        size = min(num // 2, MOST_IN_HALF)
        fraction = size / num
        return rng.permutation(num)[:size], np.sqrt(fraction / (1 - fraction))
    names, index = np.unique(groups, return_inverse=True)
    order = rng.permutation(len(names))
    size = max(len(names) // 2, 1)
    while np.isin(index, order[:size]).sum() < least:
        size += 1
    rows = np.flatnonzero(np.isin(index, order[:size]))
    if len(rows) > MOST_IN_HALF:
        rows = rng.permutation(rows)[:MOST_IN_HALF]
    fraction = min(size, len(names) - 1) / len(names)
    return rows, np.sqrt(fraction / (1 - fraction))
