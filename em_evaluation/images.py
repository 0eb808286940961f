"""Sets of images as the protocol compares them: the same number, one size, 8-bit grey levels, whatever they come from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from em_data import Views
from em_data.intensity import from_uint, to_uint8
from em_evaluation.statistics import iterate_batches


@dataclass
class ModelImages:
    """A model's generated images with what its run says about itself.

    images: a tensor [N, 1, H, W] in [-1, 1], or `em_data.Images`, such as
    `em_data.read_image_folder`'s. curves: stage -> lines of its stats.jsonl. info: anything else for the report, JSON
    values. without_grain: the same images before noise was added to them, where it was: copies are sought in these, since noise
    would hide them.
    """

    name: str
    family: str
    images: Any
    train_seconds: float | None = None
    num_images_seen: int | None = None
    sample_seconds: float | None = None
    sample_images_per_second: float | None = None
    curves: dict[str, list[dict]] = field(default_factory=dict)
    info: dict = field(default_factory=dict)
    without_grain: Any = None


@dataclass
class ImageSet:
    """uint8 images [N, 1, H, W] of one origin; `groups` [N] names what was drawn independently (the micrograph), None
    for each image.
    """

    levels: np.ndarray
    groups: np.ndarray | None = None

    def __len__(self):
        return len(self.levels)

    def batch(self, ids):
        return from_uint(self.levels[np.asarray(ids, dtype=np.int64)])

    @property
    def resolution(self):
        return tuple(self.levels.shape[-2:])


def read_images(images, count, seed=0, batch_size=256) -> ImageSet:
    """Take `count` images of a set on the 8-bit road: drawn views where it is tiles, the first ones where it is
    generated.
    """
    groups = None
    if isinstance(images, Views):
        tile_of_view, _ = images.locate(np.arange(len(images)))
        view_ids = select_views(tile_of_view, count, seed)
        batches = (images.batch(view_ids[i : i + batch_size]) for i in range(0, count, batch_size))
        groups = find_micrographs(images, tile_of_view[view_ids])
    else:
        batches = _take(iterate_batches(images, batch_size), count)
    return ImageSet(np.concatenate([to_uint8(batch) for batch in batches]), groups)


def transform_images(images: ImageSet, function: Callable, batch_size=64) -> ImageSet:
    """Apply `function`, float [B, 1, H, W] -> float [B, 1, H, W] in [-1, 1], and return to 8 bits; the origin stays."""
    with torch.no_grad():
        return ImageSet(
            np.concatenate(
                [to_uint8(function(batch)) for batch in iterate_batches(images, batch_size)]
            ),
            images.groups,
        )


def select_views(tile_of_view, count, seed) -> np.ndarray:
    """Draw `count` views without repetition, given the tile of each [V]: every tile once, in a random symmetry, before
    any tile a second time.
    """
    tile_of_view = np.asarray(tile_of_view)
    shuffled = np.random.default_rng([seed, len(tile_of_view)]).permutation(len(tile_of_view))
    by_tile = shuffled[np.argsort(tile_of_view[shuffled], kind="stable")]
    starts = np.flatnonzero(np.diff(tile_of_view[by_tile], prepend=-1))
    turn = np.empty(len(by_tile), np.int64)  # how many views of its tile come before each view
    turn[by_tile] = np.arange(len(by_tile)) - np.repeat(
        starts, np.diff(starts, append=len(by_tile))
    )
    return shuffled[np.argsort(turn[shuffled], kind="stable")][:count]


def find_micrographs(tiles, tile_ids) -> np.ndarray | None:
    """Return the micrograph of each tile where the tiles know it."""
    rows = getattr(tiles, "rows", None)
    if rows is None or "micrograph" not in rows.column_names:
        return None
    return np.asarray(list(rows["micrograph"]))[tile_ids]


def _take(batches, count):
    for batch in batches:
        yield batch[:count]
        count -= len(batch)
        if count <= 0:
            return
