"""Latents of all views, encoded once, kept on disk and read through a memory map."""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from em_data.files import write_atomically
from em_diffusion.autoencoder import encode
from em_diffusion.weights import hash_weights
from em_training import run_in_parts

BATCHES_PER_CHUNK = 4  # what a kill may cost each process


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

    def __len__(self):
        return len(self.array)

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


def encode_latents(
    model, tiles, folder, *, accelerator, batch_size: int = 64, name: str = "train", view_ids=None
):
    """Encode the views `view_ids` of `tiles` (all, if not given) once; return (the memory map [N, C, h, w] float16, seconds).

    An autoencoder does not commute with a flip or a turn, so each view is encoded by itself. Latents are the encoder's
    outputs after `quant_conv`, before quantisation, or the mean of its posterior. The file `folder`/`name`-<key>.npy is
    keyed by the tiles' fingerprint, the encoder's weights and the precision; an existing one is read.

    All processes encode, each its share of the chunks, into one file under another name; `folder` is common to them. A
    chunk is noted as done after it is on the disk, and the file gets its name when all are: a start after a kill encodes
    what is not noted, and nothing half-written is ever read. A batch is the same views whatever the number of processes.
    The seconds are those of encoding, summed over all starts and divided by the number of processes.
    """
    folder = Path(folder)
    view_ids = np.arange(tiles.num_views) if view_ids is None else np.asarray(view_ids)
    views = hashlib.sha256(view_ids.astype(np.int64).tobytes()).hexdigest()
    weights = hash_weights(model, without=("decoder.", "post_quant_conv.", "quantize."))
    key = "\n".join([tiles.fingerprint, views, weights, accelerator.mixed_precision])
    key = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = folder / f"{name}-{key}.npy"
    if not path.exists():
        work = LatentsFile(path, view_ids, batch_size)
        shape = encode_views(model, tiles, view_ids[:1], accelerator).shape[1:]
        if accelerator.is_main_process:
            work.begin(tuple(shape))
        accelerator.wait_for_everyone()
        encode_chunks(work, model, tiles, accelerator, name)
        if accelerator.is_main_process:
            work.finish(accelerator.num_processes)
    accelerator.wait_for_everyone()
    return np.load(path, mmap_mode="r"), json.loads(seconds_path(path).read_text())["seconds"]


def seconds_path(path: Path) -> Path:
    """Where the time is kept that a file of latents took."""
    return path.with_suffix(".json")


class LatentsFile:
    """A file of latents that several processes write, chunk by chunk, and that may be killed at any moment.

    path: the file's name once it is whole; until then it is `path`.partial, and `path`.chunks-<size>/ notes what is done.
    """

    def __init__(self, path: Path, view_ids, batch_size: int):
        size = batch_size * BATCHES_PER_CHUNK
        self.path, self.view_ids, self.batch_size = path, view_ids, batch_size
        self.partial = path.with_name(f"{path.name}.partial")
        self.notes = path.with_name(f"{path.name}.chunks-{size}")
        self.chunks = [
            slice(i, min(i + size, len(view_ids))) for i in range(0, len(view_ids), size)
        ]

    def begin(self, shape: tuple[int, int, int]):
        """Make the file, unless a killed start has left it; throw out the latents of other weights."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        left = self.partial.exists() and self.notes.exists()
        family = self.path.name.rsplit("-", 1)[0]
        for stale in self.path.parent.glob(f"{family}-*"):
            if not (left and stale in (self.partial, self.notes)):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        if not left:
            blank = self.path.with_name(f"{self.path.name}.new")
            array = np.lib.format.open_memmap(
                blank, mode="w+", dtype=np.float16, shape=(len(self.view_ids), *shape)
            )
            array.flush()
            del array
            self.notes.mkdir()
            os.replace(blank, self.partial)

    def batches(self, number: int):
        """The views of a chunk, batch by batch."""
        views = self.view_ids[self.chunks[number]]
        return [views[i : i + self.batch_size] for i in range(0, len(views), self.batch_size)]

    def list_missing(self) -> list[int]:
        """Numbers of the chunks that are not done."""
        done = {int(note.stem) for note in self.notes.glob("*.json")}
        return [number for number in range(len(self.chunks)) if number not in done]

    def count_done(self) -> int:
        """Latents in the chunks that are done, of all processes."""
        missing = self.list_missing()
        return len(self.view_ids) - sum(self.chunks[i].stop - self.chunks[i].start for i in missing)

    def write(self, number: int, latents, seconds: float):
        """Write the latents of a chunk, float16 [n, C, h, w], to the disk, and note that it is done."""
        array = np.lib.format.open_memmap(self.partial, mode="r+")
        array[self.chunks[number]] = latents
        array.flush()
        del array
        write_atomically(self.notes / f"{number:06d}.json", json.dumps({"seconds": seconds}) + "\n")

    def finish(self, num_processes: int):
        """Give the file its name, and keep the time that it took."""
        missing = self.list_missing()
        assert not missing, f"chunks {missing} of {self.path} are missing"
        seconds = sum(json.loads(note.read_text())["seconds"] for note in self.notes.glob("*.json"))
        write_atomically(
            seconds_path(self.path), json.dumps({"seconds": seconds / num_processes}) + "\n"
        )
        os.replace(self.partial, self.path)
        shutil.rmtree(self.notes)


def encode_chunks(work: LatentsFile, model, tiles, accelerator, name: str):
    """Encode this process's share of the chunks that are missing; `ValueError` in all processes where one fails."""
    missing = work.list_missing()
    accelerator.wait_for_everyone()  # all have read the same list before anyone notes a chunk
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    failure = None
    with tqdm(
        total=len(work.view_ids),
        initial=work.count_done(),
        desc=f"latents ({name})",
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        disable=not accelerator.is_main_process,
    ) as bar:
        for number in mine:
            started = time.monotonic()
            try:
                latents = [
                    encode_views(model, tiles, views, accelerator).numpy()
                    for views in work.batches(number)
                ]
            except ValueError as error:
                failure = error
                break
            work.write(number, np.concatenate(latents), time.monotonic() - started)
            bar.update(work.count_done() - bar.n)
        failed = accelerator.reduce(
            torch.tensor([float(failure is not None)], device=accelerator.device), "sum"
        )
        bar.update(work.count_done() - bar.n)
    if failure is not None:
        raise failure
    if failed > 0:
        raise ValueError("another process could not encode its share of the latents; it says why.")


def encode_views(model, tiles, view_ids, accelerator):
    """Latents of these views, float16 [B, C, h, w] on the CPU; `ValueError` where float16 cannot hold them."""
    model = model.eval()

    def encode_part(images):
        with accelerator.autocast():
            latents = encode(
                model, images.to(accelerator.device, memory_format=torch.channels_last)
            )
        return latents.float().cpu().half()

    latents = run_in_parts(encode_part, tiles.batch(view_ids), size=len(view_ids))
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"the autoencoder's latents of views {view_ids[0]} to {view_ids[-1]} are not finite in float16; "
            "it has diverged: train it again with a smaller learning rate, or in float32 (precision 'no')."
        )
    return latents


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
    write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
