"""Whole micrographs from a model trained on tiles: seams, statistics, seconds and memory.

    python benchmarks/whole_micrographs.py --model RUN [--size 512] [--arms ...]

The model must have been trained on embedded micrographs. Each arm draws the same images from the
same seeds, and differs in how windows are placed and weighed in denoising or decoding. Measured are

- seams: absolute grey level differences across borders of the grid of windows, over those across
  other borders of the autoencoder's cells ("edge"); the same for differences between means of
  4 x 8 pixels on both sides ("level"); and differences within half a cell of the grid's borders
  over those halfway between them, where two windows are mixed ("contrast"). 1 means that the grid
  cannot be seen.
- Frechet distance to held-out tiles of tiles cut from the images at random places, beside that of
  tiles drawn as tiles.
- spectrum, noise, defects and grey levels against embedded micrographs of the same size, as in a
  report.

Writes whole_micrographs.json and whole_micrographs.png to --out.
"""

import contextlib
import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
import tyro
from sampler_points import load_reference, sample_levels
from sampler_sweep import rounded
from tqdm.auto import tqdm

from em_data import to_uint8
from em_data.files import write_atomically
from em_data.synthetic_micrographs import (
    MICROGRAPHS_PER_SPECIMEN,
    list_seeds,
    synthesise_micrograph,
)
from em_diffusion import em_windows
from em_diffusion import pipeline_em_ldm as code
from em_diffusion.drawing import LDMDrawer
from em_diffusion.family import LDMOptions
from em_evaluation.microscopy import compare_microscopy
from em_generation.loading import read_model
from em_training import create_process_state, make_image_rng
from em_training.cli import run_command

DENOISING = {
    "smooth, shifted": {},
    "smooth": {"shifted": False},
    "average, shifted": {"weights": "equal"},
    "average": {"weights": "equal", "shifted": False},
    "core, shifted": {"weights": "core"},
    "smooth, shifted, 3/4 overlap": {"step": 1 / 4},
    "no overlap, shifted": {"weights": "equal", "step": 1},
    "whole image at once": None,
}
DECODING = {
    "smooth": {"shifted": False},
    "average": {"weights": "equal", "shifted": False},
    "whole image at once": None,
}
ARMS = tuple(
    [f"{name} / smooth" for name in DENOISING]
    + [f"smooth, shifted / {name}" for name in DECODING if name != "smooth"]
)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Draw whole micrographs in several ways and measure them."""

    model: str
    """A run's folder."""
    out: str = "benchmarks/results"
    """Folder for the results."""
    size: int = 512
    """Side of the micrographs in pixels."""
    num_images: int = 16
    """Micrographs of each arm and of both real sets."""
    arms: tuple[str, ...] = ARMS
    """What to compare: DENOISING / DECODING."""
    tiles: int = 1000
    """Tiles cut from each set, and drawn as tiles, for the Frechet distance."""
    window_batch_size: int = 50
    num_inference_steps: int | None = None
    """Denoising steps. Default: those of the model."""
    seed: int = 0
    data_seed: int = 90
    """Seed of the embedded micrographs, which must not be that of the training."""


def main():
    benchmark(tyro.cli(BenchmarkConfig))


def benchmark(config: BenchmarkConfig) -> dict:
    """Draw and measure all arms, print and store the results."""
    torch.set_num_threads(1)
    state = create_process_state()
    model = read_model(config.model)
    pipeline = model.load(device=state.device, dtype=torch.float32)
    options = LDMOptions(num_inference_steps=config.num_inference_steps)
    drawer = LDMDrawer(pipeline, options, seed=config.seed, batch_size=50)
    reference = load_reference(config.model, config.tiles, device=state.device)
    pixel_size_nm = pipeline.config.pixel_size_nm
    tile = drawer.draw([0]).shape[-1]
    cell = tile // pipeline.latent_shape[-1]
    sets, groups = {}, {}
    for i, name in enumerate(("held_out", "real")):
        seeds = list_seeds(config.num_images, config.data_seed + i)
        images = [synthesise_micrograph(s, config.size, pixel_size_nm).image for s in seeds]
        sets[name], groups[name] = np.stack(images), np.array(seeds) // MICROGRAPHS_PER_SPECIMEN
    drawn, seconds = draw_arms(drawer.pipeline, drawer.num_steps, config)
    sets |= drawn

    rng = np.random.default_rng(config.seed)
    tiles, _ = sample_levels(drawer, config.tiles, 50)
    cut = {name: cut_tiles(levels, tile, config.tiles, rng) for name, levels in sets.items()}
    distances = {name: reference.measure(each) for name, each in {"tiles": tiles, **cut}.items()}
    report = compare_microscopy(
        sets, groups, pixel_size_nm, models=config.arms, kinds={"real": "real"}, seed=config.seed
    )
    rows = []
    for name, levels in sets.items():
        row = {"set": name} | measure_seams(levels, tile // 2, cell)
        row["frechet_distance_of_tiles"] = rounded(reference.interval(distances[name]))
        row["shows"] = {key: round_all(value) for key, value in report["levels"][name].items()}
        if name != "held_out":
            row["distance_to_real"] = {
                key: round_all(value) for key, value in report["distances"][name].items()
            }
            row["outcomes"] = report["outcomes"][name]
        if name in seconds:
            row["seconds_per_image"] = round(seconds[name], 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {
        "size": config.size,
        "num_images": config.num_images,
        "tile": tile,
        "cell": cell,
        "scheduler": type(pipeline.scheduler).__name__,
        "num_inference_steps": drawer.num_steps,
        "guidance_scale": pipeline.config.guidance_scale,
        "frechet_distance_of_tiles_drawn_as_tiles": rounded(reference.interval(distances["tiles"])),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "units": report["metrics"],
        "sets": rows,
    }
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "whole_micrographs.json", json.dumps(result, indent=2) + "\n")
    draw_picture({k: v for k, v in sets.items() if k != "held_out"}, tile, out)
    return result


def draw_arms(pipeline, num_steps: int, config) -> tuple[dict, dict]:
    """Return the whole micrographs of each arm, uint8 [N, S, S], and seconds for each image."""
    sets: dict[str, list] = {arm: [] for arm in config.arms}
    seconds = dict.fromkeys(config.arms, 0.0)
    options = {"window_batch_size": config.window_batch_size}
    for i in tqdm(range(config.num_images), "whole micrographs", unit="img"):
        denoised = {}
        for arm in config.arms:
            denoising, decoding = arm.split(" / ")
            if denoising not in denoised:
                rng, started = make_image_rng(config.seed, i), time.process_time()
                with change_windows(DENOISING[denoising]):
                    sides = {"height": config.size, "width": config.size}
                    latents = pipeline.denoise(1, [rng], num_steps, **sides, **options)
                denoised[denoising] = latents, rng, time.process_time() - started
            latents, rng, taken = denoised[denoising]
            started = time.process_time()
            with change_windows(DECODING[decoding]):
                image = pipeline.decode(latents, [rng.clone_state()], **options)
            sets[arm].append(to_uint8(image)[0, 0])
            seconds[arm] += (taken + time.process_time() - started) / config.num_images
    return {arm: np.stack(images) for arm, images in sets.items()}, seconds


@contextlib.contextmanager
def change_windows(options: dict | None):
    """Place and weigh windows in another way for a while; None: the whole image at once."""

    def place(length, window, shift=0.0, *, step=1 / 2, shifted=True):
        if options is None:
            return [0]
        step = max(1, round(window * step))
        first = -int(shift * step) if shifted else 0
        starts = range(first, length - window + step, step)
        return sorted({min(max(start, 0), length - window) for start in starts})

    def weigh(starts, length, window, factor, device, weights="smooth"):
        length, window = length * factor, window * factor
        position = (np.arange(window) + 0.5) / window
        bump = {
            "smooth": np.sin(np.pi * position) ** 2,
            "equal": np.ones(window),
            "core": np.where(np.abs(position - 0.5) < 0.25, 1, 1e-6),
        }[weights]
        total = np.zeros(length)
        for start in starts:
            total[start * factor :][:window] += bump
        return {
            start: torch.from_numpy(bump / total[start * factor :][:window]).float().to(device)
            for start in starts
        }

    def whole(function, inputs, windows, size, batch_size):
        return function(inputs)

    own = dict(options or {})
    weights = own.pop("weights", "smooth")
    with (
        mock.patch.object(code, "place_windows", lambda *a, **k: place(*a, **k, **own)),
        mock.patch.object(em_windows, "weigh_windows", lambda *a: weigh(*a, weights=weights)),
        mock.patch.object(code, "blend_windows", whole)
        if options is None
        else contextlib.nullcontext(),
    ):
        yield


def cut_tiles(levels, side: int, num_tiles: int, rng) -> np.ndarray:
    """Cut uint8 [num_tiles, 1, side, side] at random places, equally many from each image."""
    height, width = levels.shape[1:]
    return np.stack([
        levels[i % len(levels), None, y : y + side, x : x + side]
        for i in range(num_tiles)
        for y, x in [(rng.integers(height - side + 1), rng.integers(width - side + 1))]
    ])  # fmt: skip


def measure_seams(levels, step: int, cell: int) -> dict:
    """Return the ratios "edge", "level" and "contrast" (see above) with standard errors.

    step: distance of the borders of the grid of windows. cell: side of the autoencoder's cells.
    """
    levels = levels.astype(np.float32)
    ratios = {"seam_edge": [], "seam_level": [], "seam_contrast": []}
    for image in [*levels, *levels.transpose(0, 2, 1)]:
        width = image.shape[1] // cell * cell
        places = np.arange(cell, width - cell + 1, cell)
        is_border = places % step == 0
        rows = image[: len(image) // 8 * 8].reshape(-1, 8, image.shape[1]).mean(1)
        left = np.stack([rows[:, p - 4 : p].mean(1) for p in places])
        right = np.stack([rows[:, p : p + 4].mean(1) for p in places])
        edges = np.abs(image[:, places] - image[:, places - 1]).mean(0)
        inside = np.arange(cell, width - cell)
        differences = np.abs(image[:, inside] - image[:, inside - 1]).mean(0)
        distance = np.abs((inside + step // 2) % step - step // 2)  # to the nearest border
        near, halfway = distance < cell // 2, distance >= (step - cell) // 2
        ratio = differences[near].mean() / differences[halfway].mean()
        ratios["seam_contrast"].append(ratio)
        for name, values in (("edge", edges), ("level", np.abs(left - right).mean(1))):
            ratios[f"seam_{name}"].append(values[is_border].mean() / values[~is_border].mean())
    return {
        name: {
            "value": round(float(np.mean(each)), 4),
            "standard_error": round(float(np.std(each, ddof=1) / len(each) ** 0.5), 4),
        }
        for name, each in ratios.items()
    }


def round_all(value):
    """Return an interval with five significant digits."""
    if isinstance(value, dict):
        return {key: round_all(each) for key, each in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def draw_picture(sets, tile: int, out: Path) -> None:
    """Draw a corner of four tiles of the first image of each set, twice as large."""
    side, panels = 4 * tile, []
    for name, levels in sets.items():
        crop = PIL.Image.fromarray(levels[0][:side, :side]).resize((2 * side, 2 * side), 0)
        panel = PIL.Image.new("L", (crop.width + 8, crop.height + 32), 255)
        panel.paste(crop, (4, 28))
        PIL.ImageDraw.Draw(panel).text((6, 6), name, fill=0, font_size=16)
        panels.append(panel)
    columns = 3
    rows = -(-len(panels) // columns)
    page = PIL.Image.new("L", (columns * panels[0].width, rows * panels[0].height), 255)
    for i, panel in enumerate(panels):
        page.paste(panel, (i % columns * panel.width, i // columns * panel.height))
    page.save(out / "whole_micrographs.png")


if __name__ == "__main__":
    run_command(main)
