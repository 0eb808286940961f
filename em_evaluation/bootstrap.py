"""Bootstrap intervals of distances between two sets that each image enters by one row.

A set is a matrix [N, K] with a row per image (its spectrum, its histogram, its defects by size);
the distance is a function of the two mean rows. A replicate is a weighted mean, a matrix product.
"""

from dataclasses import dataclass

import numpy as np

from em_evaluation.interval import Interval

NUM_REPLICATES = 500


@dataclass(frozen=True)
class Resampled:
    """A number with its bootstrap replicates [R], whose mean is the number itself."""

    value: float
    replicates: np.ndarray  # [R]

    def interval(self, level=0.95, lowest=-np.inf) -> Interval:
        low, high = np.quantile(self.replicates, [(1 - level) / 2, (1 + level) / 2])
        return Interval(self.value, low, high).limited(lowest)

    def __sub__(self, other):
        return Resampled(self.value - other.value, self.replicates - other.replicates)


def resample_means(rows, groups=None, seed=0, num_replicates=NUM_REPLICATES) -> np.ndarray:
    """Return the mean of rows [N, K] and below it those of bootstrap replicates, [1 + R, K].

    `groups` [N] name what was drawn independently; whole groups are drawn. Replicates of one seed
    draw the same groups, so that a common reference cancels in a difference.
    """
    rows = np.asarray(rows, np.float64)
    names = np.arange(len(rows)) if groups is None else np.unique(groups, return_inverse=True)[1]
    num_groups = names.max() + 1
    if num_groups < 2:
        names, num_groups = np.arange(len(rows)), len(rows)
    drawn = np.random.default_rng(seed).integers(num_groups, size=(num_replicates, num_groups))
    counts = np.zeros((num_replicates, num_groups))
    np.add.at(counts, (np.arange(num_replicates)[:, None], drawn), 1)
    weights = counts[:, names]  # [R, N]
    means = (weights @ rows) / weights.sum(1, keepdims=True)
    spread = np.sqrt(num_groups / (num_groups - 1))  # the small-sample factor
    centre = rows.mean(0, keepdims=True)
    return np.concatenate([centre, centre + spread * (means - centre)])


def compare_means(function, means_a, means_b) -> Resampled:
    """Return `function` of two sets' mean rows [1 + R, K] with its replicates.

    A distance is never negative, and its replicates lie above it on average. They are moved back
    by this excess, so that the interval is that of the distance expected at this number of images.
    """
    values = function(means_a, means_b)
    replicates = values[1:]
    replicates = replicates[np.isfinite(replicates)]
    if not np.isfinite(values[0]) or not len(replicates):
        return Resampled(float("nan"), np.full(len(values) - 1, np.nan))
    replicates = np.where(np.isfinite(values[1:]), values[1:], replicates.mean())
    return Resampled(float(values[0]), replicates - replicates.mean() + values[0])


# ---------------------------------------------------------------- mean rows [..., K] -> [...]


def root_mean_square_difference(a, b):
    """Return the root mean square difference of two curves, in their unit."""
    return np.sqrt(((a - b) ** 2).mean(-1))


def absolute_difference(a, b):
    """Return the absolute difference of two means, K = 1."""
    return np.abs(a - b)[..., 0]


def wasserstein(bin_width):
    """Return the function for the Wasserstein-1 distance of two histograms, in the bins' unit.

    The integral of the absolute difference of the distribution functions (Vallender 1974). Only the
    shapes of the histograms count; NaN if one is empty.
    """

    def function(a, b):
        difference = _subtract_distributions(a, b)
        return np.abs(difference[..., :-1]).sum(-1) * bin_width

    return function


def circular_wasserstein(bin_width):
    """Return the function for the Wasserstein-1 distance of two histograms over a circle.

    The integral of |F - G - median(F - G)| (Rabin, Delon & Gousseau 2011, equation 8).
    """

    def function(a, b):
        difference = _subtract_distributions(a, b)
        return np.abs(difference - np.median(difference, -1, keepdims=True)).sum(-1) * bin_width

    return function


def _subtract_distributions(a, b):
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = (np.cumsum(each, -1) / each.sum(-1, keepdims=True) for each in (a, b))
    return a - b


def histogram_of_values(values, num_bins, low, high):
    """Return one-hot rows [N, num_bins] of values [N], and the width of a bin."""
    width = (high - low) / num_bins
    index = np.clip(((values - low) / width).astype(int), 0, num_bins - 1)
    rows = np.zeros((len(values), num_bins))
    rows[np.arange(len(values)), index] = 1
    return rows, width
