"""A training batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """What one process computes in one step.

    Args:
        images: Float32 [B, C, H, W]: micrographs in [-1, 1], or their standardised latents.
        ids: Int64 [B], ids of the views within their side of the split.
        class_labels: Int64 [B], or None where the data have no classes.
        masks: Float32 [B, K, H, W] in [0, 1], one channel a kind of defect, or None.
        noise: Float32, or None. In the denoiser it has the images' shape and is added to them; in
            the autoencoder it has the latents' shape and the posterior is sampled with it.
        timesteps: Int64 [B] or float32 [B], the noise levels of a denoiser, or None.
        first_row: Where this part of a batch begins in the whole batch.
    """

    images: torch.Tensor
    ids: torch.Tensor
    class_labels: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None
    first_row: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return a batch of `function` of each tensor that is there."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: function(value) for name, value in values.items() if torch.is_tensor(value)
        }
        return replace(self, **changed)

    def split(self, size: int) -> Iterator["Batch"]:
        """Yield parts of at most `size` rows, in order."""
        for start in range(0, len(self), size):
            part = self.map(lambda tensor: tensor[start : start + size])  # noqa: B023
            yield replace(part, first_row=self.first_row + start)
