"""Choose how strongly a model is guided by an early snapshot of itself; also a command."""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from em_data import load_data, to_uint8
from em_data.files import write_atomically
from em_diffusion.config import LDMConfig
from em_diffusion.denoiser import load_denoiser
from em_diffusion.masks import load_pipeline
from em_evaluation import compute_features, get_extractor
from em_evaluation.environment import describe_environment
from em_evaluation.feature_metrics import choose_metrics, measure
from em_evaluation.images import ImageSet, read_images
from em_training import create_process_state, load_config, make_generator
from em_training.cli import run_command
from em_training.config import read_json_object
from em_training.family import check_options
from em_training.flags import parse_config
from em_training.latents import share_classes
from em_training.weights import hash_weights, save_model

DESCRIPTION = """Choose the guidance of a trained latent diffusion model: scale and interval.

Training keeps an early snapshot of the U-Net, the guide. A guided model steps away from the guide's
mistakes (autoguidance, Karras et al. 2024, arXiv:2406.02507). A model with classes may instead step
away from its own prediction without the class (classifier-free guidance, Ho and Salimans 2022,
arXiv:2207.12598). It may be guided in part of the steps only (Kynkäänniemi et al. 2024,
arXiv:2404.07724). This command generates images at each scale in
each interval, measures them against training tiles, and stores the scale and the interval with the
smallest Frechet distance in RUN/pipeline, together with the guide. Held-out tiles play no part, so
that a later evaluation on them stays honest. RUN/guidance.json and RUN/guidance.png show all of
them. If it is stopped, the same command continues."""
METRICS = ("frechet_distance", "precision", "recall")
ARM = ("scale", "start", "stop")  # what is tried


def parse_interval(text: str) -> tuple[float, float]:
    """Return START:STOP as two numbers; raise a `ValueError` if it is no interval of steps."""
    try:
        start, stop = (float(part) for part in text.split(":"))
    except ValueError:
        start = stop = -1
    if not 0 <= start < stop <= 1:
        raise ValueError(
            f"--intervals has {text}, but takes START:STOP with 0 <= START < STOP <= 1, fractions "
            "of the steps, such as 0.2:0.8."
        )
    return start, stop


@dataclass(frozen=True)
class GuidanceConfig:
    """The run, the scales and intervals to try, and the images that are measured."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a finished run of train_ldm.py."""
    by: Literal["guide", "classes"] = "guide"
    """What a model with classes is guided by: "guide", the snapshot, which is asked for the same
    class, or "classes", its own prediction without the class, which needs no guide."""
    scales: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
    """Guidance scales to try; 1 is no guidance."""
    intervals: tuple[str, ...] = ("0:1",)
    """Intervals to try at each scale: START:STOP, fractions of the steps; the first step has the
    most noise. 0:1 guides all steps. Each interval takes as long as the first."""
    num_images: int = 1000
    """Images at each scale, at most as many as there are training views."""
    extractor: str = "efficientnet-lite0"
    """Features of the distance: efficientnet-lite0 (offline) or inception."""
    cache_dir: str | None = None
    """Folder of the cut tiles, never that of the run's configuration. Default: your user's."""
    batch_size: int = 50
    """Images to generate at once."""
    seed: int = 0
    """Seed of the images and of the choice of training tiles."""

    def __post_init__(self):
        check_options(self, num_images=(12, float("inf")), batch_size=(1, float("inf")))
        if not self.scales or not all(-100 <= scale <= 100 for scale in self.scales):
            raise ValueError(f"--scales is {self.scales}, but must be numbers from -100 to 100.")
        if not self.intervals:
            raise ValueError("--intervals is empty. Use --intervals 0:1 to guide all steps.")
        self.list_arms()

    def list_arms(self) -> list[tuple[float, float, float]]:
        """Return what is tried, as (scale, start, stop); scale 1 is the same in all intervals."""
        intervals = [parse_interval(text) for text in self.intervals]
        arms = [(scale, *each) for scale in sorted(self.scales) for each in intervals]
        return list(dict.fromkeys((1.0, 0.0, 1.0) if arm[0] == 1 else arm for arm in arms))


def choose_guidance(config: GuidanceConfig, *, log=print) -> dict:
    """Measure each scale in each interval, and store the best with the guide in the pipeline.

    Returns:
        What guidance.json holds: "protocol", "scales" (one dictionary of metrics with intervals per
        scale and interval of steps), "guidance_scale", "guidance_start" and "guidance_stop".

    Raises:
        ValueError: If the run is not finished, or has nothing to be guided by.
    """
    run = Path(config.run)
    pipeline, guide = load_run(run, config.by)
    training = load_config(LDMConfig, run / "config.json")
    tiles = replace(training.tiles, cache_dir=config.cache_dir)
    data = load_data(training.data, tiles, log=log)
    device = create_process_state().device
    extractor = get_extractor(
        config.extractor, resolution=data.summary["resolution"], device=device
    )
    real = read_images(data.train, min(config.num_images, len(data.train)), config.seed)
    names, notes = choose_metrics(METRICS, extractor, len(real))
    protocol = describe_protocol(config, pipeline, guide, extractor, real, notes)
    measured = read_measured(run / "guidance.json", protocol)

    pipeline.guide = guide
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    labels = None
    if pipeline.num_classes:  # as often as in the training tiles
        classes = data.train.class_labels(np.arange(data.train.num_views))
        assert classes is not None
        labels = share_classes(classes, range(len(real)))
    real_features = compute_features(real, extractor, cache_dir=tiles.cache_dir)
    for arm in config.list_arms():
        if arm in measured:
            continue
        images = generate(pipeline, arm, len(real), config, labels)
        features = compute_features(images, extractor, use_cache=False)
        metrics, _ = measure(names, features, real_features, groups_b=real.groups, seed=config.seed)
        measured[arm] = {name: each.to_json() for name, each in metrics.items()}
        write_json(run / "guidance.json", {"protocol": protocol, "scales": list_measured(measured)})
    tried = {arm: measured[arm] for arm in config.list_arms()}
    best = min(tried, key=lambda arm: tried[arm]["frechet_distance"]["value"])
    result = {
        **{f"guidance_{name}": value for name, value in zip(ARM, best, strict=True)},
        "protocol": protocol,
        "scales": list_measured(measured),
        "environment": describe_environment(),
    }
    write_json(run / "guidance.json", result)
    draw_scales(tried, best, run / "guidance.png")
    store(pipeline, guide, best, run)
    log(f"{format_scales(tried, best)}\n\n{run / 'guidance.png'}")
    scales = {arm[0] for arm in tried}
    if best[0] == max(scales) and len(scales) > 1:
        log(f"{best[0]:g} is the largest scale that was tried. Try larger ones, too (--scales).")
    log(f"{run / 'pipeline'} now {say_guided(best)}. Next: python generate.py --model {run}")
    return result


def load_run(run: Path, by: str = "guide"):
    """Return the pipeline and the guide of a finished run; raise a `ValueError` otherwise.

    By "classes" there is no guide.
    """
    is_finished = (run / "run.json").is_file() and (run / "config.json").is_file()
    if not is_finished or "denoiser" not in read_json_object(run / "config.json"):
        raise ValueError(
            f"{run} holds no finished run of train_ldm.py. Give the folder of one, such as "
            "runs/demo/ldm."
        )
    has_classes = read_json_object(run / "config.json").get("conditional")
    folder = run / "denoiser" / "guide"
    if by == "classes" and not has_classes:
        raise ValueError(
            f"--by is classes, but the model of {run} has none. Leave it out, or train a model "
            "with classes: train_ldm.py --conditional."
        )
    if by == "guide" and not (folder / "config.json").is_file():
        way = "Use --by classes." if has_classes else "Train it anew."
        raise ValueError(
            f"{run} kept no guide: it was trained before version 0.2, or with "
            f"--denoiser.guide-images 0 or more images than the run has. {way}"
        )
    pipeline = load_pipeline(run / "pipeline")
    return pipeline, load_denoiser(folder) if by == "guide" else None


def describe_protocol(config, pipeline, guide, extractor, real, notes) -> dict:
    """Return what two measurements must have in common to be compared."""
    return {
        "images": f"{len(real):,} generated against as many training tiles",
        "extractor": extractor.identity,
        "seed": config.seed,
        "unet": hash_weights(pipeline.unet),
        "guide": "no class" if guide is None else hash_weights(guide),
        "scheduler": type(pipeline.scheduler).__name__,
        "num_inference_steps": pipeline.config.default_num_inference_steps,
        "intervals": "95 %, linearised bootstrap over micrographs",
        "notes": notes,
    }


def read_measured(path: Path, protocol: dict) -> dict[tuple, dict]:
    """Return {(scale, start, stop): metrics} of an earlier call under the same protocol.

    Version 0.1 guided all steps and recorded no interval.
    """
    try:
        before = json.loads(path.read_text())
        if before["protocol"] != protocol:
            return {}
        return {
            (each.pop("scale"), each.pop("start", 0.0), each.pop("stop", 1.0)): each
            for each in before["scales"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def list_measured(measured: dict[tuple, dict]) -> list[dict]:
    """Return the measured arms as guidance.json has them."""
    return [dict(zip(ARM, arm, strict=True)) | metrics for arm, metrics in measured.items()]


@torch.no_grad()
def generate(pipeline, arm, num_images: int, config, class_labels=None) -> ImageSet:
    """Generate images of one arm (scale, start, stop); image i has the same noise in all arms.

    class_labels: the class of each image, for a model with classes.
    """
    scale, start, stop = arm
    levels, numbers = [], torch.arange(num_images).split(config.batch_size)
    title = f"scale {scale:g}" + ("" if (start, stop) == (0, 1) else f" in {start:g}:{stop:g}")
    for batch in tqdm(numbers, title, unit="batch", leave=False, dynamic_ncols=True):
        rngs = [make_generator(config.seed, stream=f"guidance {i}") for i in batch.tolist()]
        latents = pipeline.denoise(
            len(rngs),
            rngs,
            guidance_scale=scale,
            guidance_start=start,
            guidance_stop=stop,
            class_labels=class_labels and [class_labels[i] for i in batch.tolist()],
        )
        levels.append(torch.from_numpy(to_uint8(pipeline.decode(latents, rngs))))
    return ImageSet(torch.cat(levels).numpy())


def store(pipeline, guide, arm, run: Path):
    """Save the run's pipeline with its guidance, and the guide unless the scale is 1."""
    pipeline.to("cpu")
    scale, start, stop = (float(value) for value in arm)
    pipeline.guide = None if scale == 1 else guide
    pipeline.register_to_config(guidance_scale=scale, guidance_start=start, guidance_stop=stop)
    save_model(pipeline, run / "pipeline")


def write_json(path: Path, content: dict):
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def say_guided(arm) -> str:
    scale, start, stop = arm
    if scale == 1:
        return "has no guidance"
    return f"is guided at scale {scale:g} in {say_steps(start, stop)}"


def say_steps(start: float, stop: float) -> str:
    if (start, stop) == (0, 1):
        return "all steps"
    return f"{100 * start:g} to {100 * stop:g} % of the steps"


def format_scales(tried: dict[tuple, dict], best) -> str:
    """Return a table of the arms, one line each."""
    lines = [
        "",
        f"{'scale':>7}  {'interval':>9}  {'Frechet distance':>22}  {'precision':>9}  {'recall':>7}",
    ]
    for (scale, start, stop), metrics in tried.items():
        distance = metrics["frechet_distance"]
        interval = f"{distance['value']:.4g} ({distance['low']:.4g} to {distance['high']:.4g})"
        shares = (metrics.get(name) for name in ("precision", "recall"))
        precision, recall = (f"{share['value']:.3f}" if share else "-" for share in shares)
        steps = "-" if scale == 1 else f"{start:g}:{stop:g}"
        mark = "  <- smallest distance" if (scale, start, stop) == best else ""
        lines.append(f"{scale:>7g}  {steps:>9}  {interval:>22}  {precision:>9}  {recall:>7}{mark}")
    return "\n".join(lines)


def draw_scales(tried: dict[tuple, dict], best, path: Path):
    """Draw distance, precision and recall against the scale, a line an interval, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    intervals = list(dict.fromkeys(arm[1:] for arm in tried if arm[0] != 1)) or [(0.0, 1.0)]
    for axes, name in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        better = "lower" if name == METRICS[0] else "higher"
        axes.set_ylabel(f"{name.replace('_', ' ').capitalize()} ({better} is better)")
        axes.set_xlabel("guidance scale (1: none)")
        for interval in intervals:
            points = [
                (arm[0], metrics[name])
                for arm, metrics in tried.items()
                if (arm[0] == 1 or arm[1:] == interval) and metrics.get(name)
            ]
            x, ends = [scale for scale, _ in points], ("value", "low", "high")
            value, low, high = ([each[end] for _, each in points] for end in ends)
            (line,) = axes.plot(x, value, "o-", label=say_steps(*interval))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.axvline(best[0], color="grey", linestyle=":")
    if len(intervals) > 1:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def main():
    choose_guidance(parse_config(GuidanceConfig, "em_diffusion.choose_guidance", DESCRIPTION))


if __name__ == "__main__":
    run_command(main)
