"""The order in which training sees the views."""

import numpy as np


def make_permutation(num, *key):
    """Return a permutation of range(num), a pure function of the whole numbers `key`.

    It sorts raw 64-bit words of PCG64, whose stream numpy guarantees in every version.
    """
    words = np.random.PCG64(np.random.SeedSequence([int(word) for word in key])).random_raw(num)
    return np.argsort(words, kind="stable")


class ImageSampler:
    """An infinite sequence of view ids; each epoch is a permutation keyed by (seed, epoch).

    Position p of the sequence is a pure function of (num_views, seed, p), so that a run can start
    anywhere.
    """

    def __init__(self, num_views: int, seed: int = 0):
        if num_views < 1:
            raise ValueError("There is no view to sample: the training side of the split is empty.")
        if seed < 0:
            raise ValueError(f"seed is {seed}, but must be at least 0.")
        self.num_views = int(num_views)
        self.seed = int(seed)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def indices(self, start: int, count: int) -> np.ndarray:
        """Return the view ids at positions start to start + count - 1, int64 [count]."""
        parts, position, end = [], int(start), int(start) + int(count)
        while position < end:
            epoch, offset = divmod(position, self.num_views)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, make_permutation(self.num_views, self.seed, epoch)
            stop = min(self.num_views, offset + end - position)
            parts.append(self._order[offset:stop])
            position += stop - offset
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
