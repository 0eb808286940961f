"""Draw images of a translation by their numbers: a tile of the source, then its translation."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from em_cyclegan.config import SAME_PIXEL_SIZE, CycleGANConfig
from em_data import DataConfig, Defect, Tiles, load_data, load_tiles
from em_data.sampler import make_permutation
from em_training import config_from_dict, seed_for

Say = Callable[[str], Any]
MOST_PIXELS = 2**33  # of synthetic micrographs that a run, which may be another's, may ask for


class TranslationDrawer:
    """Draws images of an `EMTranslationPipeline`; arguments as in `Family.start`.

    options: an `em_cyclegan.family.TranslationOptions`.
    run: the configuration of the model's training, as JSON has it; {} if unknown.

    Image i shows tile i of the source in an order that the seed decides. After the last tile, the
    tiles come in another order and under another symmetry.
    """

    fixed_batch = False

    def __init__(
        self,
        pipeline,
        options,
        *,
        seed: int = 0,
        batch_size: int = 50,
        say: Say = print,
        on_progress: Callable[[float], None] | None = None,
        run: Mapping[str, Any] | None = None,
    ):
        self.pipeline, self.options, self.seed, self.say = pipeline, options, seed, say
        self.activity = "writing tiles of the source" if options.untranslated else None
        self.name, self.tiles = load_source(options.source, run or {}, say)
        warn_of_pixel_size(self.tiles, pipeline.config.pixel_size_nm, say)
        self._orders: dict[int, np.ndarray] = {}
        self._has_said_repeats = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of defects that the source has; () without labels."""
        return self.tiles.kinds

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide the images."""
        return {
            "source": self.name,
            "source_fingerprint": self.tiles.fingerprint,
            "untranslated": self.options.untranslated,
        }

    def draw(self, numbers: list[int]) -> torch.Tensor:
        """Return images float32 [B, 1, H, W] in [-1, 1] on the model's device."""
        images = self.tiles.batch([self.find_view(number) for number in numbers])
        return images if self.options.untranslated else self.pipeline.translate(images)

    def draw_layouts(self, numbers: list[int]) -> tuple[torch.Tensor, list[list[Defect]]]:
        """Return images like `draw`, and the defects of the tile that each shows.

        Raises:
            ValueError: If the source has no labels.
        """
        views = [self.find_view(number) for number in numbers]
        tile_ids, _ = self.tiles.locate(views)
        if not self.tiles.is_labelled[tile_ids].all():
            raise ValueError(
                f"The source {self.name} has no labels{' of some tiles' * bool(self.kinds)}, so "
                "its translations have none. Name a labelled source with --source, such as "
                "--source synthetic."
            )
        return self.draw(numbers), [self.tiles.defects(view) for view in views]

    def find_view(self, number: int) -> int:
        """Return the view of the source that an image of this number shows."""
        count, num_symmetries = self.tiles.num_tiles, self.tiles.num_symmetries
        turn, place = divmod(number, count)
        if turn >= num_symmetries and not self._has_said_repeats:
            self._has_said_repeats = True
            self.say(
                f"The source {self.name} has {count:,} tiles, each in {num_symmetries} symmetries: "
                f"images repeat after {count * num_symmetries:,}."
            )
        if turn not in self._orders:
            self._orders[turn] = make_permutation(
                count, seed_for(self.seed, "order of the source"), turn
            )
        return int(self._orders[turn][place]) * num_symmetries + turn % num_symmetries


def load_source(source: str | None, run: Mapping[str, Any], say: Say) -> tuple[str, Tiles]:
    """Return the name and all tiles of the source, in the symmetries of the training.

    Args:
        source: What the user names; None for the source of the training.
        run: As of `TranslationDrawer`.

    Raises:
        ValueError: The source is unknown or cannot be read.
    """
    trained_on = run.get("source")
    if source is None and not isinstance(trained_on, str):
        raise ValueError(
            "It is not known on this machine which micrographs this model translates. Name some "
            "with --source, such as --source synthetic or --source FOLDER."
        )
    tiling = read_tiling(run, say)
    try:
        if source is None or source == trained_on:
            data = load_data(str(trained_on), tiling, log=lambda line: None)
            name, cut = data.summary["name"], data.train.cut
        else:
            tiles = load_tiles(source, tiling, log=say)
            name, cut = source.rstrip("/\\").replace("\\", "/").rpartition("/")[2], tiles.cut
    except (ValueError, OSError) as error:
        named = source if source is not None else f"{trained_on}, the source of the training,"
        raise ValueError(
            f"{named} cannot be read: {error} Name micrographs to translate with --source."
        ) from error
    num_views = cut.num_tiles * len(Tiles(cut, [0], tiling.symmetries).symmetries)
    return name, Tiles(cut, np.arange(num_views), tiling.symmetries)


def read_tiling(run: Mapping[str, Any], say: Say) -> DataConfig:
    """Return how the source of a training was cut; the default tiling if that is unknown."""
    parts = {key: run[key] for key in ("tiles", "source_tiles") if key in run}
    if "tiles" not in parts:
        tiling = DataConfig(symmetries="d4")
        say(f"How this model's source was cut is unknown: tiles of {tiling.resolution} px are used")
        return tiling
    tiling = config_from_dict(CycleGANConfig, parts).tiles_of_source
    num_pixels = (tiling.num_synthetic or tiling.num_micrographs or 0) * tiling.micrograph_size**2
    if num_pixels > MOST_PIXELS:
        say(f"The run asks for {num_pixels:,} synthetic pixels; the default number is drawn")
        defaults = DataConfig()
        tiling = replace(
            tiling,
            num_synthetic=defaults.num_synthetic,
            num_micrographs=defaults.num_micrographs,
            micrograph_size=defaults.micrograph_size,
        )
    return replace(tiling, cache_dir=None)  # a run of others may name any folder


def warn_of_pixel_size(tiles: Tiles, pixel_size_nm: float | None, say: Say) -> None:
    """Say where the source has other pixels than the model was trained to translate."""
    sizes = {each["pixel_size_nm"] for each in tiles.cut.micrographs} - {None}
    if pixel_size_nm is None or not sizes:
        return
    if max(sizes) > pixel_size_nm * (1 + SAME_PIXEL_SIZE) or min(sizes) < pixel_size_nm * (
        1 - SAME_PIXEL_SIZE
    ):
        say(
            f"Warning: pixels of the source are {min(sizes):.3g} to {max(sizes):.3g} nm, but the "
            f"model was trained on {pixel_size_nm:.3g} nm, which the images state."
        )
