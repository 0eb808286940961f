"""Latents of all views, encoded once, kept on disk and read through a memory map."""

import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from em_data.files import flush_to_disk, make_folder, write_atomically
from em_training.memory import run_in_parts
from em_training.nodes import ask_main_process, fail_together

BATCHES_PER_CHUNK = 4  # what a kill may cost each process
GOLDEN_RATIO = (5**0.5 - 1) / 2


class Latents:
    """Latents of every view of some tiles, read like tiles and normalised.

    Args:
        array: Float16 [num_views, C, h, w] in the autoencoder's scale. Encoder outputs are of order
            one, where float16 is eight times finer than bfloat16, and numpy can map it from disk.
        mean, std: C numbers each, measured over the training views.
        class_names: Names of the classes; () for latents without classes.
        classes: Number of each view's class, int64 [num_views]; -1 if it is unknown.
    """

    def __init__(
        self,
        array: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        class_names: Sequence[str] = (),
        classes: np.ndarray | torch.Tensor | None = None,
    ):
        self.array, self.class_names = array, tuple(class_names)
        self._classes = None if classes is None else torch.as_tensor(classes)
        self.mean = torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.array)

    @property
    def num_views(self) -> int:
        """Number of views."""
        return len(self.array)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        return self.array.shape[1:]

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for latents without classes."""
        return len(self.class_names)

    def class_labels(
        self, view_ids: Sequence[int] | np.ndarray | torch.Tensor
    ) -> torch.Tensor | None:
        """Return the class of each view, int64 [B]; `num_classes` for an unknown one.

        None for latents without classes.
        """
        if self._classes is None:
            return None
        labels = self._classes[np.asarray(view_ids)]
        return torch.where(labels < 0, self.num_classes, labels)

    def share_classes(self, numbers: Sequence[int]) -> list[int] | None:
        """Return a class for each image, in the shares of the views; None without classes."""
        return None if self._classes is None else share_classes(self._classes, numbers)

    def batch(self, view_ids: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return normalised latents of these views: float32 [B, C, h, w]."""
        raw = torch.from_numpy(self.array[np.asarray(view_ids)]).float()
        return (raw - self.mean) / self.std


def share_classes(classes: torch.Tensor, numbers: Sequence[int]) -> list[int]:
    """Return a class for each image number: any first images have them in the shares of `classes`.

    The views whose class is known are passed in steps of the golden ratio.

    Args:
        classes: Class of each view, int64 [num_views]; negative if it is unknown.
    """
    known = classes[classes >= 0]
    return [int(known[int(number * GOLDEN_RATIO % 1 * len(known))]) for number in numbers]


def encode_latents(
    encode: Callable[[torch.Tensor], torch.Tensor],
    tiles: Any,
    folder: str | os.PathLike,
    *,
    weights: str,
    remedy: str,
    accelerator: Accelerator,
    batch_size: int = 64,
    name: str = "train",
    view_ids: Sequence[int] | np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """Encode views of `tiles` once and keep them in `folder`.

    An autoencoder does not commute with flips and turns: each view is encoded by itself. The file
    `folder`/`name`-<key>.npy is keyed by the tiles' fingerprint, the encoder's weights and the
    precision. An existing one is read.

    All processes encode, each its share of the chunks, a file each. The main process joins them;
    `folder` is common to them. After a kill, the next start encodes the chunks that are missing. A
    batch is the same views whatever the number of processes.

    Args:
        encode: Images float32 [B, 1, R, R] in [-1, 1] on the device -> latents [B, C, h, w].
        tiles: `em_data.Tiles`, or what has its num_views, fingerprint and batch.
        weights: SHA-256 of what decides the latents of an image.
        remedy: What an error says of latents that are not finite.
        view_ids: Default: all views.

    Returns:
        A memory map of the latents, float16 [N, C, h, w], and the seconds of encoding, summed over
        all starts and divided by the number of processes.

    Raises:
        ValueError: If latents are not finite in float16.
    """
    view_ids = np.arange(tiles.num_views) if view_ids is None else np.asarray(view_ids)
    views = hashlib.sha256(view_ids.astype(np.int64).tobytes()).hexdigest()
    key = "\n".join([tiles.fingerprint, views, weights, accelerator.mixed_precision])
    key = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = Path(folder) / f"{name}-{key}.npy"
    if not ask_main_process(accelerator, lambda: is_whole(path)):
        encode_part = partial(encode_views, encode, tiles, remedy, accelerator)
        size = batch_size * BATCHES_PER_CHUNK
        chunks = path.with_suffix(f".chunks-{size}")
        parts = [view_ids[start : start + size] for start in range(0, len(view_ids), size)]
        missing = ask_main_process(accelerator, lambda: begin(chunks, len(parts)))
        with fail_together(accelerator):
            encode_missing(chunks, missing, parts, encode_part, batch_size, accelerator, name)
        with fail_together(accelerator):
            if accelerator.is_main_process:
                join_chunks(chunks, parts, path, accelerator.num_processes)
    seconds = json.loads(path.with_suffix(".json").read_text())["seconds"]
    return np.load(path, mmap_mode="r"), seconds


def is_whole(path) -> bool:
    """Say whether finished latents and their record can be read."""
    try:
        json.loads(path.with_suffix(".json").read_text())["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return read_shape(path) is not None


def read_shape(path) -> tuple[int, ...] | None:
    """Return the shape of an array on the disk; None if it is absent or damaged."""
    try:
        return np.load(path, mmap_mode="r").shape
    except (OSError, ValueError, EOFError):
        return None


def begin(chunks, num_chunks: int) -> list[int]:
    """Return the numbers of the chunks that are missing; remove latents of other weights."""
    make_folder(chunks)
    for stale in chunks.parent.glob(f"{chunks.name.rsplit('-', 2)[0]}-*"):
        if stale.is_file():
            stale.unlink()
        elif stale != chunks:
            shutil.rmtree(stale)
    done = {path.name for path in chunks.iterdir()}
    return [number for number in range(num_chunks) if name_chunk(number) not in done]


def name_chunk(number: int) -> str:
    """Return the name of the file of a chunk."""
    return f"{number:08d}.npz"


def write_chunk(path, latents, seconds: float):
    """Write the latents of a chunk, and the seconds that they took, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, latents=latents, seconds=seconds)
    write_atomically(path, buffer.getvalue())


def join_chunks(chunks, parts, path, num_processes: int):
    """Join all chunks to one array, keep the time that it took, and remove the chunks.

    Network disks do not bear that several nodes write parts of one file.
    """
    unfinished, seconds, rows = path.with_suffix(".partial"), 0.0, 0
    for number, views in enumerate(parts):
        with np.load(chunks / name_chunk(number)) as chunk:
            latents, seconds = chunk["latents"], seconds + float(chunk["seconds"])
        if number == 0:
            shape = (sum(map(len, parts)), *latents.shape[1:])
            array = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float16, shape=shape)
        array[rows : rows + len(views)] = latents
        rows += len(views)
    array.flush()
    record = json.dumps({"seconds": seconds / num_processes})
    write_atomically(path.with_suffix(".json"), record + "\n")
    os.replace(unfinished, path)
    flush_to_disk(path.parent)
    shutil.rmtree(chunks)


def encode_missing(chunks, missing, parts, encode_part, batch_size, accelerator, name):
    """Encode this process's share of the missing chunks."""
    num_views = sum(map(len, parts))
    num_missing = sum(len(parts[number]) for number in missing)
    with tqdm(
        total=num_views,
        initial=num_views - num_missing,
        desc=f"latents ({name})",
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        disable=not accelerator.is_main_process,
    ) as bar:
        for number in missing[accelerator.process_index :: accelerator.num_processes]:
            started, views = time.monotonic(), parts[number]
            batches = [views[i : i + batch_size] for i in range(0, len(views), batch_size)]
            latents = [encode_part(batch) for batch in batches]
            seconds = time.monotonic() - started
            write_chunk(chunks / name_chunk(number), torch.cat(latents).numpy(), seconds)
            # the others are about as far
            bar.update(min(len(views) * accelerator.num_processes, num_views - bar.n))


def encode_views(encode, tiles, remedy, accelerator, view_ids):
    """Return latents of these views, float16 [B, C, h, w] on the CPU.

    Raises `ValueError` if they are not finite in float16.
    """

    def encode_part(images):
        images = images.to(accelerator.device, memory_format=torch.channels_last)
        with accelerator.autocast():
            latents = encode(images)
        return latents.float().cpu().half()

    latents = run_in_parts(encode_part, tiles.batch(view_ids), size=len(view_ids))
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"the autoencoder's latents of views {view_ids[0]} to {view_ids[-1]} are not finite in "
            f"float16: {remedy}"
        )
    return latents
