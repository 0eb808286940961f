"""What the demo page (app.py) shows: images, walks, grids with a scale bar, downloads.

It knows no web page and no family: each family brings its controls and its way of drawing.
"""

import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from em_data import DataConfig, figures, load_data
from em_data.files import make_folder_name
from em_data.sources.synthetic import SYNTHETIC
from em_generation.generate import DTYPES
from em_generation.loading import Model, read_model
from em_generation.sampling import draw_images
from em_generation.store import create_store
from em_stylegan.pictures.files import save_video
from em_training import config_from_dict, create_process_state, default_precision
from em_training.family import WALK_KEYS, Control

MAX_IMAGES, MAX_FRAMES, MAX_SEED = 16, 240, 2**53 - 1
REAL_IMAGES = 4
MAX_SYNTHETIC_PIXELS = 2**28  # that are drawn because a run of others says so
FORMATS = {"8-bit PNG": ("png", 8), "16-bit TIFF": ("tiff", 16)}
SHOWN_PX = 512  # smaller grids are enlarged by whole numbers, so that the label can be read
KEPT_RESULTS = 64  # folders of one demo, before the oldest is removed


@dataclass(frozen=True, eq=False)
class DemoModel:
    """A model that is ready to draw. `lock` is held while it draws."""

    model: Model
    pipeline: Any
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def source(self) -> str:
        return self.model.source

    @property
    def pixel_size_nm(self) -> float | None:
        return self.pipeline.config.get("pixel_size_nm")

    @property
    def controls(self) -> tuple[Control, ...]:
        """The family's controls, as they suit this model."""
        return self.model.family.controls(self.pipeline)


@dataclass(frozen=True, eq=False)
class Drawing:
    """Images float32 [N, 1, H, W] in [-1, 1] on the CPU, and what they are."""

    images: torch.Tensor
    name: str
    pixel_size_nm: float | None
    settings: dict

    def describe(self) -> str:
        """Return one sentence: how many images, how large, of which settings."""
        num, _, height, width = self.images.shape
        size = "pixel size unknown"
        if self.pixel_size_nm is not None:
            size = f"{self.pixel_size_nm:g} nm per pixel"
        settings = "".join(f"; {key.lower()}: {value}" for key, value in self.settings.items())
        plural = "image" if num == 1 else "images"
        return f"{self.name}: {num} {plural} of {height} x {width} pixels, {size}{settings}"


def load_demo_model(source: str, *, dtype: torch.dtype | None = None) -> DemoModel:
    """Load a run's folder, a saved pipeline or a Hub id.

    dtype: as `generate.py` chooses it by default. Raises `ValueError` as `read_model` does.
    """
    model = read_model(source)
    device = create_process_state().device
    return DemoModel(model, model.load(device=device, dtype=dtype or DTYPES[default_precision()]))


def load_real_images(model: Model, num_images: int = REAL_IMAGES) -> Drawing | None:
    """Return held-out tiles of the micrographs that a run was trained on.

    Returns None if the run does not name them, or if they are not on this machine. A model without
    a run on this machine can name synthetic micrographs only, and no cache. Of a wide variety a few
    others are drawn, which no model was trained on.
    """
    config = model.config or {}
    source = config.get("data")
    if not isinstance(source, str):
        return None
    if source not in SYNTHETIC and (model.folder is None or not Path(source).exists()):
        return None
    try:
        tiles = config_from_dict(DataConfig, config["tiles"])
        if source == "synthetic-varied":
            tiles = replace(
                tiles,
                seed=tiles.seed + 1,
                num_micrographs=2 * num_images,
                num_synthetic=None,
                held_out_fraction=0.5,
            )
        if model.folder is None:
            tiles = replace(tiles, cache_dir=None)
            num = tiles.num_synthetic or tiles.num_micrographs or SYNTHETIC[source][-1]
            if num * tiles.micrograph_size**2 > MAX_SYNTHETIC_PIXELS:
                return None
        data = load_data(source, tiles, log=lambda line: None)
    except (ValueError, OSError, KeyError):
        return None
    ids = np.linspace(0, len(data.held_out) - 1, num_images).astype(int)
    images = torch.as_tensor(data.held_out.batch(ids))
    settings = {"Held out from training": data.summary["name"]}
    title = "Simulated micrographs" if source in SYNTHETIC else "Real micrographs"
    return Drawing(images, title, data.summary.get("pixel_size_nm"), settings)


def read_seed(value, *, optional: bool = False) -> int | None:
    """Return a seed from a field of the page; None for an empty field that may be empty."""
    if value is None or value == "":
        if optional:
            return None
        raise ValueError("The seed is empty. Enter a whole number from 0 on.")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= MAX_SEED or number != int(number):
        raise ValueError(f"The seed is {value}. Enter a whole number from 0 on.")
    return int(number)


def read_options(model: DemoModel, values: dict):
    """Return the family's options from the values of its controls, by name."""
    options = {}
    for control in model.controls:
        value = values.get(control.name, control.value)
        if control.kind == "integer":
            value = read_seed(value, optional=control.value is None)
        elif control.kind == "slider":
            if value is None or not control.minimum <= value <= control.maximum:
                raise ValueError(
                    f"{control.label} is {value}; choose {control.minimum:g} to "
                    f"{control.maximum:g}."
                )
            value = int(value) if isinstance(control.value, int) else float(value)
        elif value not in control.choices:
            raise ValueError(
                f"{control.label} is {value}; choose one of {', '.join(control.choices)}."
            )
        else:
            value = control.choices[value]
        options[control.name] = value
    return model.model.family.options(**options)


def draw(
    model: DemoModel,
    seed: int,
    num_images: int,
    values: dict | None = None,
    progress: Callable[[float], None] | None = None,
) -> Drawing:
    """Draw images 0 to `num_images` - 1 of a seed, the same that `generate.py` draws.

    values: of the model's controls, by name. progress: gets the fraction done.
    """
    _check("Images", num_images, MAX_IMAGES)
    options = read_options(model, values or {})
    images = {}

    def keep(numbers, batch):
        images.update(zip(numbers, batch, strict=True))
        return len(numbers)

    with model.lock:
        drawer = _start(model, options, seed, num_images, progress)
        draw_images(drawer, range(num_images), keep, batch_size=num_images)
    stack = torch.stack([images[i] for i in range(num_images)])
    settings = {"Seed": seed} | describe_values(model, values or {})
    return Drawing(stack, model.model.name, model.pixel_size_nm, settings)


def walk(
    model: DemoModel,
    seed: int,
    frames_per_key: int,
    values: dict | None = None,
    progress: Callable[[float], None] | None = None,
) -> Drawing:
    """Draw a closed walk of `WALK_KEYS` x `frames_per_key` frames through the seed's images."""
    _check("Frames per image", frames_per_key, MAX_FRAMES // WALK_KEYS)
    options, images = read_options(model, values or {}), []
    if not model.model.family.walk_help:
        raise ValueError(f"A {model.model.title} has no walk.")
    with model.lock:
        drawer = _start(model, options, seed, WALK_KEYS, None)
        for batch in drawer.walk(frames_per_key):
            images.append(batch.float().cpu())
            if progress is not None:
                progress(sum(map(len, images)) / (WALK_KEYS * frames_per_key))
    settings = {"Seed": seed} | describe_values(model, values or {})
    return Drawing(torch.cat(images), model.model.name, model.pixel_size_nm, settings)


def describe_values(model: DemoModel, values: dict) -> dict:
    """Return {label: value as it is shown} of the controls that had an effect."""
    shown = {}
    for control in model.controls:
        value = values.get(control.name, control.value)
        needed = values.get(control.only_with) if control.only_with else True
        if value not in (None, "") and needed not in (None, ""):
            shown[control.label] = value
    return shown


def save_grid_with_scale_bar(drawing: Drawing, path) -> Path:
    """Write the images side by side as an 8-bit PNG, with a scale bar below them."""
    figures.save_grid_with_scale_bar(drawing.images, path, drawing.pixel_size_nm)
    return Path(path)


def save_walk(drawing: Drawing, path, frames_per_second: int = 12) -> Path:
    """Write the frames as an endless GIF of all 256 grey levels; small ones are enlarged."""
    factor = max(1, SHOWN_PX // 2 // drawing.images.shape[-1])
    frames = drawing.images.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    save_video(frames, path, frames_per_second)
    return Path(path)


def save_download(drawing: Drawing, folder, format: str) -> Path:
    """Write the images into `folder`, each with its pixel size; return the file to hand out.

    format: a key of `FORMATS`. One image is that file. Several are packed as a ZIP together with
    settings.json.
    """
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}; choose {', '.join(FORMATS)}.")
    suffix, bits = FORMATS[format]
    name = f"{make_folder_name(drawing.name)}-seed-{drawing.settings['Seed']}-{bits}-bit"
    folder = Path(folder) / name
    folder.mkdir(parents=True, exist_ok=True)
    store = create_store(folder, suffix, bits, drawing.pixel_size_nm)
    store.write(range(len(drawing.images)), drawing.images)
    files = sorted(folder.glob(f"*.{store.suffix}"))
    if len(files) == 1:
        return files[0].rename(folder.with_name(f"{name}.{store.suffix}"))
    path = folder.with_name(f"{name}.zip")
    about = {
        "model": drawing.name,
        "pixel_size_nm": drawing.pixel_size_nm,
        "bits": bits,
        "settings": drawing.settings,
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("settings.json", json.dumps(about, indent=2) + "\n")
        for file in files:
            archive.write(file, file.name)
    shutil.rmtree(folder)
    return path


def make_result_folder(root, *key) -> Path:
    """Return an empty folder below `root` for one result; the oldest ones are removed."""
    root = Path(root)
    folder = root / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    by_age = sorted(
        (path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns
    )
    for old in by_age[:-KEPT_RESULTS]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _start(model, options, seed, batch_size, progress):
    settings = {"seed": seed, "batch_size": batch_size, "on_progress": progress}
    return model.model.start(model.pipeline, options, say=lambda text: None, **settings)


def _check(name, value, most):
    if value is None or not 1 <= value <= most:
        raise ValueError(f"{name} is {value}; choose 1 to {most}.")
