"""Distances between two sets of images that each image enters by one row: one number with a bootstrap interval.

A set is a matrix [N, K], a row for each image (its spectrum, its histogram, its defects by size); the distance is a
function of the two sets' mean rows. A bootstrap replicate is then a weighted mean, a matrix product, and hundreds cost
nothing.
"""

from dataclasses import dataclass

import numpy as np

from em_evaluation.distances import Interval

NUM_REPLICATES = 500


@dataclass(frozen=True)
class Resampled:
    """A number with its bootstrap replicates, whose mean is the number itself."""

    value: float
    replicates: np.ndarray  # [R]

    def interval(self, level=0.95, lowest=-np.inf) -> Interval:
        low, high = np.quantile(self.replicates, [(1 - level) / 2, (1 + level) / 2])
        return Interval(self.value, max(float(low), lowest), max(float(high), lowest))

    def __sub__(self, other):
        return Resampled(self.value - other.value, self.replicates - other.replicates)


def resample_means(rows, groups=None, seed=0, num_replicates=NUM_REPLICATES) -> np.ndarray:
    """Return the mean of rows [N, K] and those of bootstrap replicates below it, [1 + R, K].

    `groups` [N] name what was drawn independently, such as the micrograph of each tile: whole groups are drawn. The
    replicates of one seed draw the same groups, so that a reference that several sets share cancels in a difference.
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
    """Return `function` of two sets' mean rows ([1 + R, K] each, of `resample_means`) with its replicates.

    A distance is never negative, and its replicates, which scatter twice (once as the sample, once by resampling), lie
    above it on average; they are moved back by that excess, so that the interval belongs to the distance expected at
    this number of images.
    """
    values = function(means_a, means_b)
    replicates = values[1:]
    replicates = replicates[np.isfinite(replicates)]
    if not np.isfinite(values[0]) or not len(replicates):
        return Resampled(float("nan"), np.full(len(values) - 1, np.nan))
    replicates = np.where(np.isfinite(values[1:]), values[1:], replicates.mean())
    return Resampled(float(values[0]), replicates - replicates.mean() + values[0])


# ---------------------------------------------------------------- functions of mean rows [..., K] -> [...]


def root_mean_square_difference(a, b):
    """Return the root of the mean squared difference of two curves, in their unit."""
    return np.sqrt(((a - b) ** 2).mean(-1))


def absolute_difference(a, b):
    """Return the magnitude of the difference of two means, K = 1."""
    return np.abs(a - b)[..., 0]


def wasserstein(bin_width):
    """Return the function of two histograms that is the Wasserstein-1 (earth mover's) distance, in the unit of `bin_width`.

    The integral of the magnitude of the difference of the two distribution functions (Vallender 1974). Histograms are
    normalised here, so that only their shapes count; NaN where one is empty.
    """

    def function(a, b):
        with np.errstate(invalid="ignore", divide="ignore"):
            difference = np.cumsum(a, -1) / a.sum(-1, keepdims=True) - np.cumsum(b, -1) / b.sum(
                -1, keepdims=True
            )
        return np.abs(difference[..., :-1]).sum(-1) * bin_width

    return function


def circular_wasserstein(bin_width):
    """Return the function of two histograms over a circle that is their Wasserstein-1 distance along it.

    The integral of |F - G - median(F - G)|: mass may go either way round (Rabin, Delon & Gousseau 2011, equation 8).
    """

    def function(a, b):
        with np.errstate(invalid="ignore", divide="ignore"):
            difference = np.cumsum(a, -1) / a.sum(-1, keepdims=True) - np.cumsum(b, -1) / b.sum(
                -1, keepdims=True
            )
        return np.abs(difference - np.median(difference, -1, keepdims=True)).sum(-1) * bin_width

    return function


def histogram_of_values(values, num_bins, low, high):
    """Return one-hot rows [N, num_bins] of values [N] between low and high, and a bin's width: a sample as its rows' mean."""
    width = (high - low) / num_bins
    index = np.clip(((values - low) / width).astype(int), 0, num_bins - 1)
    rows = np.zeros((len(values), num_bins))
    rows[np.arange(len(values)), index] = 1
    return rows, width
