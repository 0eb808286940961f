"""Latents of all views, encoded once, kept on disk and read through a memory map."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from em_diffusion.autoencoder import encode, hash_weights
from em_training import write_text_atomically


class Latents:
    """Encoder outputs of every view of some tiles; reads like `Tiles` and gives normalised latents.

    array: float16 [num_views, C, h, w], in the autoencoder's scale. Encoder outputs are of order one, where float16 is
        eight times finer than bfloat16 (a relative error of 2^-11), and numpy maps it without a detour; an output beyond
        its range, 65504, is refused when encoding.
    mean, std: of each channel, C numbers, measured over the training views.
    """

    def __init__(self, array, mean, std):
        self.array = array
        self.mean = torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1)

    @property
    def num_views(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        return self.array.shape[1:]

    def batch(self, view_ids):
        """Normalised latents of these views, float32 [B, C, h, w]: mean 0 and deviation 1 in each channel."""
        raw = torch.from_numpy(self.array[np.asarray(view_ids)]).float()
        return (raw - self.mean) / self.std


def encode_latents(vqvae, tiles, folder, *, accelerator, batch_size: int = 64, name: str = "train", view_ids=None):
    """Encode the views `view_ids` of `tiles` (all, if not given) once; return the memory map, float16 [N, C, h, w].

    An autoencoder does not commute with a flip or a turn, so each view is encoded by itself. Latents are the encoder's
    outputs after `quant_conv`, before quantisation, or the mean of its posterior. The file `folder`/`name`-<key>.npy is keyed
    by the tiles' fingerprint, the encoder's weights and the precision, and is put in place whole or not at all; an existing
    one is read. The main process encodes, others wait.
    """
    folder = Path(folder)
    view_ids = np.arange(tiles.num_views) if view_ids is None else np.asarray(view_ids)
    views = hashlib.sha256(view_ids.astype(np.int64).tobytes()).hexdigest()
    key = [tiles.fingerprint, views, hash_weights(vqvae, without=("decoder.", "post_quant_conv.", "quantize."))]
    key = hashlib.sha256("\n".join([*key, accelerator.mixed_precision]).encode()).hexdigest()[:16]
    path = folder / f"{name}-{key}.npy"
    if accelerator.is_main_process and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{name}-*.npy*"):
            stale.unlink()
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        _encode_to_file(vqvae, tiles, view_ids, partial, accelerator, batch_size, name)
        os.replace(partial, path)
    accelerator.wait_for_everyone()
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def _encode_to_file(vqvae, tiles, view_ids, path, accelerator, batch_size, name):
    vqvae = vqvae.eval()
    array = None
    with tqdm(total=len(view_ids), desc=f"latents ({name})", unit="img", unit_scale=True, dynamic_ncols=True) as bar:
        for start in range(0, len(view_ids), batch_size):
            part = view_ids[start : start + batch_size]
            images = tiles.batch(part).to(accelerator.device, memory_format=torch.channels_last)
            with accelerator.autocast():
                latents = encode(vqvae, images).float()
            latents = latents.cpu().half()
            if not torch.isfinite(latents).all():
                raise ValueError(
                    f"the autoencoder's latents of views {part[0]} to {part[-1]} are not finite in float16; "
                    "it has diverged: train it again with a smaller learning rate, or in float32 (precision 'no')."
                )
            if array is None:
                shape = (len(view_ids), *latents.shape[1:])
                array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
            array[start : start + len(part)] = latents.numpy()
            bar.update(len(part))
    array.flush()
    del array


def measure_latents(array, chunk: int = 4096):
    """Mean and standard deviation of each channel of [N, C, h, w] in float64: two lists of C floats.

    Raises `ValueError` when a channel does not vary: the autoencoder does not use it.
    """
    count = array.shape[0] * array.shape[2] * array.shape[3]
    chunks = [slice(start, start + chunk) for start in range(0, len(array), chunk)]
    mean = sum(array[c].astype(np.float64).sum(axis=(0, 2, 3)) for c in chunks) / count
    centred = mean[None, :, None, None]
    std = np.sqrt(sum(((array[c] - centred) ** 2).sum(axis=(0, 2, 3)) for c in chunks) / count)
    if not (std > 1e-6).all():
        raise ValueError(
            f"latent channels {np.flatnonzero(std <= 1e-6).tolist()} do not vary: the autoencoder has collapsed; "
            "train it longer, or with another learning rate or seed."
        )
    return mean.tolist(), std.tolist()


def store_latent_statistics(autoencoder_dir, mean, std):
    """Write `latents_mean` and `latents_std`, one number a channel, into the config.json of a saved autoencoder."""
    path = Path(autoencoder_dir) / "config.json"
    config = json.loads(path.read_text()) | {"latents_mean": list(mean), "latents_std": list(std)}
    write_text_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
