"""Saved autoencoders behind one pair of calls, as the choice among them needs it."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel

from em_diffusion.autoencoder import nearest_codes

KINDS = {"VQModel": ("VQ", VQModel), "AutoencoderKL": ("KL", AutoencoderKL)}
FOLDERS = ("", "autoencoder/vqvae", "pipeline/vqvae", "vqvae")


@dataclass
class Autoencoder:
    """A 1-channel autoencoder in evaluation mode and float32; `num_codes` is None where it has no codebook."""

    model: torch.nn.Module
    kind: str
    num_codes: int | None

    @property
    def device(self):
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode(self, images):
        """Latents [B, C, h, w] of images [B, 1, R, R] before quantisation, or the means of a KL posterior, and the codes
        they fall on: int64 [B, h, w], or None without codes."""
        encoded = self.model.encode(images.to(self.device))
        if self.num_codes is None:
            return encoded.latent_dist.mode(), None
        return encoded.latents, self.find_codes(encoded.latents)

    def find_codes(self, latents):
        vectors = latents.movedim(1, -1)  # [B, h, w, C]
        codebook = self.model.quantize.embedding.weight
        return nearest_codes(vectors.reshape(-1, vectors.shape[-1]), codebook).view(vectors.shape[:-1])

    @torch.no_grad()
    def decode(self, latents):
        """Images [B, 1, R, R] in [-1, 1] of latents as `encode` gives them, quantised where there are codes."""
        if self.num_codes is None:
            return self.model.decode(latents).sample.clamp(-1, 1)
        quantised = self.model.quantize.embedding.weight[self.find_codes(latents)].movedim(-1, 1)
        return self.model.decode(quantised, force_not_quantize=True).sample.clamp(-1, 1)


def load_autoencoder(source, *, device="cpu") -> Autoencoder:
    """Load the autoencoder of a run, of a pipeline, or of a folder saved by diffusers (VQModel, AutoencoderKL).

    Raises `ValueError` with the way out when there is none, or when it is of another kind.
    """
    for folder in (Path(source, name) for name in FOLDERS):
        path = folder / "config.json"
        name = json.loads(path.read_text()).get("_class_name") if path.is_file() else None
        if name in KINDS:
            kind, cls = KINDS[name]
            model = cls.from_pretrained(folder)
            if model.config.in_channels != 1:
                raise ValueError(f"{source} takes images of {model.config.in_channels} channels; micrographs have one")
            return Autoencoder(model.to(device).eval(), kind, getattr(model.config, "num_vq_embeddings", None))
    raise ValueError(
        f"there is no autoencoder in {source}; give a run of train_ldm.py, a pipeline, or a folder saved by diffusers with a "
        f"{' or '.join(KINDS)}"
    )
