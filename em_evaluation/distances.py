"""Frechet and kernel distance between two sets of features, with intervals.

Each distance has the influence of every image: the derivative of the distance by the image's
weight. The variance under resampling follows from the influences alone, so that a thousand
bootstrap replicates cost no more than one decomposition.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg

from em_evaluation.interval import Interval


@dataclass(frozen=True)
class Distance:
    """A distance with the influence of each row of both sets, in the distance's unit, mean 0."""

    value: float
    influence_a: np.ndarray  # [N]
    influence_b: np.ndarray  # [M]

    def scaled(self, factor: float) -> "Distance":
        return Distance(factor * self.value, factor * self.influence_a, factor * self.influence_b)


# ---------------------------------------------------------------- Frechet distance


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Frechet distance of the Gaussians fitted to features a [N, D] and b [M, D].

    |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), covariances with N - 1 (Dowson & Landau
    1982; Heusel et al. 2017). The last trace is the nuclear norm of A B^T, with A and B the centred
    rows over the root of N - 1: exact also with fewer images than dimensions, where a matrix root
    of the singular product loses half of its digits.

    Raises:
        ValueError: Unequal D, or fewer than two rows.
    """
    a, b, mean_difference = _centre(a, b)
    left, right = _triangle(a)[0], _triangle(b)[0]
    nuclear_norm = linalg.svdvals(left @ right.T).sum()
    return _sum_up(mean_difference, (a**2).sum(), (b**2).sum(), nuclear_norm)


def frechet_influence(a, b) -> Distance:
    """Return the Frechet distance of features a [N, D] and b [M, D] with its influences.

    With A B^T = P S Q^T, the derivative of its nuclear norm by the weight of row i is
    (P S P^T)_ii / 2 (Q S Q^T for b); centring is of second order.
    """
    a, b, mean_difference = _centre(a, b)
    (left, rotate_a), (right, rotate_b) = _triangle(a), _triangle(b)
    p, singular_values, q = linalg.svd(left @ right.T, full_matrices=False, lapack_driver="gesdd")
    p, q = rotate_a(p), rotate_b(q.T)  # [N, K], [M, K]
    value = _sum_up(mean_difference, (a**2).sum(), (b**2).sum(), singular_values.sum())

    def influence(rows, vectors, sign):
        num = len(rows)
        shift = 2 * sign * np.sqrt(num - 1) * (rows @ mean_difference)
        raw = shift + num * ((rows**2).sum(1) - (vectors**2 * singular_values).sum(1))
        return raw - raw.mean()

    return Distance(value, influence(a, p, 1), influence(b, q, -1))


def check_features(a, b, least=2):
    """Return two sets of features as float64; raise `ValueError` for unequal D or too few rows."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"The features must be [N, D] and [M, D] of one extractor, not {a.shape} and {b.shape}."
        )
    if min(len(a), len(b)) < least:
        raise ValueError(f"There must be at least {least} images of each set.")
    return a, b


def _centre(a, b):
    a, b = check_features(a, b)
    mean_a, mean_b = a.mean(0), b.mean(0)
    return (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1), mean_a - mean_b


def _triangle(rows):
    """Return (R, rotate) with rows = Q R: D x D in place of rows [N, D], and the way back to N."""
    if len(rows) <= rows.shape[1]:
        return rows, lambda vectors: vectors
    q, r = linalg.qr(rows, mode="economic")
    return r, lambda vectors: q @ vectors


def _sum_up(mean_difference, trace_a, trace_b, nuclear_norm):
    return float(max(mean_difference @ mean_difference + trace_a + trace_b - 2 * nuclear_norm, 0.0))


# ---------------------------------------------------------------- kernel distance


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    *,
    subset_size: int | None = None,
    num_subsets: int = 100,
    seed: int = 0,
) -> float:
    """Return the kernel inception distance (Binkowski et al. 2018).

    The unbiased squared MMD of the kernel (x.y / D + 1)^3, which may be slightly negative.

    Args:
        a, b: Features [N, D] and [M, D].
        subset_size: Average over `num_subsets` random subsets of this size, as other packages do.
            Default: all pairs, which is the mean over infinitely many subsets.
        num_subsets, seed: Of the subsets.
    """
    if subset_size is None:
        return kernel_influence(a, b).value
    rng = np.random.default_rng(seed)
    size = min(subset_size, len(a), len(b))
    draws = (
        (rng.choice(len(a), size, replace=False), rng.choice(len(b), size, replace=False))
        for _ in range(num_subsets)
    )
    return float(
        np.mean([kernel_influence(np.asarray(a)[i], np.asarray(b)[j]).value for i, j in draws])
    )


def kernel_influence(a, b, block=2048) -> Distance:
    """Return the kernel distance of features a [N, D] and b [M, D] with its influences."""
    return mmd_influence(a, b, _kernel, _kernel_diagonal, block)


def mmd_influence(a, b, kernel, kernel_diagonal, block=2048) -> Distance:
    """Return the unbiased squared maximum mean discrepancy with its influences.

    Gretton et al. 2012, eq. 3. The influence is 2 (h(x_i) - mean h) with h(x) = mean k(x, a') -
    mean k(x, b), the projection of the U-statistic. If the true distance is 0, its variance is
    overstated by about 2, so intervals are then too wide.

    Args:
        a, b: Features [N, D] and [M, D].
        kernel: x [N, D], y [M, D] -> [N, M].
        kernel_diagonal: x -> k(x, x) [N].
        block: Rows at once; the memory is O(block x M).
    """
    a, b = check_features(a, b)
    within_a, within_b, across_a, across_b = (np.zeros(len(rows)) for rows in (a, b, a, b))
    for start in range(0, len(a), block):
        rows = slice(start, start + block)
        within_a[rows] = kernel(a[rows], a).sum(1) - kernel_diagonal(a[rows])
        across = kernel(a[rows], b)
        across_a[rows] = across.sum(1)
        across_b += across.sum(0)
    for start in range(0, len(b), block):
        rows = slice(start, start + block)
        within_b[rows] = kernel(b[rows], b).sum(1) - kernel_diagonal(b[rows])
    projection_a = within_a / (len(a) - 1) - across_a / len(b)  # [N]
    projection_b = within_b / (len(b) - 1) - across_b / len(a)  # [M]
    value = float(projection_a.mean() + projection_b.mean())
    return Distance(
        value, 2 * (projection_a - projection_a.mean()), 2 * (projection_b - projection_b.mean())
    )


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_diagonal(x):
    return ((x**2).sum(1) / x.shape[1] + 1) ** 3


# ---------------------------------------------------------------- CMMD

CMMD_SIGMA = 10.0  # width of the kernel, of the paper
CMMD_SCALE = 1000.0  # what the paper multiplies by, for legible numbers


def cmmd_influence(a, b, block=2048) -> Distance:
    """Return CMMD of embeddings a [N, D] and b [M, D] of length 1 with its influences.

    1000 times the unbiased squared MMD of the kernel exp(-|x - y|^2 / (2 * 10^2)) (Jayasumana et
    al. 2024). It may be slightly negative. The paper's code has the biased estimator, which is
    above this one by 1000 (1 - mean k) / N for each side: at most 0.02 each at 1,000 images.

    Raises:
        ValueError: The embeddings are not of length 1.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    for rows in (a, b):
        lengths = np.sqrt((rows**2).sum(-1))
        if rows.ndim == 2 and not np.allclose(lengths, 1, atol=1e-2):
            raise ValueError(
                f"CMMD needs embeddings of length 1; these have {lengths.min():.3g} to "
                f"{lengths.max():.3g}. Use the extractor clip."
            )
    return mmd_influence(a, b, _clip_kernel, lambda x: np.ones(len(x)), block).scaled(CMMD_SCALE)


def cmmd(a, b) -> float:
    """Return CMMD of embeddings a [N, D] and b [M, D] of length 1."""
    return cmmd_influence(a, b).value


def _clip_kernel(x, y):
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
    return np.exp(-squares / (2 * CMMD_SIGMA**2))


# ---------------------------------------------------------------- intervals


def bootstrap_interval(
    distance: Distance,
    *,
    groups_a: np.ndarray | None = None,
    groups_b: np.ndarray | None = None,
    level: float = 0.95,
    num_replicates: int = 2000,
    seed: int | Sequence[int] = 0,
) -> Interval:
    """Return the interval of a distance from the linearised bootstrap over groups of images.

    A naive bootstrap of the Frechet distance is biased upwards, since its replicates hold
    duplicates. Here the weights are resampled in the first-order expansion of the distance (Efron's
    infinitesimal jackknife), which has no such bias. The interval is that of the distance expected
    at this number of images. If the sets are nearly equal, it is up to a third too wide.

    Args:
        distance: A distance with influences.
        groups_a, groups_b: What was drawn independently [N], such as the micrograph of each tile:
            whole groups are resampled, with the factor (G / (G - 1))^(1/2). Default: each image.
        level: Probability of the interval.
        num_replicates, seed: Of the bootstrap.
    """
    parts = ((distance.influence_a, groups_a), (distance.influence_b, groups_b))
    return _find_interval(distance.value, parts, level, num_replicates, seed)


def difference_interval(
    first: Distance,
    second: Distance,
    *,
    groups_first=None,
    groups_second=None,
    groups_reference=None,
    paired=False,
    level=0.95,
    num_replicates=2000,
    seed=0,
) -> Interval:
    """Return the interval of `first` - `second`, two distances to one reference (their side b).

    The reference's influences are subtracted row by row, so that what both share cancels.

    Args:
        first, second: Distances with influences.
        groups_first, groups_second, groups_reference: What was drawn independently.
        paired: Row i of both first sides has one origin, such as the noise that two samplers
            started from; they are resampled together, in `groups_first`.
        level, num_replicates, seed: As of `bootstrap_interval`.
    """
    sides = [(first.influence_a, groups_first), (-second.influence_a, groups_second)]
    if paired:
        sides = [(first.influence_a - second.influence_a, groups_first)]
    parts = (*sides, (first.influence_b - second.influence_b, groups_reference))
    return _find_interval(first.value - second.value, parts, level, num_replicates, seed)


def frechet_distance_interval(a: np.ndarray, b: np.ndarray, **options: Any) -> Interval:
    """Return the Frechet distance of a [N, D] and b [M, D] with its `bootstrap_interval`."""
    return bootstrap_interval(frechet_influence(a, b), **options).limited(lowest=0.0)


def kernel_distance_interval(a: np.ndarray, b: np.ndarray, **options: Any) -> Interval:
    """Return the kernel distance of a [N, D] and b [M, D] with its `bootstrap_interval`."""
    return bootstrap_interval(kernel_influence(a, b), **options)


def _find_interval(value, parts, level, num_replicates, seed):
    rng = np.random.default_rng(seed)
    replicates = np.full(num_replicates, value)
    for influence, groups in parts:
        replicates += _replicate(influence, groups, num_replicates, rng)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _replicate(influence, groups, num_replicates, rng):
    """Return the mean influence under multinomial weightings of the groups [num_replicates]."""
    if groups is None or len(np.unique(groups)) < 2:
        totals = influence
    else:
        totals = np.bincount(np.unique(groups, return_inverse=True)[1], weights=influence)
    num = len(totals)
    deviations = np.zeros(num_replicates)
    for start in range(0, num_replicates, 256):  # [256, G] at a time
        rows = slice(start, min(start + 256, num_replicates))
        drawn = rng.integers(num, size=(rows.stop - rows.start, num))
        deviations[rows] = totals[drawn].sum(1) / len(influence)
    return deviations * np.sqrt(num / (num - 1))
