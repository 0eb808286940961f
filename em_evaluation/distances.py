"""Frechet and kernel distance between two sets of features, and intervals around them.

Both distances come with the *influence* of every image: the derivative of the distance by the image's weight. The
variance of a distance under resampling follows from the influences alone, so that a thousand bootstrap replicates cost
nothing beyond the one decomposition.
"""

from dataclasses import dataclass

import numpy as np
from scipy import linalg


@dataclass(frozen=True)
class Distance:
    """A distance with the influence of each row of both sets: the mean of each is 0, the unit is that of the distance."""

    value: float
    influence_a: np.ndarray  # [N]
    influence_b: np.ndarray  # [M]


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


# ---------------------------------------------------------------- Frechet distance


def frechet_distance(a, b) -> float:
    """Return the Frechet distance of the Gaussians fitted to features a [N, D] and b [M, D], from singular values.

    |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), covariances with N - 1 (Dowson & Landau 1982; Heusel et al.
    2017). With A, B the centred rows divided by the root of N - 1, tr (S_a S_b)^(1/2) is the nuclear norm of A B^T:
    exact also with fewer images than dimensions, where a matrix root of the singular product S_a S_b loses half of its
    digits. `ValueError` for unequal D or fewer than two rows.
    """
    a, b, mean_difference = _centre(a, b)
    left, right = _triangle(a)[0], _triangle(b)[0]
    nuclear_norm = linalg.svdvals(left @ right.T).sum()
    return _sum_up(mean_difference, (a**2).sum(), (b**2).sum(), nuclear_norm)


def frechet_distance_from_statistics(mean_a, covariance_a, mean_b, covariance_b) -> float:
    """Return the Frechet distance of two Gaussians from means [D] and covariances [D, D].

    tr (S_a S_b)^(1/2) is the sum of the roots of the eigenvalues of S_b S_a, which are those of the symmetric matrix
    L^T S_b L with S_a = L L^T (Cholesky). Where the rounding of an eigenvalue could be felt in that sum (singular or nearly
    singular covariances), it is the sum of the singular values of L_a^T L_b instead, slower and exact there too.
    `ValueError` for unequal D.
    """
    mean_a, mean_b = np.asarray(mean_a, np.float64), np.asarray(mean_b, np.float64)
    covariance_a, covariance_b = (
        np.asarray(covariance_a, np.float64),
        np.asarray(covariance_b, np.float64),
    )
    if mean_a.shape != mean_b.shape or covariance_a.shape != covariance_b.shape:
        raise ValueError(
            f"the statistics have {mean_a.size} and {mean_b.size} dimensions: they come from different extractors"
        )
    nuclear_norm = _sum_roots_of_eigenvalues(covariance_a, covariance_b)
    if nuclear_norm is None:
        nuclear_norm = linalg.svdvals(
            _square_root(covariance_a).T @ _square_root(covariance_b)
        ).sum()
    return _sum_up(mean_a - mean_b, np.trace(covariance_a), np.trace(covariance_b), nuclear_norm)


def frechet_influence(a, b) -> Distance:
    """Return the Frechet distance of features a [N, D] and b [M, D] with the influence of each row.

    With A B^T = P S Q^T, the derivative of ||A B^T||_* by the weight of row i is (P S P^T)_ii / 2 (Q S Q^T for B);
    centring is of second order.
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


def _centre(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features must be [N, D] and [M, D] of one extractor, and are {a.shape} and {b.shape}"
        )
    if min(len(a), len(b)) < 2:
        raise ValueError("a distance needs at least two images on each side")
    mean_a, mean_b = a.mean(0), b.mean(0)
    return (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1), mean_a - mean_b


def _triangle(rows):
    """Return (R, rotate) with rows = Q R: a D x D stand-in for rows [N, D] where N > D, and the way back to N."""
    if len(rows) <= rows.shape[1]:
        return rows, lambda vectors: vectors
    q, r = linalg.qr(rows, mode="economic")
    return r, lambda vectors: q @ vectors


def _sum_roots_of_eigenvalues(covariance_a, covariance_b, tolerance=1e-8):
    """tr (S_a S_b)^(1/2) from eigenvalues, or None where their rounding may move it by more than `tolerance` of itself.

    An eigenvalue of a symmetric matrix is off by about eps times the largest, hence its root by eps max / (2 root).
    """
    try:
        eigenvalues = linalg.eigh(
            covariance_b, covariance_a, type=2, eigvals_only=True, driver="gv"
        )
    except linalg.LinAlgError:  # S_a is singular
        return None
    rounding = np.finfo(np.float64).eps * eigenvalues[-1]
    if eigenvalues[0] <= rounding:
        return None
    roots = np.sqrt(eigenvalues)
    return roots.sum() if (rounding / (2 * roots)).sum() <= tolerance * roots.sum() else None


def _square_root(covariance):
    try:  # an order of magnitude faster than eigenvectors
        return linalg.cholesky(covariance, lower=True)
    except linalg.LinAlgError:
        return _symmetric_root(covariance)


def _symmetric_root(covariance):
    eigenvalues, eigenvectors = linalg.eigh(covariance)
    rounding = len(eigenvalues) * np.finfo(np.float64).eps * abs(eigenvalues[-1])
    return eigenvectors * np.sqrt(np.where(eigenvalues > rounding, eigenvalues, 0.0))


def _sum_up(mean_difference, trace_a, trace_b, nuclear_norm):
    return float(max(mean_difference @ mean_difference + trace_a + trace_b - 2 * nuclear_norm, 0.0))


# ---------------------------------------------------------------- kernel distance


def kernel_distance(a, b, *, subset_size=None, num_subsets=100, seed=0) -> float:
    """Return the kernel inception distance: the unbiased squared MMD of the kernel (x.y / D + 1)^3 (Binkowski et al.
    2018).

    By default over all pairs, which is the mean over infinitely many subsets; with `subset_size` the mean over
    `num_subsets` random subsets, as other packages do. It may be slightly negative: it is unbiased, at any number of
    images.
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
    """Return the kernel distance of features a [N, D] and b [M, D] with the influence of each row; see `mmd_influence`."""
    return mmd_influence(a, b, _kernel, _kernel_diagonal, block)


def mmd_influence(a, b, kernel, kernel_diagonal, block=2048) -> Distance:
    """Return the unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) with the influence of each row.

    kernel: (x [N, D], y [M, D]) -> [N, M]; kernel_diagonal: x -> its values k(x, x) [N]. The memory is O(block x M). The
    influence is 2 (h(x_i) - mean h), h(x) = mean k(x, a') - mean k(x, b): the projection of the U-statistic. Where the
    true distance is 0 the statistic is degenerate and its variance is overstated by a factor of about 2: such intervals
    are too wide, never too narrow.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features must be [N, D] and [M, D] of one extractor, and are {a.shape} and {b.shape}"
        )
    if min(len(a), len(b)) < 2:
        raise ValueError("a distance needs at least two images on each side")
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


# ---------------------------------------------------------------- intervals


def bootstrap_interval(
    distance: Distance, *, groups_a=None, groups_b=None, level=0.95, num_replicates=2000, seed=0
) -> Interval:
    """Return the `level` interval of a distance from the linearised bootstrap over groups of images.

    A naive bootstrap of the Frechet distance is biased upwards, since its replicates hold duplicates and so have fewer
    distinct images. Here the weights of the images are resampled in the first-order expansion of the distance (its
    influences; Efron's infinitesimal jackknife), which has no such bias. `groups_*` [N] name what was drawn
    independently, such as the micrograph of each tile: whole groups are resampled, with the small-sample factor (G / (G
    - 1))^(1/2). Without groups, each image is one. The interval is for the distance expected at this number of images;
    where the sets are nearly equal it is up to a third too wide, the remainder of the expansion not being small.
    """
    rng = np.random.default_rng(seed)
    replicates = np.full(num_replicates, distance.value)
    for influence, groups in ((distance.influence_a, groups_a), (distance.influence_b, groups_b)):
        replicates += _replicate(influence, groups, num_replicates, rng)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(distance.value, float(low), float(high))


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
    """Return the interval of `first` - `second`, two distances to one reference set (their side b).

    The reference's influence is subtracted row by row, so that what both share cancels: this decides where single
    intervals overlap. `paired`: row i of both first sides has one origin, such as one noise that two samplers began with;
    then they, too, are resampled together, in groups `groups_first`.
    """
    rng = np.random.default_rng(seed)
    value = first.value - second.value
    replicates = np.full(num_replicates, value)
    sides = ((first.influence_a, groups_first), (-second.influence_a, groups_second))
    if paired:
        sides = ((first.influence_a - second.influence_a, groups_first),)
    parts = (*sides, (first.influence_b - second.influence_b, groups_reference))
    for influence, groups in parts:
        replicates += _replicate(influence, groups, num_replicates, rng)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def frechet_distance_interval(a, b, **options) -> Interval:
    """Return the Frechet distance of features a [N, D] and b [M, D] with its `bootstrap_interval`, whose options it
    takes.
    """
    interval = bootstrap_interval(frechet_influence(a, b), **options)
    return Interval(interval.value, max(interval.low, 0.0), interval.high)


def kernel_distance_interval(a, b, **options) -> Interval:
    """Return the kernel distance of features a [N, D] and b [M, D] with its `bootstrap_interval`, whose options it
    takes.
    """
    return bootstrap_interval(kernel_influence(a, b), **options)


def _replicate(influence, groups, num_replicates, rng):
    """Return the mean influence under `num_replicates` multinomial weightings of the groups [num_replicates]."""
    if groups is None or len(np.unique(groups)) < 2:
        totals = influence
    else:
        totals = np.bincount(np.unique(groups, return_inverse=True)[1], weights=influence)
    num = len(totals)
    deviations = np.zeros(num_replicates)
    for start in range(0, num_replicates, 256):  # [256, G] at a time
        rows = slice(start, min(start + 256, num_replicates))
        drawn = rng.integers(num, size=(rows.stop - rows.start, num))
        deviations[rows] = totals[drawn].sum(1) / len(
            influence
        )  # the influences sum to 0 without resampling
    return deviations * np.sqrt(num / (num - 1))
