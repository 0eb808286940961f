"""Features of a set of images, cached by content, and their streaming mean and covariance."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from em_data.files import find_cache_dir
from em_data.images import as_images


class FeatureStatistics:
    """Mean and covariance of features in float64, gathered batch by batch and merged exactly (Chan, Golub & LeVeque
    1983).

    `update` takes [B, D]; `merge` adds another's, such as another process's; the result depends on batches and order by
    rounding only.
    """

    def __init__(self, num_features: int):
        self.num_images = 0
        self.mean = np.zeros(num_features)
        self.scatter = np.zeros((num_features, num_features))  # sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features):
        statistics = cls(np.shape(features)[1])
        statistics.update(features)
        return statistics

    def update(self, features) -> None:
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be [B, {len(self.mean)}], and are {features.shape}")
        if len(features) == 0:
            return
        mean = features.mean(0)
        centred = features - mean
        self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: "FeatureStatistics") -> None:
        if len(other.mean) != len(self.mean):
            raise ValueError(
                f"statistics of {len(self.mean)} and {len(other.mean)} features come from different extractors"
            )
        if other.num_images:
            self._add(other.num_images, other.mean, other.scatter)

    def _add(self, num_images, mean, scatter):
        total = self.num_images + num_images
        difference = mean - self.mean
        self.scatter += scatter + np.outer(difference, difference) * (
            self.num_images * num_images / total
        )
        self.mean = self.mean + difference * (num_images / total)
        self.num_images = total

    @property
    def covariance(self) -> np.ndarray:
        if self.num_images < 2:
            raise ValueError(f"a covariance needs at least two images, not {self.num_images}")
        return self.scatter / (self.num_images - 1)


def iterate_batches(images, batch_size):
    """Yield float32 batches [B, 1, H, W] in [-1, 1] of a tensor, an array or `em_data.Images`."""
    images = as_images(images)
    for start in range(0, len(images), batch_size):
        yield images.batch(range(start, min(start + batch_size, len(images))))


def content_digest(images, batch_size=256) -> str:
    """Return the SHA-256 of the images' number, shape and float32 values in order: what the cache knows a set by."""
    digest = hashlib.sha256()
    shape = None
    for batch in iterate_batches(images, batch_size):
        if shape is None:
            shape = tuple(batch.shape[1:])
            digest.update(f"{len(images)} {shape}".encode())
        if tuple(batch.shape[1:]) != shape:
            raise ValueError(
                f"images of one set must have one size: {shape} and {tuple(batch.shape[1:])}"
            )
        digest.update(np.ascontiguousarray(batch.cpu().numpy()).tobytes())
    return digest.hexdigest()


def compute_features(
    images, extractor, *, batch_size=32, cache_dir=None, use_cache=True, progress=None, state=None
) -> np.ndarray | None:
    """Return float32 features [N, D] of images, from the cache where the same images went through the same extractor.

    images: a tensor [N, 1, H, W] in [-1, 1], or `em_data.Images`. The cache file's name
    is the SHA-256 of the images' content and the extractor's identity, so that two sets never share one, whatever they
    are called; it is written atomically into `cache_dir`/features, by default in the user's cache. `progress` is called
    with the number of images done. state: accelerate's state where several processes call this together, each with all of the
    images: they share the work, and the main process alone gets the features, the others None. `ValueError` for an
    empty set.
    """
    if len(images) == 0:
        raise ValueError("there are no images to compute features of")
    is_main, path, features = state is None or state.is_main_process, None, None
    if use_cache and is_main:
        key = hashlib.sha256(f"{content_digest(images)}\n{extractor.identity}".encode()).hexdigest()
        path = find_cache_dir(cache_dir) / "features" / f"{key}.npy"
        with contextlib.suppress(
            FileNotFoundError, ValueError, EOFError
        ):  # absent or damaged: computed again
            cached = np.load(path, allow_pickle=False)
            features = cached if cached.shape == (len(images), extractor.num_features) else None
    if _is_known(features, state):
        return features
    features = _compute_shares(images, extractor, batch_size, progress, state)
    if not np.isfinite(features).all():
        raise ValueError(
            f"{extractor.name} gives non-finite features: the images hold NaN or infinite values"
        )
    if path is not None:
        save_array(path, features)
    return features if is_main else None


def _is_known(features, state):
    """Return on every process whether the main one has found the features."""
    if state is None or state.num_processes == 1:
        return features is not None
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([features is not None])[0]


def _compute_shares(images, extractor, batch_size, progress, state):
    """Return the features of all images, each process having computed its contiguous share of them."""
    num_processes, index = (
        (state.num_processes, state.process_index) if state is not None else (1, 0)
    )
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
    return gathered[: len(images)]  # what fills up the last share is cut off


def save_array(path: Path, array) -> None:
    """Write an array to `path` atomically: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=path.name, suffix=".part", delete=False
    ) as file:
        try:
            np.save(file, array, allow_pickle=False)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
