"""The Frechet distance from means and covariances, and streaming moments: slow twins of
em_evaluation.
"""

import numpy as np
from scipy import linalg


def frechet_distance_from_statistics(mean_a, covariance_a, mean_b, covariance_b) -> float:
    """Return the Frechet distance of two Gaussians from means [D] and covariances [D, D].

    tr (S_a S_b)^(1/2) is the sum of the roots of the eigenvalues of S_b S_a, which are those of the
    symmetric matrix L^T S_b L with S_a = L L^T (Cholesky). Where the rounding of an eigenvalue
    could be felt in that sum (singular or nearly singular covariances), it is the sum of the
    singular values of L_a^T L_b instead, slower and exact there too. `ValueError` for unequal D.
    """
    mean_a, mean_b = np.asarray(mean_a, np.float64), np.asarray(mean_b, np.float64)
    covariance_a, covariance_b = (
        np.asarray(covariance_a, np.float64),
        np.asarray(covariance_b, np.float64),
    )
    if mean_a.shape != mean_b.shape or covariance_a.shape != covariance_b.shape:
        raise ValueError(
            f"the statistics have {mean_a.size} and {mean_b.size} dimensions: they come from "
            f"different extractors"
        )
    nuclear_norm = sum_roots_of_eigenvalues(covariance_a, covariance_b)
    if nuclear_norm is None:
        nuclear_norm = linalg.svdvals(
            _square_root(covariance_a).T @ _square_root(covariance_b)
        ).sum()
    return sum_up(mean_a - mean_b, np.trace(covariance_a), np.trace(covariance_b), nuclear_norm)


def sum_roots_of_eigenvalues(covariance_a, covariance_b, tolerance=1e-8):
    """tr (S_a S_b)^(1/2) from eigenvalues, or None where their rounding may move it by more than
    `tolerance` of itself.

    An eigenvalue of a symmetric matrix is off by about eps times the largest, hence its root by eps
    max / (2 root)."""
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
        return symmetric_root(covariance)


def symmetric_root(covariance):
    eigenvalues, eigenvectors = linalg.eigh(covariance)
    rounding = len(eigenvalues) * np.finfo(np.float64).eps * abs(eigenvalues[-1])
    return eigenvectors * np.sqrt(np.where(eigenvalues > rounding, eigenvalues, 0.0))


def sum_up(mean_difference, trace_a, trace_b, nuclear_norm):
    return float(max(mean_difference @ mean_difference + trace_a + trace_b - 2 * nuclear_norm, 0.0))


class FeatureStatistics:
    """Mean and covariance of features in float64, gathered batch by batch and merged exactly (Chan,
    Golub & LeVeque 1983).

    `update` takes [B, D]; `merge` adds another's, such as another process's; the result depends on
    batches and order by rounding only."""

    def __init__(self, num_features: int):
        self.num_images = 0
        self.mean = np.zeros(num_features)
        self.scatter = np.zeros((num_features, num_features))  # sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features):
        statistics = cls(np.shape(features)[1])
        statistics.update(features)
        return statistics

    def update(self, features) -> None:
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be [B, {len(self.mean)}], and are {features.shape}")
        if len(features) == 0:
            return
        mean = features.mean(0)
        centred = features - mean
        self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: "FeatureStatistics") -> None:
        if len(other.mean) != len(self.mean):
            raise ValueError(
                f"statistics of {len(self.mean)} and {len(other.mean)} features come from "
                f"different extractors"
            )
        if other.num_images:
            self._add(other.num_images, other.mean, other.scatter)

    def _add(self, num_images, mean, scatter):
        total = self.num_images + num_images
        difference = mean - self.mean
        self.scatter += scatter + np.outer(difference, difference) * (
            self.num_images * num_images / total
        )
        self.mean = self.mean + difference * (num_images / total)
        self.num_images = total

    @property
    def covariance(self) -> np.ndarray:
        if self.num_images < 2:
            raise ValueError(f"a covariance needs at least two images, not {self.num_images}")
        return self.scatter / (self.num_images - 1)
