"""Choose how strongly a model is guided by an early snapshot of itself; also a command."""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm.auto import tqdm

from em_data import load_data, to_uint8
from em_data.files import write_atomically
from em_diffusion.config import LDMConfig
from em_diffusion.denoiser import load_denoiser
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_diffusion.weights import hash_weights, save_model
from em_evaluation import compute_features, get_extractor
from em_evaluation.environment import describe_environment
from em_evaluation.feature_metrics import choose_metrics, measure
from em_evaluation.images import ImageSet, read_images
from em_training import create_process_state, load_config, make_generator
from em_training.cli import run_command
from em_training.family import check_options

DESCRIPTION = """Choose the guidance scale of a trained latent diffusion model.

Training keeps an early snapshot of the U-Net, the guide. A guided model steps away from the guide's
mistakes (autoguidance, Karras et al. 2024, arXiv:2406.02507). This command generates images at each
scale, measures them against training tiles, and stores the scale with the smallest Frechet distance
in RUN/pipeline, together with the guide. Held-out tiles play no part, so that a later evaluation on
them stays honest. RUN/guidance.json and RUN/guidance.png show all scales. If it is stopped, the
same command continues."""
METRICS = ("frechet_distance", "precision", "recall")


@dataclass(frozen=True)
class GuidanceConfig:
    """The run, the scales to try, and the images that are measured."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a finished run of train_ldm.py."""
    scales: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
    """Guidance scales to try; 1 is no guidance."""
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


def choose_guidance(config: GuidanceConfig, *, log=print) -> dict:
    """Measure every scale, and store the best one with the guide in the run's pipeline.

    Returns:
        What guidance.json holds: "protocol", "scales" (one dictionary of metrics with intervals per
        scale) and "guidance_scale".

    Raises:
        ValueError: If the run is not finished, or kept no guide.
    """
    run = Path(config.run)
    pipeline, guide = load_run(run)
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
    real_features = compute_features(real, extractor, cache_dir=tiles.cache_dir)
    for scale in config.scales:
        if any(each["scale"] == scale for each in measured):
            continue
        images = generate(pipeline, scale, len(real), config)
        features = compute_features(images, extractor, use_cache=False)
        metrics, _ = measure(names, features, real_features, groups_b=real.groups, seed=config.seed)
        measured.append({"scale": scale} | {name: each.to_json() for name, each in metrics.items()})
        write_json(run / "guidance.json", {"protocol": protocol, "scales": measured})
    tried = sorted(
        (each for each in measured if each["scale"] in config.scales),
        key=lambda each: each["scale"],
    )
    best = min(tried, key=lambda each: each["frechet_distance"]["value"])["scale"]
    result = {
        "guidance_scale": best,
        "protocol": protocol,
        "scales": measured,
        "environment": describe_environment(),
    }
    write_json(run / "guidance.json", result)
    draw_scales(tried, best, run / "guidance.png")
    store(pipeline, guide, best, run)
    log(f"{format_scales(tried, best)}\n\n{run / 'guidance.png'}")
    if best == tried[-1]["scale"] and len(tried) > 1:
        log(f"{best:g} is the largest scale that was tried. Try larger ones, too, with --scales.")
    log(f"{run / 'pipeline'} now {say_guided(best)}. Next: python generate.py --model {run}")
    return result


def load_run(run: Path):
    """Return the pipeline and the guide of a finished run; raise a `ValueError` otherwise."""
    if not (run / "run.json").is_file() or not (run / "config.json").is_file():
        raise ValueError(
            f"{run} holds no finished run of train_ldm.py. Give the folder of one, such as "
            "runs/demo/ldm."
        )
    folder = run / "denoiser" / "guide"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{run} kept no guide: it was trained before version 0.2, or with "
            "--denoiser.guide-images 0 or more images than the run has. Train it anew."
        )
    pipeline = EMLatentDiffusionPipeline.from_pretrained(run / "pipeline")
    return pipeline, load_denoiser(folder)


def describe_protocol(config, pipeline, guide, extractor, real, notes) -> dict:
    """Return what two measurements must have in common to be compared."""
    return {
        "images": f"{len(real):,} generated against as many training tiles",
        "extractor": extractor.identity,
        "seed": config.seed,
        "unet": hash_weights(pipeline.unet),
        "guide": hash_weights(guide),
        "scheduler": type(pipeline.scheduler).__name__,
        "num_inference_steps": pipeline.config.default_num_inference_steps,
        "intervals": "95 %, linearised bootstrap over micrographs",
        "notes": notes,
    }


def read_measured(path: Path, protocol: dict) -> list[dict]:
    """Return the scales that an earlier call measured under the same protocol."""
    try:
        before = json.loads(path.read_text())
        return before["scales"] if before["protocol"] == protocol else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


@torch.no_grad()
def generate(pipeline, scale: float, num_images: int, config) -> ImageSet:
    """Generate images at one scale; image i has the same noise at every scale."""
    levels, numbers = [], torch.arange(num_images).split(config.batch_size)
    for batch in tqdm(numbers, f"scale {scale:g}", unit="batch", leave=False, dynamic_ncols=True):
        rngs = [make_generator(config.seed, stream=f"guidance {i}") for i in batch.tolist()]
        latents = pipeline.denoise(len(rngs), rngs, guidance_scale=scale)
        levels.append(torch.from_numpy(to_uint8(pipeline.decode(latents, rngs))))
    return ImageSet(torch.cat(levels).numpy())


def store(pipeline, guide, scale: float, run: Path):
    """Save the run's pipeline with the scale, and with the guide unless the scale is 1."""
    pipeline.to("cpu")
    pipeline.guide = None if scale == 1 else guide
    pipeline.register_to_config(guidance_scale=float(scale))
    save_model(pipeline, run / "pipeline")


def write_json(path: Path, content: dict):
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def say_guided(scale: float) -> str:
    return "has no guide" if scale == 1 else f"is guided at scale {scale:g}"


def format_scales(scales, best: float) -> str:
    """Return a table of the scales, one line each."""
    lines = ["", f"{'scale':>7}  {'Frechet distance':>22}  {'precision':>9}  {'recall':>7}"]
    for each in scales:
        distance = each["frechet_distance"]
        interval = f"{distance['value']:.4g} ({distance['low']:.4g} to {distance['high']:.4g})"
        shares = (each.get(name) for name in ("precision", "recall"))
        precision, recall = (f"{share['value']:.3f}" if share else "-" for share in shares)
        mark = "  <- smallest distance" if each["scale"] == best else ""
        lines.append(f"{each['scale']:>7g}  {interval:>22}  {precision:>9}  {recall:>7}{mark}")
    return "\n".join(lines)


def draw_scales(scales, best: float, path: Path):
    """Draw the distance, and precision and recall, against the scale as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    panels[0].set_ylabel("Frechet distance (lower is closer)")
    panels[1].set_ylabel("share of images (higher is better)")
    for axes, names in zip(panels, (METRICS[:1], METRICS[1:])):
        for name in names:
            known = [each for each in scales if each.get(name)]
            x = [each["scale"] for each in known]
            value, low, high = ([each[name][k] for each in known] for k in ("value", "low", "high"))
            (line,) = axes.plot(x, value, "o-", label=name.replace("_", " "))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.axvline(best, color="grey", linestyle=":")
        axes.set_xlabel("guidance scale (1: none)")
        if axes.has_data() and len(names) > 1:
            axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def main():
    choose_guidance(tyro.cli(GuidanceConfig, description=DESCRIPTION))


if __name__ == "__main__":
    run_command(main)
