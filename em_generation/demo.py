"""What the demo (app.py) shows: images of a seed, mixed styles, walks, grids with a scale bar, files to keep. Knows no web page."""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from em_data import save_image_grid
from em_diffusion.samplers import create_sampler, list_samplers
from em_evaluation.report import make_scale_bar
from em_generation.generate import DTYPES
from em_generation.loading import load_pipeline, read_model
from em_generation.store import create_store
from em_stylegan.drawing import NOISE_MODE
from em_stylegan.pictures.files import save_video
from em_stylegan.pictures.styles import mix_styles
from em_training import create_process_state, default_precision, seed_for
from em_training.walk import walk, walk_noise

MAX_IMAGES, MAX_STEPS, MAX_FRAMES = 16, 250, 240
NUM_KEYS = 4  # images that a walk passes
FRAMES_AT_ONCE = 16
SAVED_SAMPLER = "as saved"
MIX_LAYERS = ("coarse", "middle", "fine")  # thirds of the generator's layers
FORMATS = {"8-bit PNG": ("png", 8), "16-bit TIFF": ("tiff", 16)}
SHOWN_PX = 512  # smaller grids are enlarged by whole numbers, so that the label beside the scale bar can be read
KEPT_RESULTS = 64  # folders of one demo, before the oldest is removed


@dataclasses.dataclass(frozen=True, eq=False)
class DemoModel:
    """A model ready to draw: where it came from, its name and family ("ldm", "stylegan"), its pipeline and scheduler as saved.

    lock: held while it draws, for a pipeline's scheduler has a state.
    """

    source: str
    name: str
    family: str
    pipeline: object
    scheduler: object = None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @property
    def pixel_size_nm(self) -> float | None:
        return self.pipeline.config.get("pixel_size_nm")

    @property
    def num_steps(self) -> int:
        """Denoising steps that the LDM is saved with."""
        return self.pipeline.config.default_num_inference_steps

    def list_samplers(self) -> list[str]:
        """Names of the samplers that suit the LDM, the saved one first."""
        return [SAVED_SAMPLER, *list_samplers(self.scheduler)]


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """Images float32 [N, 1, H, W] in [-1, 1] on the CPU, the name of the model that drew them, the pixel size, the settings."""

    images: torch.Tensor
    name: str
    pixel_size_nm: float | None
    settings: dict

    def describe(self) -> str:
        """One sentence about the images: how many, how large, of which settings."""
        num, _, height, width = self.images.shape
        size = (
            "pixel size unknown"
            if self.pixel_size_nm is None
            else f"{self.pixel_size_nm:g} nm a pixel"
        )
        settings = ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in self.settings.items()
        )
        return f"{self.name}: {num} of {height} x {width} pixels, {size}; {settings}"


def load_demo_model(source: str, family: str, *, dtype: torch.dtype | None = None) -> DemoModel:
    """Load a run's folder, a saved pipeline or a Hub id for the slot `family`, "ldm" or "stylegan".

    dtype: left out, as `generate.py` chooses it. Raises `ValueError` where the model is of the other family, and as `load_pipeline` does.
    """
    device = create_process_state().device
    pipeline = load_pipeline(source, device=device, dtype=dtype or DTYPES[default_precision()])
    found = "ldm" if hasattr(pipeline, "scheduler") else "stylegan"
    if found != family:
        raise ValueError(
            f"{source} is of the family {found}: give it as --{found}, not as --{family}"
        )
    pipeline.set_progress_bar_config(disable=True)
    name = read_model(source).name
    return DemoModel(source, name, family, pipeline, getattr(pipeline, "scheduler", None))


def read_optional_seed(text: str) -> int | None:
    """Read the seed in a field that may be left empty; `ValueError` for what is no whole number."""
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no seed; write a whole number, or leave the field empty"
        ) from None


def draw_ldm_images(
    model: DemoModel,
    seed: int,
    num_images: int,
    sampler: str = SAVED_SAMPLER,
    num_steps: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Drawing:
    """Draw images 0 .. `num_images` - 1 of `seed`, those that `generate.py` makes of it with the same sampler and steps.

    sampler: a name of `model.list_samplers()`. num_steps: as saved where it is left out. progress: gets the fraction done.
    """
    num_steps = model.num_steps if num_steps is None else num_steps
    _check(
        num_images=(num_images, MAX_IMAGES), num_steps=(num_steps, max(MAX_STEPS, model.num_steps))
    )
    generators = _create_generators(model, seed, num_images)
    with _sampling(model, sampler):
        images = _denoise(model, generators, num_steps, None, progress)
        settings = {"seed": seed, "sampler": _name_sampler(model, sampler), "steps": num_steps}
    return Drawing(images, model.name, model.pixel_size_nm, settings)


def draw_stylegan_images(
    model: DemoModel,
    seed: int,
    num_images: int,
    truncation_psi: float = 1.0,
    mix_seed: int | None = None,
    mix_layers: str = "coarse",
) -> Drawing:
    """Draw images 0 .. `num_images` - 1 of `seed`, those that `generate.py` makes of it with the same truncation.

    mix_seed: where given, a third of the layers (`mix_layers`: coarse, middle or fine) takes the style of this seed's image 0
    (Karras et al. 2019, section 3.1); the noise stays each image's own.
    """
    _check(num_images=(num_images, MAX_IMAGES))
    generators = _create_generators(model, seed, num_images)
    settings = {"seed": seed, "truncation": truncation_psi}
    with model.lock:
        ws = _map(model, generators, truncation_psi)
        if mix_seed is not None:
            settings |= {"mix_seed": mix_seed, "mixed_layers": mix_layers}
            other = _map(model, _create_generators(model, mix_seed, 1), truncation_psi)
            ws = mix_styles(ws, other, find_layers(ws.shape[1], mix_layers))[:, 0]
        images = _synthesise(model, ws, generators, NOISE_MODE)
    return Drawing(images, model.name, model.pixel_size_nm, settings)


def walk_ldm(
    model: DemoModel,
    seed: int,
    frames_per_key: int,
    sampler: str = SAVED_SAMPLER,
    num_steps: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Drawing:
    """Draw a closed walk through the noise of the seed's images 0 .. 3: `NUM_KEYS` x `frames_per_key` frames.

    Each frame starts from normal noise of unit variance (`walk_noise`); what a stochastic sampler adds on the way is equal in all.
    Frames have no grain, which would flicker or stand still before what moves.
    """
    num_steps = model.num_steps if num_steps is None else num_steps
    _check(
        frames=(NUM_KEYS * frames_per_key, MAX_FRAMES),
        num_steps=(num_steps, max(MAX_STEPS, model.num_steps)),
    )
    size = model.pipeline.unet.config.sample_size
    shape = (
        1,
        model.pipeline.unet.config.in_channels,
        *((size, size) if isinstance(size, int) else size),
    )
    keys = torch.cat(
        [torch.randn(shape, generator=each) for each in _create_generators(model, seed, NUM_KEYS)]
    )
    frames, images = walk_noise(keys, frames_per_key), []
    with _sampling(model, sampler):
        for part in frames.split(FRAMES_AT_ONCE):
            generators = [_create_generators(model, seed, 1)[0] for _ in part]
            images.append(_denoise(model, generators, num_steps, part, None, add_grain=False))
            if progress is not None:
                progress(sum(map(len, images)) / len(frames))
        settings = {"seed": seed, "sampler": _name_sampler(model, sampler), "steps": num_steps}
    return Drawing(torch.cat(images), model.name, model.pixel_size_nm, settings)


def walk_stylegan(
    model: DemoModel,
    seed: int,
    frames_per_key: int,
    truncation_psi: float = 1.0,
    progress: Callable[[float], None] | None = None,
) -> Drawing:
    """Draw a closed walk through w of the seed's images 0 .. 3, with the stored noise: `NUM_KEYS` x `frames_per_key` frames."""
    _check(frames=(NUM_KEYS * frames_per_key, MAX_FRAMES))
    images = []
    with model.lock:
        frames = walk(
            _map(model, _create_generators(model, seed, NUM_KEYS), truncation_psi), frames_per_key
        )
        for part in frames.split(FRAMES_AT_ONCE):
            images.append(_synthesise(model, part, None, "const"))
            if progress is not None:
                progress(sum(map(len, images)) / len(frames))
    settings = {"seed": seed, "truncation": truncation_psi}
    return Drawing(torch.cat(images), model.name, model.pixel_size_nm, settings)


def find_layers(num_ws: int, which: str) -> tuple[int, int]:
    """Return (first, end) of the coarse, middle or fine third of `num_ws` layers; together the three are all."""
    if which not in MIX_LAYERS:
        raise ValueError(f"there are no layers {which!r}; choose {', '.join(MIX_LAYERS)}")
    i = MIX_LAYERS.index(which)
    return round(num_ws * i / 3), round(num_ws * (i + 1) / 3)


def save_grid_with_scale_bar(drawing: Drawing, path) -> Path:
    """Write the images side by side as an 8-bit PNG; below them a scale bar of a round length where the pixel size is known."""
    path = Path(path)
    save_image_grid(drawing.images, path)
    with PIL.Image.open(path) as file:
        grid = file.convert("L")
    factor = max(1, SHOWN_PX // grid.width)
    bar = make_scale_bar(drawing.pixel_size_nm, drawing.images.shape[-1], grid.width)
    grid = grid.resize((grid.width * factor, grid.height * factor), PIL.Image.Resampling.NEAREST)
    if bar is not None:
        unit = max(4, grid.width // 80)  # thickness of the bar
        page = PIL.Image.new("L", (grid.width, grid.height + 6 * unit), 255)
        page.paste(grid)
        width, top = max(1, round(grid.width * bar["percent"] / 100)), grid.height + 2 * unit
        pen = PIL.ImageDraw.Draw(page)
        pen.rectangle((0, top, width - 1, top + 2 * unit - 1), fill=0)
        font = PIL.ImageFont.load_default(size=4 * unit)
        pen.text((width + 2 * unit, top + unit), bar["label"], fill=0, font=font, anchor="lm")
        grid = page
    grid.save(path)
    return path


def save_walk(drawing: Drawing, path, frames_per_second: int = 12) -> Path:
    """Write the frames as an endless GIF of all 256 grey levels, small ones enlarged by whole numbers."""
    factor = max(1, SHOWN_PX // 2 // drawing.images.shape[-1])
    frames = drawing.images.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    save_video(frames, path, frames_per_second)
    return Path(path)


def save_download(drawing: Drawing, folder, format: str) -> Path:
    """Write the images into `folder` as `format`, a key of `FORMATS`, each with its pixel size, and return the one file to hand out.

    One image is that file; more are packed as a ZIP beside settings.json.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no format {format!r}; choose {', '.join(FORMATS)}")
    suffix, bits = FORMATS[format]
    name = re.sub(
        r"[^A-Za-z0-9]+", "-", f"{drawing.name}-seed-{drawing.settings['seed']}-{bits}-bit"
    ).strip("-")
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
        **drawing.settings,
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("settings.json", json.dumps(about, indent=2) + "\n")
        for file in files:
            archive.write(file, file.name)
    shutil.rmtree(folder)
    return path


def make_result_folder(root, *key) -> Path:
    """Return an empty folder below `root` for one result, by its `key`; the oldest beyond `KEPT_RESULTS` are removed."""
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


@contextlib.contextmanager
def _sampling(model, sampler):
    """The model alone for the caller, with the scheduler `sampler`; the saved one is back afterwards."""
    with model.lock:
        try:
            if sampler != SAVED_SAMPLER:
                model.pipeline.scheduler = create_sampler(sampler, model.scheduler)
            yield
        finally:
            model.pipeline.scheduler = model.scheduler


def _name_sampler(model, sampler):
    return (
        type(model.scheduler).__name__.removesuffix("Scheduler")
        if sampler == SAVED_SAMPLER
        else sampler
    )


def _denoise(model, generators, num_steps, latents, progress, add_grain=True):
    def report(pipeline, step, timestep, tensors):
        if progress is not None:
            progress(min(1.0, (step + 1) / num_steps))  # Heun's methods call twice a step
        return tensors

    options = {"output_type": "pt", "callback_on_step_end": report, "add_grain": add_grain}
    images = model.pipeline(
        len(generators), generators, num_steps, latents=latents, **options
    ).images
    return images.float().cpu() * 2 - 1


def _map(model, generators, truncation_psi):
    return model.pipeline(len(generators), generators, truncation_psi, output_type="latent").images


def _synthesise(model, ws, generators, noise_mode):
    images = model.pipeline(
        len(ws), generators, noise_mode=noise_mode, latents=ws, output_type="pt"
    ).images
    return images.float().cpu().mean(dim=1, keepdim=True) * 2 - 1  # of a colour network, its grey


def _create_generators(model, seed, num_images):
    """Image i's generator of its own, as in `em_generation.sampling`."""
    device = "cpu" if model.family == "ldm" else model.pipeline.device
    return [torch.Generator(device).manual_seed(seed_for(int(seed), i)) for i in range(num_images)]


def _check(**values):
    for name, (value, most) in values.items():
        if not 1 <= value <= most:
            raise ValueError(f"{name.replace('_', ' ')} {value}: choose 1 to {most}")
