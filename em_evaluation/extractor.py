"""The interface of feature extractors."""

import hashlib

import torch
import torch.nn.functional as F


class Extractor:
    """A feature network with its preprocessing.

    Subclasses set `name`, `num_features`, `identity` (everything that decides the features:
    network, digest of the weights, resizing, dtype; a part of the cache's key) and define
    `_features`.
    """

    name: str
    identity: str
    num_features: int
    unit_norm = False  # every row has length 1, as CMMD needs it

    def __init__(self, device="cpu", dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map images float [B, 1, H, W] in [-1, 1] to float32 features [B, num_features]."""
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"The images must be [B, 1, H, W], not {list(images.shape)}.")
        return self._features(images.to(self.device, torch.float32)).float().cpu()

    def _features(self, images):
        raise NotImplementedError


def resize(images, size: tuple[int, int], mode="bicubic"):
    """Resize images [B, C, H, W] in [-1, 1] to (height, width), anti-aliased and clipped."""
    if tuple(images.shape[-2:]) == size:
        return images
    options = {} if mode == "nearest" else {"antialias": True, "align_corners": False}
    return F.interpolate(images, size=size, mode=mode, **options).clamp(-1, 1)


def sha256_of(path) -> str:
    """Return the hexadecimal SHA-256 digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
