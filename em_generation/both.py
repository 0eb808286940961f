"""Images with grain and the same images without it, drawn at once by the network."""

from collections.abc import Sequence
from typing import Any

import torch

from em_training.family import Drawer


class BothGrains:
    """A drawer of images with and without grain, [B, 2, H, W], and what writes them.

    Args:
        drawer: Of a model with grain.
        store, bare: Where images with grain and those without go.
    """

    def __init__(self, drawer: Drawer, store: Any, bare: Any):
        self.fixed_batch, self.draw = drawer.fixed_batch, drawer.draw_both
        self.store, self.bare = store, bare

    def share(self, missing: list[int], process_index: int, num_processes: int) -> list[int]:
        """Return the part of `missing` that one of several processes makes."""
        self.bare.share(missing, process_index, num_processes)
        return self.store.share(missing, process_index, num_processes)

    def write(self, numbers: Sequence[int], images: torch.Tensor) -> int:
        """Write images to both stores; return how many are safe. Thread-safe."""
        return min(
            self.store.write(numbers, images[:, :1]), self.bare.write(numbers, images[:, 1:])
        )
