"""Which sampler, and how many steps: distance to held-out tiles against steps and images/s.

    python benchmarks/sampler_sweep.py --model RUN [--write]

Every point draws the same images (same seeds, same noise) as the reference, so that differences
are sharper than the distances themselves. The reference is DDIM with 200 steps, or Euler with 200
for flow matching. It prints one JSON line per point and writes sampler_sweep.json and
sampler_sweep.png to --out. What was measured is kept there and not measured again.

The default is chosen by a rule. A point is as good as the reference if the upper end of the 95 %
interval of their difference is at most the upward half-width of the reference's own interval. Of
these points, the fastest counts; of those within a tenth of its speed, the nearest. --write stores
it in the run's pipeline as the scheduler and default_num_inference_steps.

On a CPU, use one thread (the default): seconds are then the process's own, which other programs do
not disturb.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from sampler_points import is_as_good, load_reference, sample_levels

from em_data.files import write_atomically
from em_diffusion.drawing import LDMDrawer
from em_diffusion.family import LDMOptions
from em_diffusion.samplers import (
    SAMPLERS,
    is_flow,
    list_samplers,
    store_default_sampler,
)
from em_generation.loading import find_pipeline_folder, read_model
from em_training import create_process_state, default_precision
from em_training.cli import run_command

NUM_REFERENCE_STEPS = 200
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#999999",
    "#882255",
)


@dataclass(frozen=True)
class SweepConfig:
    """Measure samplers and steps on one model, and choose the default by the rule."""

    model: str
    """A run's folder. Its own micrographs are the reference."""
    out: str | None = None
    """Folder for the results. Default: MODEL/sampler_sweep."""
    num_images: int = 1000
    """Images per point and of the reference."""
    samplers: tuple[str, ...] = ()
    """Samplers to measure. Default: all that suit the model except ddpm and euler, which need many
    steps."""
    steps: tuple[int, ...] = (4, 5, 6, 8, 10, 15, 20, 50)
    """Denoising steps to try for each. Heun's methods call the U-Net twice in all but the last."""
    data: str | None = None
    """Micrographs. Default: those that the model was trained on."""
    seed: int = 0
    batch_size: int = 50
    precision: str = "auto"
    threads: int = 1
    """Threads of the CPU."""
    write: bool = False
    """Store the chosen sampler and steps in the model's pipeline."""


def main():
    sweep(tyro.cli(SweepConfig))


def sweep(config: SweepConfig) -> dict:
    """Measure all points, print and store them, and return what sampler_sweep.json holds."""
    state = create_process_state()
    if state.num_processes > 1:
        raise ValueError("the sweep compares times, so it runs in one process")
    if config.write and find_pipeline_folder(config.model) is None:
        raise ValueError(
            f"--write needs a local folder, but {config.model} is a Hub id. Download it first."
        )
    torch.set_num_threads(config.threads)
    out = Path(config.out) if config.out else Path(config.model) / "sampler_sweep"
    out.mkdir(parents=True, exist_ok=True)
    precision = default_precision() if config.precision == "auto" else config.precision
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = read_model(config.model)
    pipeline = model.load(device=state.device, dtype=dtype)
    reference = load_reference(
        config.model, config.num_images, data=config.data, seed=config.seed, device=state.device
    )
    saved = pipeline.scheduler
    first = ("flow-euler" if is_flow(saved) else "ddim", NUM_REFERENCE_STEPS)
    key = [model.weights_sha256, config.seed, reference.num_images, precision]
    key += [str(state.device), config.threads, config.batch_size]

    points, baseline = [], None
    for name, num_steps in [first, *list_points(config, saved, first)]:
        images, seconds = measure(pipeline, name, num_steps, config, reference.num_images, out, key)
        distance = reference.measure(images)
        interval = reference.interval(distance)
        if baseline is None:
            baseline, baseline_interval, baseline_rate = (
                distance,
                interval,
                reference.num_images / seconds,
            )
        difference = reference.difference(distance, baseline)
        rate = reference.num_images / seconds
        point = {
            "sampler": name,
            "num_inference_steps": num_steps,
            "unet_evaluations": count_evaluations(name, num_steps),
            "frechet_distance": rounded(interval),
            "difference_to_reference": rounded(difference),
            "images_per_second": round(rate, 3),
            "times_reference": round(rate / baseline_rate, 2),
            "as_good": is_as_good(difference, baseline_interval),
        }
        print(json.dumps(point), flush=True)
        points.append(point)

    chosen = choose(points)
    clock = (
        f"CPU time of one thread, {state.device}"
        if config.threads == 1 and state.device.type == "cpu"
        else f"wall time, {state.device}"
    )
    result = {
        "reference": f"{first[0]} with {first[1]} steps",
        "rule": "the fastest point as good as the reference: upper end of the 95 % interval of the "
        "paired difference at most the upward half-width of the reference's interval; of points "
        "within a tenth of its speed, the nearest",
        "chosen": {key: chosen[key] for key in ("sampler", "num_inference_steps")},
        "num_images": reference.num_images,
        "data": reference.data,
        "extractor": reference.extractor.identity,
        "seconds_are": clock,
        "precision": precision,
        "batch_size": config.batch_size,
        "points": points,
    }
    write_atomically(out / "sampler_sweep.json", json.dumps(result, indent=2) + "\n")
    draw(result, out / "sampler_sweep.png")
    print(
        f"default by the rule: {chosen['sampler']} with {chosen['num_inference_steps']} steps, "
        f"{chosen['times_reference']:g} times the images/s of {result['reference']}; "
        f"{out / 'sampler_sweep.png'}"
    )
    if config.write:
        folder = find_pipeline_folder(config.model)
        store_default_sampler(folder, chosen["sampler"], chosen["num_inference_steps"])
        print(f"stored in {folder}")
    return result


def list_points(config: SweepConfig, scheduler, first) -> list[tuple[str, int]]:
    """Return the (sampler, steps) to measure beside the reference."""
    suitable = list_samplers(scheduler)
    names = config.samplers or tuple(name for name in suitable if name not in ("ddpm", "euler"))
    for name in names:
        if name not in suitable:
            raise ValueError(f"{name} does not suit {config.model}; choose {', '.join(suitable)}")
    points = [(name, num_steps) for name in names for num_steps in config.steps]
    return [point for point in points if point != first]


def count_evaluations(name: str, num_steps: int) -> int:
    """Return how often the U-Net is called: Heun's last step is one of Euler's."""
    return num_steps if SAMPLERS[name].evaluations_per_step == 1 else 2 * num_steps - 1


def measure(pipeline, name, num_steps, config: SweepConfig, num_images: int, out: Path, key):
    """Return (images uint8 [N, 1, H, W], seconds) of one point, stored or measured now."""
    key = json.dumps([*key, name, num_steps])
    path = out / "points" / f"{name}-{num_steps}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                return stored["images"], float(stored["seconds"])
    options = LDMOptions(num_inference_steps=num_steps, scheduler=name)
    drawer = LDMDrawer(pipeline, options, seed=config.seed, batch_size=config.batch_size)
    if not (out / "points").exists():
        # the first batch pays for what comes once
        sample_levels(drawer, min(num_images, config.batch_size), config.batch_size)
    images, seconds = sample_levels(drawer, num_images, config.batch_size)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.savez(file, key=key, images=images, seconds=seconds)
    temporary.replace(path)
    return images, seconds


def choose(points: list[dict]) -> dict:
    """Return the point that the rule in the module's docstring chooses."""
    good = [point for point in points if point["as_good"]]
    fastest = max(point["images_per_second"] for point in good)
    quick = [point for point in good if point["images_per_second"] > 0.9 * fastest]
    return min(quick, key=lambda point: point["frechet_distance"]["value"])


def rounded(interval) -> dict:
    return {key: float(f"{getattr(interval, key):.5g}") for key in ("value", "low", "high")}


def draw(result: dict, path: Path) -> None:
    """Plot the distances against U-Net evaluations and images/s, with the reference as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    reference, chosen = result["points"][0], result["chosen"]
    band = reference["frechet_distance"]
    names = list(dict.fromkeys(point["sampler"] for point in result["points"]))
    for axes, quantity in zip(panels, ("unet_evaluations", "images_per_second")):
        axes.axhspan(band["low"], band["high"], color="#bbbbbb", alpha=0.4, linewidth=0)
        axes.axhline(band["value"], color="#777777", linewidth=1)
        for name, colour in zip(names, COLOURS):
            points = sorted(
                (p for p in result["points"] if p["sampler"] == name), key=lambda p: p[quantity]
            )
            values = [p["frechet_distance"] for p in points]
            reach = [
                [v["value"] - v["low"] for v in values],
                [v["high"] - v["value"] for v in values],
            ]
            x, y = [p[quantity] for p in points], [v["value"] for v in values]
            axes.errorbar(
                x,
                y,
                yerr=reach,
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=name,
            )
            for p, v in zip(points, values):
                if all(p[key] == chosen[key] for key in chosen):
                    axes.plot(
                        p[quantity],
                        v["value"],
                        "o",
                        markersize=13,
                        markerfacecolor="none",
                        markeredgecolor="black",
                    )
        axes.set_xscale("log")
        for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            ticks(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
        axes.grid(alpha=0.25, which="both")
        axes.set_xlabel(
            {
                "unet_evaluations": "U-Net evaluations an image",
                "images_per_second": f"images/s ({result['seconds_are']})",
            }[quantity]
        )
    panels[0].set_ylabel(f"Frechet distance to held-out tiles ({result['num_images']:,} images)")
    panels[0].legend(fontsize=8)
    figure.suptitle(
        f"band: {result['reference']} with its 95 % interval; ring: the default by the rule, "
        f"{chosen['sampler']} with {chosen['num_inference_steps']} steps",
        fontsize=10,
    )
    figure.savefig(path, format="png")


if __name__ == "__main__":
    run_command(main)
