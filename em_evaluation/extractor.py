"""What every feature extractor answers."""

import torch


class Extractor:
    """A feature network with its preprocessing.

    `identity` is a sentence of everything that decides the features: network, weights' digest, resizing, input side,
    grey to colour, dtype; it is a part of the key of the feature cache. Subclasses set `name`, `identity`,
    `num_features` and define `_features`.
    """

    name: str
    identity: str
    num_features: int
    unit_norm = False  # whether every row has length 1, as CMMD needs it

    def __init__(self, device="cpu", dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map images float [B, 1, H, W] in [-1, 1] to float32 features [B, num_features] on the CPU."""
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(
                f"images must be [B, 1, H, W], grey in [-1, 1], and are {list(images.shape)}"
            )
        return self._features(images.to(self.device, torch.float32)).float().cpu()

    def _features(self, images):
        raise NotImplementedError
