"""Run lengths: a mask as the lengths of its runs of False and True."""

import numpy as np


def encode_runs(mask) -> list[int]:
    """Return the run lengths of a bool mask [H, W], column by column, starting with False."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return ([0] if flat[0] else []) + counts.tolist()


def decode_runs(counts, shape) -> np.ndarray:
    """Return the bool mask [H, W] of run lengths; the inverse of `encode_runs`."""
    if sum(counts) != shape[0] * shape[1]:
        raise ValueError(
            f"run lengths of {sum(counts)} pixels, but the image has {shape[0]} x {shape[1]}"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(shape, order="F")
