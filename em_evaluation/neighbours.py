"""Precision, recall, density and coverage: fidelity and variety from nearest neighbours."""

from typing import Any, NamedTuple

import numpy as np

from em_evaluation.distances import check_features
from em_evaluation.interval import Interval

MANIFOLD_NEIGHBOURS = 3  # precision and recall (Kynkaanniemi et al. 2019)
DENSITY_NEIGHBOURS = 5  # density and coverage (Naeem et al. 2020)
NUM_HALVES = 64
MOST_IN_HALF = 2048
TIE = 1e-9  # of a squared radius: rounding of images on the surface of a ball


class NeighbourMetrics(NamedTuple):
    """Numbers or intervals: precision, recall and coverage in [0, 1], density from 0 on."""

    precision: Any
    recall: Any
    density: Any
    coverage: Any


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
    blocks = [slice(start, start + block) for start in range(0, len(generated), block)]
    return _measure(
        _find_radii(generated, (num_manifold,), block)[0],
        _find_radii(real, (num_manifold, num_density), block),
        ((rows, _squared_distances(generated[rows], real)) for rows in blocks),
        num_density,
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
    # the reference's halves are common to all models
    rngs = [np.random.default_rng([seed, side]) for side in range(2)]
    squares = None
    if max(len(generated), len(real)) <= 2 * MOST_IN_HALF:
        pairs = ((generated, generated), (real, real), (generated, real))
        squares = [_squared_distances(x, y) for x, y in pairs]
        for within in squares[:2]:
            np.fill_diagonal(within, 0.0)
    halves = []
    for _ in range(num_halves):
        rows, scale_a = _draw_half(len(generated), groups_generated, least // 2 + 1, rngs[0])
        columns, scale_b = _draw_half(len(real), groups_real, least // 2 + 1, rngs[1])
        if squares is None:
            half = measure_neighbours(generated[rows], real[columns], **options)
        else:
            half = _measure(
                _take_radii(squares[0][np.ix_(rows, rows)], (num_manifold,))[0],
                _take_radii(squares[1][np.ix_(columns, columns)], (num_manifold, num_density)),
                [(slice(None), squares[2][np.ix_(rows, columns)])],
                num_density,
            )
        halves.append(half)
    deviations = 1.96 * (max(scale_a, scale_b) * np.std(halves, axis=0, ddof=1))
    highest = NeighbourMetrics(1.0, 1.0, np.inf, 1.0)
    return NeighbourMetrics(*(
        Interval(value, value - half, value + half).limited(0.0, most)
        for value, half, most in zip(values, deviations, highest)
    ))  # fmt: skip


def _check(generated, real, *num_neighbours):
    generated, real = check_features(generated, real, least=max(num_neighbours) + 1)
    centre = real.mean(0)  # near the origin, differences of squares keep their digits
    return generated - centre, real - centre


def _squared_distances(x, y):
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * (x @ y.T)
    return np.maximum(squares, 0.0, out=squares)


def _find_radii(features, num_neighbours, block):
    """Return the squared distance to the k-th neighbour of each row, for each k: [K, N]."""
    parts = []
    for start in range(0, len(features), block):
        squares = _squared_distances(features[start : start + block], features)
        squares[np.arange(len(squares)), np.arange(start, start + len(squares))] = 0.0
        parts.append(_take_radii(squares, num_neighbours))
    return np.concatenate(parts, 1)


def _take_radii(squares, num_neighbours):
    return np.partition(squares, num_neighbours, axis=1)[:, num_neighbours].T


def _measure(generated_radius, real_radii, blocks, num_density):
    """Return the four metrics; blocks: generated rows, their squared distances to real [B, M]."""
    precise, num_balls = np.zeros(len(generated_radius), bool), np.zeros(len(generated_radius))
    recalled, covered = np.zeros((2, real_radii.shape[1]), bool)
    for rows, squares in blocks:
        precise[rows] = (squares <= real_radii[0] * (1 + TIE)).any(1)
        recalled |= (squares <= generated_radius[rows, None] * (1 + TIE)).any(0)
        inside = squares < real_radii[1] * (1 - TIE)
        num_balls[rows] = inside.sum(1)
        covered |= inside.any(0)
    means = precise.mean(), recalled.mean(), num_balls.mean() / num_density, covered.mean()
    return NeighbourMetrics(*(float(mean) for mean in means))


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
