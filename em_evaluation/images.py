"""Sets of images as the evaluation compares them: one number, one size, 8-bit grey levels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from em_data import Views
from em_data.intensity import from_uint, to_uint8
from em_evaluation.feature_cache import iterate_batches

ENOUGH_MICROGRAPHS = 5  # held out, for an interval over micrographs


@dataclass(frozen=True)
class ClassImages:
    """Images of a model that was asked for classes in turn.

    names: Image i was asked for as names[i mod their number].
    images: A tensor [N, 1, H, W] in [-1, 1], or `em_data.Images`.
    guided: Guidance scale -> such images.
    """

    names: tuple[str, ...]
    images: Any
    guided: Mapping[float, Any] = field(default_factory=dict)

    def list_images(self) -> list:
        return [self.images, *self.guided.values()]


@dataclass
class ModelImages:
    """The generated images of a model, and what is known about it.

    Args:
        name: The model's name in the report.
        images: A tensor [N, 1, H, W] in [-1, 1], or `em_data.Images`.
        family: The kind of model, such as "ldm"; None for a folder of images.
        family_title: The kind of model for people.
        train_seconds, num_images_seen: Of the training.
        sample_seconds, sample_images_per_second: Of the sampling.
        curves: Stage -> lines of its log.
        info: More for the report, JSON values.
        without_grain: The same images before grain was added. Copies are sought in these, since
            grain would hide them.
        reconstructions: Part -> function that sends images float [B, 1, H, W] in [-1, 1] through
            that part of the model, such as "autoencoder". Each is a reference level.
        repeat_of, training_seed: The name that all trainings share which differ from this one in
            the seed alone, and the seed. The report shows their median and range.
        untrained, transferred: Images of the network before this training, with random weights
            or with the weights it started from. Each is a reference level.
        of_classes: Images by class, for a model with classes.
    """

    name: str
    images: Any
    family: str | None = None
    family_title: str = ""
    train_seconds: float | None = None
    num_images_seen: int | None = None
    sample_seconds: float | None = None
    sample_images_per_second: float | None = None
    curves: dict[str, list[dict]] = field(default_factory=dict)
    info: dict = field(default_factory=dict)
    without_grain: Any = None
    reconstructions: Mapping[str, Callable] = field(default_factory=dict)
    untrained: Any = None
    transferred: Any = None
    repeat_of: str = ""
    training_seed: str = ""
    of_classes: ClassImages | None = None


@dataclass
class ImageSet:
    """uint8 images [N, 1, H, W] of one origin.

    groups: What was drawn independently, one name per image [N], such as the micrograph. None:
    each image by itself.
    """

    levels: np.ndarray
    groups: np.ndarray | None = None

    def __len__(self):
        return len(self.levels)

    def batch(self, ids):
        """Return images as float32 [B, 1, H, W] in [-1, 1]."""
        return from_uint(self.levels[np.asarray(ids, dtype=np.int64)])

    @property
    def resolution(self) -> tuple[int, int]:
        return tuple(self.levels.shape[-2:])

    @property
    def num_groups(self) -> int | None:
        return None if self.groups is None else len(np.unique(self.groups))


def read_images(images, count, seed=0, batch_size=256, first=0) -> ImageSet:
    """Read `count` images as 8-bit grey levels.

    Of tiles, views are drawn at random by `select_views`. The first `first` images, or views
    drawn, are passed over.
    """
    groups, ids = None, np.arange(first, first + count)
    if isinstance(images, Views):
        tile_of_view, _ = images.locate(np.arange(len(images)))
        ids = select_views(tile_of_view, first + count, seed)[first:]
        groups = find_micrographs(images, tile_of_view[ids])
    batches = iterate_batches(images, batch_size, ids)
    return ImageSet(np.concatenate([to_uint8(batch) for batch in batches]), groups)


def transform_images(images: ImageSet, function: Callable, batch_size=64) -> ImageSet:
    """Apply `function` to float images [B, 1, H, W] in [-1, 1] and return to 8 bits."""
    with torch.no_grad():
        batches = [to_uint8(function(batch)) for batch in iterate_batches(images, batch_size)]
    return ImageSet(np.concatenate(batches), images.groups)


def select_views(tile_of_view, count, seed) -> np.ndarray:
    """Draw `count` different views; no tile is drawn a second time before every tile is drawn once.

    Args:
        tile_of_view: The tile of each view [V].
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
    """Return the micrograph of each tile, or None if it is unknown.

    Frames of one stack and near copies count as one micrograph: they are no independent draws.
    """
    groups = getattr(tiles, "groups", None)
    return None if groups is None else np.asarray(groups)[tile_ids]


def note_few_micrographs(groups) -> list[str]:
    """Return a note if the reference comes from too few micrographs for a sound interval."""
    number = ENOUGH_MICROGRAPHS if groups is None else len(np.unique(groups))
    if number >= ENOUGH_MICROGRAPHS:
        return []
    few = "one micrograph" if number == 1 else f"{number} micrographs"
    return [
        f"The reference is {few}. The intervals hardly contain the scatter between micrographs "
        "and are too narrow. Use more micrographs (--tiles.held-out-fraction of the training, or "
        "--reference) before you trust a small difference."
    ]
