"""Drawers of images with labels: a maker of layouts around the drawer of any family."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from em_data import DataConfig, Tiles, load_data, load_tiles
from em_generation.families import FAMILIES
from em_generation.label_store import Labels
from em_generation.loading import Model
from em_generation.pairs.labelled import LabelledImages, read_labelled
from em_generation.pairs.makers import NUM_REFERENCES, CopyPaste, LikeLabelled, Maker, Simulated
from em_generation.pairs.options import PairOptions
from em_training import config_from_dict

Say = Callable[[str], object]


class LabelledDrawer:
    """Draws images around the drawer `base`, and keeps their labels until they are taken."""

    def __init__(self, base: Any, options: PairOptions, seed: int, kinds: Sequence[str]):
        self.base, self.options, self.seed, self.kinds = base, options, seed, tuple(kinds)
        self.fixed_batch = base.fixed_batch
        self.images_at_once = getattr(base, "images_at_once", None)
        self.activity = getattr(base, "activity", None)
        self._labels: dict[int, Labels] = {}

    def take(self, number: int) -> Labels:
        """Return the labels of an image that was drawn, and forget them."""
        return self._labels.pop(number)


class PairDrawer(LabelledDrawer):
    """Draws images that its base makes of the pictures of a maker.

    Args:
        base: A drawer of a family with `draws_from_images`.
        maker: Makes the pictures to start from.
        shape: (H, W) of the images.
    """

    def __init__(
        self, base: Any, maker: Maker, options: PairOptions, shape: tuple[int, int], seed: int
    ):
        super().__init__(base, options, seed, maker.kinds)
        self.maker, self.shape = maker, shape

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide images and labels."""
        return self.base.describe() | {
            "pairs": self.options.pairs,
            "labels": sorted(self.options.labels),
            "layouts": self.maker.source,
            "labelled_fingerprint": self.maker.fingerprint,
            "strength": self.options.strength,
            "kinds": list(self.kinds),
        }

    def draw(self, numbers: list[int]) -> torch.Tensor:
        """Return images float32 [B, 1, H, W] in [-1, 1]."""
        started = {
            number: self.maker.start(number, self.shape) for number in dict.fromkeys(numbers)
        }
        pictures = np.stack([started[number][0] for number in numbers])[:, None]
        images = self.base.draw_from(numbers, torch.from_numpy(pictures), self.options.strength)
        images = images.float().cpu().numpy()
        finished: dict[int, tuple[np.ndarray, list]] = {}
        for image, number in zip(images, numbers):
            if number in finished:
                image[...] = finished[number][0]
                continue
            defects = self.maker.finish(number, image[0], started[number][1])
            finished[number] = image, defects
            self._labels[number] = Labels(defects, self._describe(number))
        return torch.from_numpy(images)

    def _describe(self, number):
        return {
            "seed": self.seed,
            "pairs": self.options.pairs,
            "strength": self.options.strength,
            "layout": self.maker.source,
        }


class MaskDrawer(LabelledDrawer):
    """Draws images for the layouts that a family with `draws_layouts` makes itself."""

    def __init__(self, base: Any, options: PairOptions, seed: int):
        super().__init__(base, options, seed, base.kinds)

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide images and labels."""
        labels = sorted(self.options.labels)
        return self.base.describe() | {
            "pairs": "mask",
            "labels": labels,
            "kinds": list(self.kinds),
        }

    def draw(self, numbers: list[int]) -> Any:
        """Return images float32 [B, 1, H, W] in [-1, 1]."""
        images, layouts = self.base.draw_layouts(numbers)
        facts = {"seed": self.seed, "pairs": "mask", "layout": "the model"}
        self._labels |= {i: Labels(each, facts) for i, each in zip(numbers, layouts)}
        return images


def create_pair_drawer(
    base: Any,
    model: Model,
    options: PairOptions,
    *,
    pixel_size_nm: float | None,
    seed: int,
    say: Say,
) -> PairDrawer | MaskDrawer:
    """Return the drawer of pairs around the drawer of a model.

    Raises:
        ValueError: The model's family cannot, or labelled micrographs are missing.
    """
    family = model.family
    if options.pairs == "mask":
        if not family.draws_layouts:
            raise ValueError(
                f"{model.source} is a {model.title}, which does not draw images for masks. "
                f"{_name_families('draws_layouts')}Use --pairs simulated or copy-paste, or another "
                "model."
            )
        return MaskDrawer(base, options, seed)
    if not family.draws_from_images:
        raise ValueError(
            f"{model.source} is a {model.title}, which cannot start from an image, as --pairs "
            f"{options.pairs} needs it. {_name_families('draws_from_images')}Use such a model."
        )
    references = base.draw_references(NUM_REFERENCES)[:, 0].float().cpu().numpy()
    shape = getattr(base, "size", None) or references.shape[1:]
    maker: Maker
    if options.pairs == "simulated" and options.labelled is None:
        if pixel_size_nm is None:
            say("the model's pixel size is unknown: defects are simulated at 1 nm per pixel")
        maker = Simulated(references, pixel_size_nm, seed)
    else:
        labelled = load_labelled(model, options, references.shape[1:], seed=seed, say=say)
        maker = (LikeLabelled if options.pairs == "simulated" else CopyPaste)(labelled, seed)
    return PairDrawer(base, maker, options, tuple(shape), seed)


def load_labelled(
    model: Model, options: PairOptions, tile: tuple[int, int], *, seed: int, say: Say
) -> LabelledImages:
    """Read labelled micrographs.

    Of the data that the model was trained on, only the training side is used, cut as in training:
    the held-out side may judge the images. Of other data, all micrographs are.
    """
    trained_on = (model.config or {}).get("data")
    source = options.labelled or trained_on
    if source is None:
        raise ValueError(
            f"it is unknown which micrographs {model.source} was trained on. Name labelled ones "
            "with --labelled."
        )
    saved = (model.config or {}).get("tiles") or {}
    is_own = bool(saved) and source == trained_on
    config = config_from_dict(DataConfig, saved) if is_own else DataConfig(resolution=tile[0])

    def load(config, log):
        if is_own:
            return load_data(source, config, log=log).train
        return load_tiles(source, config, log=log)

    tiles = enlarge_tiles(load(config, say), load, config)
    return read_labelled(tiles, name=source.rstrip("/").rpartition("/")[2], seed=seed, say=say)


def enlarge_tiles(tiles: Tiles, load: Callable[[DataConfig, Say], Tiles], config) -> Tiles:
    """Return the same micrographs in larger tiles, in which more defects are whole, if they fit."""

    def list_names(tiles):
        return [tiles.cut.micrographs[i]["name"] for i in tiles.micrograph_ids]

    for factor in (4, 2):
        larger = dataclasses.replace(config, resolution=factor * config.resolution)
        with contextlib.suppress(ValueError):  # micrographs are smaller
            found = load(larger, lambda line: None)
            if list_names(found) == list_names(tiles):
                return found
    return tiles


def _name_families(field) -> str:
    """Return a sentence about the families that can."""
    able = [family.title for family in FAMILIES if getattr(family, field)]
    return f"Models of the kind {' or '.join(able)} can. " if able else ""
