"""Features of a set of images, cached by the content of the images."""

import contextlib
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from em_data.files import find_cache_dir, write_atomically
from em_data.images import Images, as_images
from em_evaluation.extractor import Extractor


def iterate_batches(images, batch_size, ids=None):
    """Yield float32 batches [B, 1, H, W] in [-1, 1] of a tensor, an array or `em_data.Images`.

    ids: The images to read. Default: all.
    """
    images = as_images(images)
    ids = range(len(images)) if ids is None else ids
    for start in range(0, len(ids), batch_size):
        yield images.batch(ids[start : start + batch_size])


def content_digest(images, batch_size=256) -> str:
    """Return the SHA-256 of the images' number, shape and float32 values in order."""
    digest = hashlib.sha256()
    shape = None
    for batch in iterate_batches(images, batch_size):
        if shape is None:
            shape = tuple(batch.shape[1:])
            digest.update(f"{len(images)} {shape}".encode())
        if tuple(batch.shape[1:]) != shape:
            raise ValueError(
                f"The images of a set must have one size, not {shape} and {tuple(batch.shape[1:])}."
            )
        digest.update(np.ascontiguousarray(batch.cpu().numpy()).tobytes())
    return digest.hexdigest()


def compute_features(
    images: Images | torch.Tensor | np.ndarray,
    extractor: Extractor,
    *,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    use_cache: bool = True,
    progress: Callable[[int], object] | None = None,
    state: Any = None,
) -> np.ndarray | None:
    """Compute the features of images, or read them from the cache.

    The name of the cache file is the SHA-256 of the images' content and the extractor's identity,
    so that two sets never share a file, whatever they are called.

    Args:
        images: A tensor [N, 1, H, W] in [-1, 1], or `em_data.Images`.
        extractor: An `Extractor`.
        batch_size: Images at once.
        cache_dir: The features are in cache_dir/features. Default: the user's cache folder.
        use_cache: Whether to read and write the cache.
        progress: Called with the number of images done.
        state: accelerate's state, if several processes call this together, each with all of the
            images. They share the work; only the main process gets the features.

    Returns:
        float32 features [N, D]; None on all processes but the main one.

    Raises:
        ValueError: The set is empty, or the features are not finite.
    """
    if len(images) == 0:
        raise ValueError("There are no images to compute features of.")
    is_main, path, features = state is None or state.is_main_process, None, None
    if use_cache and is_main:
        key = hashlib.sha256(f"{content_digest(images)}\n{extractor.identity}".encode()).hexdigest()
        path = find_cache_dir(cache_dir) / "features" / f"{key}.npy"
        # absent or damaged: computed again
        with contextlib.suppress(FileNotFoundError, ValueError, EOFError):
            cached = np.load(path, allow_pickle=False)
            features = cached if cached.shape == (len(images), extractor.num_features) else None
    if _is_known(features, state):
        return features
    features = _compute_shares(images, extractor, batch_size, progress, state)
    if not np.isfinite(features).all():
        raise ValueError(
            f"The features of {extractor.name} are not finite: the images hold NaN or infinity."
        )
    if path is not None:
        save_array(path, features)
    return features if is_main else None


def _is_known(features, state):
    """Return on every process whether the main one found the features in the cache."""
    if state is None or state.num_processes == 1:
        return features is not None
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([features is not None])[0]


def _compute_shares(images, extractor, batch_size, progress, state):
    """Compute each process's share of the features and gather all of them."""
    num_processes, index = (state.num_processes, state.process_index) if state else (1, 0)
    images = as_images(images)
    share = -(-len(images) // num_processes)
    first, last = min(index * share, len(images)), min((index + 1) * share, len(images))
    features = np.zeros((share, extractor.num_features), np.float32)
    for start in range(first, last, batch_size):
        stop = min(start + batch_size, last)
        features[start - first : stop - first] = extractor(images.batch(range(start, stop))).numpy()
        if progress:
            progress(stop - first)
    if num_processes == 1:
        return features
    from accelerate.utils import gather

    gathered = gather(torch.from_numpy(features).to(state.device)).cpu().numpy()
    return gathered[: len(images)]  # without the padding of the last share


def save_array(path: Path, array) -> None:
    """Write an array to `path` atomically."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
