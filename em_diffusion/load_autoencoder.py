"""Any autoencoder, from wherever it lies, as one that takes and gives grey images."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel

from em_diffusion.grey import fold_to_grey

KINDS = {"VQModel": ("VQ", VQModel), "AutoencoderKL": ("KL", AutoencoderKL)}
"""Class names in a config.json that are read, what they are called, and the class."""
FOLDERS = ("", "autoencoder/vqvae", "pipeline/vqvae", "vqvae", "vae")
"""Where a run, a pipeline or a model has its autoencoder."""


@dataclass
class Autoencoder:
    """An autoencoder for images [B, 1, H, W] in [-1, 1]; what it is made of does not matter to the caller.

    model: the network, one channel at both ends, in evaluation mode; `model.config` is its configuration.
    kind: "VQ" or "KL".
    num_codes: vectors in its codebook; None without one.
    """

    model: torch.nn.Module
    kind: str
    num_codes: int | None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode(self, images):
        """Latents of images [B, 1, H, W] in [-1, 1] and the codes they fall on: (float32 [B, C, h, w], int64 [B, h, w] or None).

        The latents are the encoder's, before quantisation, in the autoencoder's own scale: what a diffusion model learns. A
        KL autoencoder gives the mean of its posterior.
        """
        images = images.to(self.device, self.model.dtype)
        if self.num_codes is None:
            return self.model.encode(images).latent_dist.mode().float(), None
        latents = self.model.encode(images).latents.float()
        return latents, self.find_codes(latents)

    @torch.no_grad()
    def find_codes(self, latents):
        """The codes that latents [B, C, h, w] fall on: int64 [B, h, w]."""
        indices = self.model.quantize(latents)[2][2]
        return indices.reshape(len(latents), *latents.shape[2:])

    @torch.no_grad()
    def decode(self, latents):
        """Images of latents as `encode` gives them, quantised on the way where there are codes: float32 [B, 1, H, W] in [-1, 1]."""
        return self.model.decode(latents.to(self.device, self.model.dtype)).sample.float().clamp(-1, 1)


def load_autoencoder(source, *, device="cpu") -> Autoencoder:
    """Load the autoencoder of `source`, float32, for grey images.

    source: a run's folder, a pipeline's, or one with a diffusers `VQModel` or `AutoencoderKL`.

    One with three channels is folded to one: exactly what repeating the grey image and averaging the answer gives. Raises
    `ValueError` that names the source when it is none of these.
    """
    folder = _find_folder(Path(source))
    if folder is None:
        raise ValueError(
            f"there is no autoencoder in {source}: expected a run's folder, a pipeline's, or one with the config.json of a "
            f"{' or '.join(KINDS)}"
        )
    kind, cls = KINDS[_read_class_name(folder)]
    model = fold_to_grey(cls.from_pretrained(folder)).eval().to(device)
    return Autoencoder(model, kind, getattr(model.config, "num_vq_embeddings", None))


def _find_folder(path: Path) -> Path | None:
    folders = (path / folder for folder in FOLDERS)
    return next((folder for folder in folders if _read_class_name(folder) in KINDS), None)


def _read_class_name(folder: Path) -> str | None:
    path = folder / "config.json"
    return json.loads(path.read_text()).get("_class_name") if path.is_file() else None
