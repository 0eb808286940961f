"""Latents of an autoencoder of ours or of others: encoded once, measured, and standardised."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from diffusers import ModelMixin

from em_data import Tiles
from em_data.files import write_atomically
from em_diffusion.autoencoder import encode
from em_training import latents
from em_training.weights import hash_weights

REMEDY = (
    "it has diverged. Train it again with a smaller --autoencoder.learning-rate, or in float32 "
    "with --precision no."
)


def encode_latents(
    model: ModelMixin,
    tiles: Tiles,
    folder: str | os.PathLike,
    *,
    accelerator: Accelerator,
    **options: Any,
) -> tuple[np.ndarray, float]:
    """Encode views of `tiles` by an autoencoder once and keep them in `folder`.

    options: `batch_size`, `name` and `view_ids` of `em_training.latents.encode_latents`, which also
    tells what is returned and raised.
    """
    return latents.encode_latents(
        partial(encode, model.eval()),
        tiles,
        folder,
        weights=hash_encoder(model),
        remedy=REMEDY,
        accelerator=accelerator,
        **options,
    )


def hash_encoder(model: ModelMixin) -> str:
    """Return the SHA-256 of the weights of an autoencoder that decide its latents."""
    return hash_weights(model, without=("decoder.", "post_quant_conv.", "quantize."))


def measure_latents(array, chunk: int = 4096):
    """Return mean and standard deviation of each channel of [N, C, h, w]: two lists of C floats.

    Raises `ValueError` if a channel does not vary: the autoencoder does not use it.
    """
    count = array.shape[0] * array.shape[2] * array.shape[3]
    chunks = [slice(start, start + chunk) for start in range(0, len(array), chunk)]
    mean = sum(array[c].astype(np.float64).sum(axis=(0, 2, 3)) for c in chunks) / count
    centred = mean[None, :, None, None]
    std = np.sqrt(sum(((array[c] - centred) ** 2).sum(axis=(0, 2, 3)) for c in chunks) / count)
    if not (std > 1e-6).all():
        raise ValueError(
            f"latent channels {np.flatnonzero(std <= 1e-6).tolist()} do not vary: the autoencoder "
            "has collapsed. Train it longer, or with another learning rate or seed."
        )
    return mean.tolist(), std.tolist()


def store_latent_statistics(autoencoder_dir, mean, std):
    """Write `latents_mean` and `latents_std` into the config.json of a saved autoencoder."""
    path = Path(autoencoder_dir) / "config.json"
    config = json.loads(path.read_text()) | {"latents_mean": list(mean), "latents_std": list(std)}
    write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
