"""A model -> a folder of images, in batches, over processes, and resumable."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import accelerate
import torch
from tqdm.auto import tqdm

from em_data import read_image_folder
from em_data.figures import save_grid_with_scale_bar
from em_data.files import name_full_disk, write_atomically
from em_evaluation.environment import count_cores
from em_generation.both import BothGrains
from em_generation.folder import RECORD, hold_folder, open_folder, refuse_foreign_folder
from em_generation.label_store import LabelFormat, create_labelled_store
from em_generation.loading import Model, read_model
from em_generation.pairs import create_pair_drawer
from em_generation.sampling import draw_images
from em_generation.store import NameClasses, create_store
from em_training import choose_precision, create_process_state
from em_training.classes import name_classes
from em_training.family import check_options
from em_training.nodes import ask_main_process, check_common_folder, fail_together

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_WRITERS = 8
PREVIEW_IMAGES, PREVIEW_PX = 16, 2048  # at most, in number and side
MOST_IN_SHARDS = 1_000_000_000  # images of a folder of shards
MOST_IMAGES = 10_000_000  # of another folder

ImageFormat = Literal["png", "tiff", "arrow", "webdataset"]
Precision = Literal["auto", "bf16", "fp16", "no"]


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Generate images from a trained model into a folder."""

    model: str
    """A run's folder, a folder with a saved pipeline, a model in the package such as em-ldm-64, or
    a Hub id (owner/name, owner/name@revision)."""
    out: str
    """Folder for the images and generation.json. The same command resumes where it stopped."""
    num_images: int = 1000
    """Number of images in the folder at the end."""
    seed: int = 0
    """Image i depends on this seed and on i alone, whatever the batch size or the number of
    processes: bit for bit on the CPU with one thread a process and batches of 16 or more, else up
    to rounding (at most one of 256 grey levels)."""
    batch_size: int = 50
    """Images drawn at a time by each process. It is halved when the memory runs out."""
    format: ImageFormat = "png"
    """png or tiff: one file per image. arrow: a data set for `datasets.load_from_disk`. webdataset:
    tar files; needs --shard."""
    bits: Literal[8, 16] = 8
    """Bits per pixel."""
    precision: Precision = "auto"
    """Number type of the model. auto: that of `accelerate launch
    --mixed_precision`, else bf16 if the hardware has it, else float32. no: float32."""
    pairs: Any = None
    """An `em_generation.pairs.PairOptions`, if labels are to be written, too."""
    shards: Any = None
    """An `em_generation.shards.plan.ShardOptions`, if `generate_shard` is to write a shard."""
    options: Any = None
    """Sampling options of the model's family, such as `em_diffusion.family.LDMOptions`. Default:
    the family's."""

    def __post_init__(self):
        check_options(self, num_images=(1, MOST_IN_SHARDS), seed=(0, 2**63), batch_size=(1, 65_536))
        for name, kind in (
            ("format", ImageFormat),
            ("bits", Literal[8, 16]),
            ("precision", Precision),
        ):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(map(str, get_args(kind)))
                raise ValueError(f"--{name} is {getattr(self, name)}; choose one of {choices}.")
        if self.num_images > MOST_IMAGES and self.format in ("png", "tiff"):
            raise ValueError(
                f"--num-images is {self.num_images:,}, but a folder holds at most {MOST_IMAGES:,} "
                "files. Use --format arrow or webdataset with --shard."
            )

    @property
    def dtype(self) -> torch.dtype:
        """The number type that `precision` means on this machine."""
        return DTYPES[choose_precision(self.precision)]


def generate_images(
    config: GenerationConfig, model: Model | None = None, bare: GenerationConfig | None = None
) -> dict:
    """Generate the images that are missing and return the record that generation.json holds.

    Args:
        model: `read_model(config.model)`, if the caller has it already.
        bare: Of the same images without grain, in another folder. If the model has grain, what both
            folders lack is drawn at once. `generate_images(bare)` then generates the rest.

    Returns:
        {"name", "family" (the kind of model), "settings", "num_images", "timed_images",
        "sample_seconds", "sample_images_per_second"}. Seconds count drawing and writing, not
        loading. A part that was killed counts neither in timed_images nor in sample_seconds.

    Raises:
        ValueError: The folder holds images of other settings or of another model, another process
            writes into it, or the model diverged.
        OSError: The disk is full. Images written so far are whole.
    """
    if config.format == "webdataset":
        raise ValueError("--format webdataset is written by shards. Add --shard 1/1.")
    model = read_model(config.model) if model is None else model
    config = fill_options(config, model)
    state = create_process_state()
    out = Path(config.out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(name_full_disk(out))
        enter_folder(out, state, stack)
        return _generate(config, model, state, out, bare)


def fill_options(config: GenerationConfig, model: Model) -> GenerationConfig:
    """Return the configuration with the family's sampling options where it has none."""
    options = model.family.options() if config.options is None else config.options
    if not isinstance(options, model.family.options):
        raise ValueError(
            f"{config.model} is a {model.title} and takes {model.family.options.__name__}, "
            f"not {type(options).__name__}."
        )
    return dataclasses.replace(config, options=options)


def _generate(config: GenerationConfig, model: Model, state, out: Path, bare=None) -> dict:
    progress = Progress()
    with fail_together(state):
        started = start_drawing(config, model, state.device, progress)
    drawer, record = started.drawer, started.record
    before = open_folder(out, record, state)
    store = started.create_store(out, config.format)
    missing = ask_main_process(state, lambda: store.find_missing(config.num_images))
    work: list[tuple[Any, Any, list[int]]] = [(drawer, store, missing)]
    with contextlib.ExitStack() as stack:
        # the same in all processes, since they wait for each other here
        if bare is not None and record["settings"].get("grain"):
            bare_store = open_bare(bare, started, state, stack)
            found = ask_main_process(state, lambda: bare_store.find_missing(bare.num_images))
            left = set(found)
            both = BothGrains(drawer, store, bare_store)
            work = [(both, both, [i for i in missing if i in left])]
            work += [(drawer, store, [i for i in missing if i not in left])]
        state.wait_for_everyone()  # all have seen the same folder before any writes to it
        count, began = 0, time.monotonic()
        for draws, writes, numbers in work:
            mine = writes.share(numbers, state.process_index, state.num_processes)
            draw_missing(draws, mine, config, model, writes.write, state, progress)
            count += len(mine)
    parts = [(count, time.monotonic() - began)]
    if state.num_processes > 1:
        parts = accelerate.utils.gather_object(parts)

    before = before or {}
    seconds = max(seconds for _, seconds in parts)
    record["num_images"] = max(config.num_images, before.get("num_images", 0))
    record["timed_images"] = before.get("timed_images", 0) + sum(images for images, _ in parts)
    record["sample_seconds"] = before.get("sample_seconds", 0.0) + seconds
    if record["timed_images"]:
        record["sample_images_per_second"] = record["timed_images"] / record["sample_seconds"]
    if state.is_main_process:
        store.finish()
        write_atomically(out / RECORD, json.dumps(record, indent=2) + "\n")
    state.wait_for_everyone()
    return record


def enter_folder(out: Path, state, stack: contextlib.ExitStack) -> None:
    """Refuse a folder with other files or on another disk, and hold it until `stack` ends."""
    with fail_together(state):
        refuse_foreign_folder(out)
        if state.is_main_process:
            stack.enter_context(hold_folder(out))
    check_common_folder(out, state)


def open_bare(bare: GenerationConfig, started: "Started", state, stack: contextlib.ExitStack):
    """Return the store of the same images without grain; `stack` holds its folder."""
    out = Path(bare.out)
    enter_folder(out, state, stack)
    settings = started.record["settings"] | {"grain": False}
    open_folder(out, started.record | {"settings": settings}, state)
    return started.create_store(out, bare.format)


@dataclasses.dataclass(frozen=True)
class Started:
    """A model that is ready to draw.

    record: name, family and the settings that decide the images. labels: None without --pairs.
    """

    drawer: Any
    record: dict[str, Any]
    bits: int
    pixel_size_nm: float | None
    name_classes: NameClasses | None
    labels: LabelFormat | None

    def create_store(self, out: Path, format: str):
        """Return the store of a format: "png", "tiff" or "arrow"."""
        written = (out, format, self.bits, self.pixel_size_nm)
        if self.labels is None:
            return create_store(*written, self.name_classes)
        return create_labelled_store(*written, self.labels, self.name_classes)


def start_drawing(config: GenerationConfig, model: Model, device, progress: "Progress") -> Started:
    """Load the model, and start its drawer with the options of the configuration."""
    pipeline = model.load(device=device, dtype=config.dtype)
    drawer: Any = model.start(
        pipeline,
        config.options,
        seed=config.seed,
        batch_size=config.batch_size,
        say=say,
        on_progress=progress.advance,
    )
    pixel_size_nm = getattr(pipeline.config, "pixel_size_nm", None)
    labels = None
    if config.pairs is not None:
        drawer = create_pair_drawer(
            drawer, model, config.pairs, pixel_size_nm=pixel_size_nm, seed=config.seed, say=say
        )
        labels = LabelFormat(drawer.kinds, config.pairs.labels, drawer.take)
    record: dict[str, Any] = {
        "name": model.name,
        "family": model.kind,
        "settings": describe_settings(config, model) | drawer.describe(),
    }
    classes = find_class_names(pipeline, config.options)
    return Started(drawer, record, config.bits, pixel_size_nm, classes, labels)


def find_class_names(pipeline, options) -> NameClasses | None:
    """Return a function that names the classes of images by number; None without --classes."""
    classes = getattr(options, "classes", ())
    if not classes:
        return None
    return lambda numbers: name_classes(pipeline, classes, numbers) or []


class Progress:
    """Shows images on a bar as they are written, and parts of large ones as they are drawn."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.num_written = 0
        self.images_at_once: int | None = None  # if progress within a batch is shown

    def finish(self, count: int) -> None:
        """Count images that are written."""
        self.num_written += count
        self._show(self.num_written)

    def advance(self, fraction: float) -> None:
        """Take the fraction that is drawn of the next images."""
        if self.bar is not None and self.images_at_once is not None:
            batch = min(self.images_at_once, self.bar.total - self.num_written)
            self._show(self.num_written + fraction * batch)

    def _show(self, num_images: float) -> None:
        self.bar.update(max(0, num_images - self.bar.n))


def draw_missing(
    drawer,
    numbers: Sequence[int],
    config,
    model: Model,
    write: Callable[[Sequence[int], Any], int],
    state,
    progress: Progress,
    part: str = "",
) -> None:
    """Draw and write the images, under a bar with the speed and the time left of this process.

    part: what of the whole these images are, for the bar.
    """
    if not numbers:
        return
    progress.num_written = 0
    activity = getattr(drawer, "activity", None)  # of a drawer that uses no model
    description = f"{activity} {part}".strip() if activity else f"drawing {part}by {model.title}"
    if state.num_processes > 1:
        description += f" (process {state.process_index + 1} of {state.num_processes})"
    # threads that encode and write: the cores that do not compute
    cores = count_cores()
    if cores == os.cpu_count():  # else SLURM has shared them out already
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this node
    computing = 1 if state.device.type == "cuda" else torch.get_num_threads()
    progress.images_at_once = getattr(drawer, "images_at_once", None)
    options: dict[str, Any] = {}
    if progress.images_at_once is not None:
        options["bar_format"] = (
            "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} "
            "[{elapsed}<{remaining}, {rate_fmt}]"
        )
    with tqdm(
        total=len(numbers),
        unit="img",
        desc=description,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        disable=not state.is_main_process,
        **options,
    ) as progress.bar:
        draw_images(
            drawer,
            numbers,
            write,
            batch_size=progress.images_at_once or config.batch_size,
            num_writers=max(1, min(MAX_WRITERS, cores - computing)),
            progress=progress.finish,
            say=say,
        )


def describe_settings(config: GenerationConfig, model: Model) -> dict:
    """Return the settings beside the drawer's that decide an image's content."""
    stored = {"stored_as": "png"} if config.format in ("arrow", "webdataset") else {}
    return {
        "weights_sha256": model.weights_sha256,
        "seed": config.seed,
        "format": config.format,
        **stored,
        "bits": config.bits,
        "precision": next(name for name, dtype in DTYPES.items() if dtype is config.dtype),
    }


def write_preview(out) -> Path:
    """Write the first images of a folder side by side as OUT-preview.png, beside the folder.

    It lies beside and not inside, so that it is not taken for one of the images. Below them stands
    a scale bar, if the pixel size is known.
    """
    out = Path(out).resolve()
    images = read_image_folder(out)
    path = out.with_name(f"{out.name}-preview.png")
    columns = max(1, min(math.isqrt(PREVIEW_IMAGES), PREVIEW_PX // max(images.shape)))
    shown = images.batch(range(min(columns**2, len(images))))
    save_grid_with_scale_bar(shown, path, images.pixel_size_nm)
    return path


def say(text: str) -> None:
    """Print a message above the progress bar."""
    tqdm.write(text, file=sys.stderr)
