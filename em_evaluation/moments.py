"""Mean and scatter of features, part by part, and the Frechet distance of them.

The distance needs no more of ten million images than their mean and their scatter; what else is
measured of them rests on a sample.
"""

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from em_evaluation.distances import Distance, check_features


@dataclass(frozen=True)
class Moments:
    """Of `num` rows of features: their mean [D] and their scatter [D, D], in float64.

    The scatter is the sum of (x - mean) (x - mean)^T.
    """

    num: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Return the moments of features [N, D]."""
        rows = np.asarray(features, np.float64)
        mean = rows.mean(0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together (Chan, Golub & LeVeque 1979)."""
        num = self.num + other.num
        shift = other.mean - self.mean
        return Moments(
            num,
            self.mean + shift * (other.num / num),
            self.scatter + other.scatter + np.outer(shift, shift) * (self.num * other.num / num),
        )


def frechet_influence_of_moments(moments: Moments, kept: np.ndarray, b: np.ndarray) -> Distance:
    """Return the Frechet distance of all images to features b, with influences for its interval.

    The value is that of `em_evaluation.distances.frechet_influence` for all images. The influences
    of the generated side are those of the kept images, shrunk by (K / N)^(1/2): resampling them
    gives the scatter that N images have. If all images are kept, they are those of
    `frechet_influence`.

    Args:
        moments: Of all N generated images.
        kept: Features of K of them, drawn at random [K, D].
        b: Features of the real images [M, D].

    Raises:
        ValueError: Unequal D, or fewer than two rows.
    """
    kept, b = check_features(kept, b)
    if moments.num < 2 or len(moments.mean) != b.shape[1]:
        raise ValueError(
            f"The moments are of {moments.num} images and {len(moments.mean)} features, but must "
            f"be of two or more images and {b.shape[1]} features."
        )
    root, inverse = _root(moments)  # [D, E]: scatter / (N - 1) = root root^T
    mean_b = b.mean(0)
    mean_difference = moments.mean - mean_b
    rows_b = (b - mean_b) / np.sqrt(len(b) - 1)
    p, singular_values, q = linalg.svd(
        root.T @ rows_b.T, full_matrices=False, lapack_driver="gesdd"
    )
    trace = np.trace(moments.scatter) / (moments.num - 1) + (rows_b**2).sum()
    value = mean_difference @ mean_difference + trace - 2 * singular_values.sum()

    centred = kept - moments.mean
    inner = ((centred @ inverse @ p) ** 2 * singular_values).sum(1)
    correction = moments.num / (moments.num - 1)
    influence_a = 2 * centred @ mean_difference + correction * ((centred**2).sum(1) - inner)
    shift = -2 * np.sqrt(len(b) - 1) * (rows_b @ mean_difference)
    influence_b = shift + len(b) * ((rows_b**2).sum(1) - (q.T**2 * singular_values).sum(1))
    return Distance(
        float(max(value, 0.0)),
        np.sqrt(len(kept) / moments.num) * (influence_a - influence_a.mean()),
        influence_b - influence_b.mean(),
    )


def _root(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Return a root [D, E] of the covariance and its pseudo-inverse, transposed, [D, E].

    Directions in which the features do not vary, but for rounding, are left out.
    """
    values, vectors = linalg.eigh(moments.scatter / (moments.num - 1))
    is_large = values > len(values) * np.finfo(np.float64).eps * values[-1]
    roots = np.sqrt(values[is_large])
    return vectors[:, is_large] * roots, vectors[:, is_large] / roots
