"""A family of models as a value: all that the commands know about a kind of model.

Each family package defines one `Family` (`em_diffusion.family`, `em_stylegan.family`), and
`em_generation.families` lists them. Commands, reports, cards and the demo ask the value; none of
them asks which family it is. This module imports nothing heavy.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

# From this size on, the libraries compute every row of a batch in the same way, bit for bit (seen
# with oneDNN and MKL on AVX-512). Smaller batches are padded to it.
EXACT_BATCH = 16


class Drawer(Protocol):
    """Draws the images of one model by their numbers; see `Family.start`.

    A drawer of images that are larger than its network's has the attribute `images_at_once`: how
    many of them `draw` takes, and reports progress within them.
    """

    fixed_batch: bool
    """Whether every batch must have the full size, as compiled models need it."""

    def draw(self, numbers: list[int]) -> Any:
        """Return images float32 [B, 1, H, W] in [-1, 1]; image i depends on (seed, i) alone.

        Raises an out-of-memory error if the batch is too large: the caller tries a smaller one.
        """

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide the images, as JSON values for the record."""

    def draw_both(self, numbers: list[int]) -> Any:
        """Return images like `draw`, and the same ones without grain, [B, 2, H, W] in [-1, 1].

        Only drawers of a family with `without_grain` need it.
        """

    def draw_from(self, numbers: list[int], images: Any, strength: float | None) -> Any:
        """Return images like `draw` that start from images [B, 1, H, W] in [-1, 1].

        strength: from 0 (kept but for the model's reconstruction) to 1 (replaced); None: the
            model's own. Only drawers of a family with `draws_from_images` need it and the next.
        """

    def draw_references(self, num_images: int) -> Any:
        """Return `num_images` images of a tile's size without grain, [B, 1, R, R] in [-1, 1]."""

    def draw_layouts(self, numbers: list[int]) -> tuple[Any, list[list[Any]]]:
        """Return images like `draw`, and the defects that each was drawn for (`em_data.Defect`).

        Only drawers of a family with `draws_layouts` need it; they have the attribute `kinds`.
        """

    def walk(self, frames_per_key: int) -> Iterator[Any]:
        """Yield batches of frames [B, 1, H, W] in [-1, 1] on a closed path through images 0 to
        `WALK_KEYS` - 1. Only drawers of a family with `walk_help` need it.
        """


@dataclass(frozen=True)
class Card:
    """How a family's model card is written.

    template: its file in model_cards. package: the package to install. tag: the Hub's tag. noun:
    the kind of model in a sentence. describe: pipeline -> values that only this template needs;
    "base_model" among them is a repository that the Hub shows as the model's origin.
    task: the Hub's pipeline tag. samples_by_drawer: whether the card's images are drawn by the
    family's drawer, since the pipeline's call needs more than random numbers.
    """

    template: str
    package: str
    tag: str
    noun: str
    describe: Callable[[Any], dict[str, Any]]
    task: str = "unconditional-image-generation"
    samples_by_drawer: bool = False


@dataclass(frozen=True)
class Control:
    """An input of the demo page, which sets one field of the family's options.

    name: the field.
    value: at the start; of a "choice" a label, of an "integer" None if it may stay empty.
    choices: {label: value of the field} of a "choice".
    minimum, maximum, step: of a "slider".
    sets: {chosen label: {name of another control: its new value}}.
    only_with: name of another control, without whose value this one has no effect.
    """

    name: str
    label: str
    kind: Literal["slider", "choice", "integer"]
    value: Any
    help: str = ""
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    minimum: float = 0
    maximum: float = 1
    step: float = 1
    sets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    only_with: str = ""


@dataclass(frozen=True)
class Family:
    """A kind of model.

    name: the family's name, such as "ldm".
    titles: {kind: title}. A kind is what `run.json` calls its "family", such as "stylegan3-t".
        The first one is the title of the family itself.
    pipeline: "module:class" of its pipeline, imported when it is used.
    options: frozen dataclass of its sampling options; the fields are the flags of generate.py.
    stages: folders of a run that hold training curves.
    card: how its model card is written.
    drawer: "module:class" of its `Drawer`, imported when it is used.
    read_kind: folder with model_index.json -> kind; reads no weights.
    reconstructions: (pipeline, options, seed) -> {part of the model, such as "autoencoder":
        function that sends real images through it, float [B, 1, H, W] in [-1, 1] -> float32 on
        the CPU}. Each becomes a reference level: the limit that this part sets.
    without_grain: options -> options without noise that is added after the model. Copies of
        training images are sought in such images, since grain would hide them. The drawer then
        has `draw_both`. None if the family has no grain.
    find_exact_modules: pipeline -> modules whose `weight` stays float32 when the rest is
        published in a narrower type.
    draws_from_images, draws_layouts: whether its drawer has `draw_from`, or `draw_layouts`. Without
        them the family draws no images with labels (generate.py --pairs).
    reads_run: whether its drawer takes `run`, the configuration of the model's training, {} if
        unknown. Sources in it that others cannot have are left out.
    controls: pipeline -> what the demo page shows.
    walk_help: one sentence about the drawer's walk, for the demo page; "" if it has none.
    script: the command that trains it, such as "train_ldm.py".
    presets: "module:name" of its presets, {name: function that returns a configuration}.
    train: "module:function" of its training, configuration -> the run's folder.
    """

    name: str
    titles: Mapping[str, str]
    pipeline: str
    options: type
    stages: tuple[str, ...]
    card: Card
    drawer: str
    read_kind: Callable[[Path], str]
    reconstructions: Callable[[Any, Any, int], Mapping[str, Callable]] = lambda *_: {}
    without_grain: Callable[[Any], Any] | None = None
    find_exact_modules: Callable[[Any], tuple[Any, ...]] = lambda pipeline: ()
    draws_from_images: bool = False
    draws_layouts: bool = False
    reads_run: bool = False
    controls: Callable[[Any], tuple[Control, ...]] = lambda pipeline: ()
    walk_help: str = ""
    script: str = ""
    presets: str = ""
    train: str = ""

    @property
    def title(self) -> str:
        """The name of the family in what people read."""
        return next(iter(self.titles.values()))

    @property
    def class_name(self) -> str:
        """The name of the pipeline's class, as model_index.json has it."""
        return self.pipeline.partition(":")[2]

    def import_pipeline(self) -> type:
        """Import the pipeline's class."""
        return _import(self.pipeline)

    def start(self, pipeline: Any, options: Any, **settings: Any) -> Drawer:
        """Return the drawer of a pipeline.

        Args:
            pipeline: Not changed but for the memory layout of its weights.
            options: Sampling options.
            settings: `seed`, `batch_size`, `say` (gets messages) and `on_progress` (gets the
                fraction of a batch that is done).
        """
        return _import(self.drawer)(pipeline, options, **settings)

    def import_presets(self) -> Mapping[str, Callable]:
        """Import the presets of its training."""
        return _import(self.presets)

    def import_train(self) -> Callable[[Any], Any]:
        """Import its training."""
        return _import(self.train)


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


WALK_KEYS = 4


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of a text such as "1024x768", or "1024" for a square.

    Raises:
        ValueError: For another text.
    """
    found = re.fullmatch(r"(\d{1,9})(?:[xX×](\d{1,9}))?", text.strip())
    if found is None:
        raise ValueError(
            f"--size is {text}; give height x width in pixels, such as 1024x768, or one number for "
            "a square"
        )
    return int(found[1]), int(found[2] or found[1])


def check_options(options, **ranges: tuple[float, float]) -> None:
    """Raise `ValueError` for a field outside its (smallest, largest) value; None passes.

    Of a field of several values, each must lie inside.
    """
    for name, (smallest, largest) in ranges.items():
        found = getattr(options, name)
        values = found if isinstance(found, tuple) else (found,)
        for value in values:
            if value is None or smallest <= value <= largest:
                continue
            flag = "--" + name.replace("_", "-")
            bound = (
                f"at least {smallest}" if largest == float("inf") else f"{smallest} to {largest}"
            )
            raise ValueError(f"{flag} is {value}, but must be {bound}.")
