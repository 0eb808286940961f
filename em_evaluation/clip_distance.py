"""CMMD: the maximum mean discrepancy of CLIP embeddings, which assumes no Gaussian."""

import numpy as np

from em_evaluation.distances import Distance, mmd_influence

SIGMA = 10.0  # width of the kernel, of the paper
SCALE = 1000.0  # what the paper multiplies by, for legible numbers


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
    return mmd_influence(a, b, _kernel, lambda x: np.ones(len(x)), block).scaled(SCALE)


def cmmd(a, b) -> float:
    """Return CMMD of embeddings a [N, D] and b [M, D] of length 1."""
    return cmmd_influence(a, b).value


def _kernel(x, y):
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
    return np.exp(-squares / (2 * SIGMA**2))
