"""The study's LDM experiments: levels of the U-Net (its Figure 6) and batch size.

    python experiments/2024_gan_vs_ldm/ldm.py unet_levels --scale small
    python experiments/2024_gan_vs_ldm/ldm.py batch_size --scale study \\
        --data damaged-alloys:FOLDER --extractor inception --autoencoder CHECKPOINT

unet_levels compares U-Nets of 3 and 4 levels, batch_size 8, 16, 32 and 64 images a step for equally
many images. results/EXPERIMENT_SCALE.json has each training's distance to held-out tiles, last
losses and time; its `curves` hold the training loss, the loss on held-out latents and the distance
during training, which results/EXPERIMENT_SCALE.png draws. The study reports no distance for these.

The study's text leaves some things open. Here, Figure 6 shows losses and distances over the images
seen. A level is a resolution of the U-Net; N levels are the first N of the multipliers 1, 2, 2, 4,
4, with attention on all but the finest. The learning rate is the preset's for every batch size. All
points use one autoencoder: `--autoencoder`'s, or the f8 of autoencoders.py. The distance is of the
last averaged weights with the sampler that runs are saved with. Distances of the curves are of
fewer images.

`--scale study` trains the preset `paper`, which takes hours for each point on a GPU. `--scale
small` trains the preset `demo` with 2,400 images on a CPU.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from autoencoders import find_variant
from recipe import (
    SCALES,
    Reference,
    Results,
    choose_tiles,
    create_figure,
    create_parser,
    save_figure,
)
from small_presets import make_ldm

from em_data import to_uint8
from em_diffusion import EMLatentDiffusionPipeline, LDMConfig, train_ldm
from em_diffusion.denoiser import load_denoiser
from em_diffusion.denoiser_loop import generate_images
from em_evaluation.images import ImageSet
from em_training import create_accelerator, read_stats
from em_training.cli import run_command

MULTIPLIERS = (1, 2, 2, 4, 4)  # the study's


@dataclass(frozen=True)
class Point:
    """A training; None for the preset's."""

    num_levels: int | None = None
    batch_size: int | None = None


EXPERIMENTS = {
    "unet_levels": (Point(num_levels=3), Point(num_levels=4)),
    "batch_size": tuple(Point(batch_size=size) for size in (8, 16, 32, 64)),
}
TITLES = {
    "unet_levels": "Figure 6: levels of the LDM's U-Net",
    "batch_size": "Batch size of the LDM",
}
COLUMNS = {
    "num_images_seen": ("images trained on", ",d"),
    "loss": ("training loss", ".4f"),
    "held_out_loss": ("held-out loss", ".4f"),
    "num_parameters": ("parameters of the U-Net", ",d"),
    "train_seconds": ("training, s", ".0f"),
}
CURVES = {
    "loss": "training loss",
    "held_out_loss": "loss on held-out latents",
    "held_out_frechet_distance": "Frechet distance to held-out tiles",
}
NUM_MOMENTS = 4  # of a training, at which its curves have a point


def make_config(point: Point, arguments) -> LDMConfig:
    """Return the training of a point: the scale's preset on a trained autoencoder.

    It has no grain, which the study did not add.
    """
    scale = SCALES[arguments.scale]
    config = make_ldm(scale.ldm.preset)
    denoiser = config.denoiser
    num_images = scale.ldm.denoiser_images or denoiser.num_images
    every = max(1, num_images // NUM_MOMENTS)
    denoiser = replace(
        denoiser,
        num_images=num_images,
        batch_size=point.batch_size or denoiser.batch_size,
        log_every=min(denoiser.log_every, every),
        validate_every=every,
        evaluate_every=every,
        num_evaluation_images=min(scale.num_images, scale.ldm.num_curve_images),
    )
    if point.num_levels is not None:
        multipliers = MULTIPLIERS[: point.num_levels]
        denoiser = replace(
            denoiser,
            channel_multipliers=multipliers,
            attention_levels=tuple(range(1, len(multipliers))),
        )
    return replace(
        config,
        data=arguments.data,
        out=str(
            Path(arguments.runs) / f"{arguments.experiment}_{arguments.scale}" / name_run(point)
        ),
        tiles=replace(config.tiles, **choose_tiles(config.tiles, arguments)),
        autoencoder=replace(config.autoencoder, init_from=find_variant(arguments), num_images=0),
        denoiser=denoiser,
        grain_images=0,
    )


def name_run(point) -> str:
    return f"levels{point.num_levels}" if point.batch_size is None else f"batch{point.batch_size}"


def train(point: Point, arguments) -> tuple:
    """Train a point unless it is trained; return its configuration, run.json and pipeline.

    The pipeline has the last averaged weights. The run's own has the weights that were nearest to
    the held-out tiles, an advantage that the GANs do not have.
    """
    config = make_config(point, arguments)
    share_latents(config, arguments)
    run = train_ldm(config)
    pipeline = EMLatentDiffusionPipeline.from_pretrained(run / "pipeline")
    unet = load_denoiser(run / "denoiser" / "unet").eval()
    num_steps = pipeline.config.default_num_inference_steps
    pixel_size_nm = pipeline.config.pixel_size_nm
    pipeline = EMLatentDiffusionPipeline(
        pipeline.vqvae, unet, pipeline.scheduler, pixel_size_nm, num_steps
    )
    return config, json.loads((run / "run.json").read_text()), pipeline


def share_latents(config, arguments):
    """Keep the latents of all points in one folder; a file's name says what was encoded by what."""
    common = (Path(arguments.runs) / f"latents_{arguments.scale}").absolute()
    folder = Path(config.out) / "latents"
    common.mkdir(parents=True, exist_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        folder.symlink_to(common, target_is_directory=True)


def generate(pipeline, config, num_images, accelerator) -> ImageSet:
    """A pipeline's images by its own sampler, on the 8-bit road."""
    pipeline.to(accelerator.device)
    starts = range(0, num_images, 512)
    parts = (range(start, min(start + 512, num_images)) for start in starts)
    num_steps = pipeline.config.default_num_inference_steps
    return ImageSet(
        np.concatenate(
            [
                to_uint8(generate_images(pipeline, config.seed, part, num_steps, accelerator))
                for part in parts
            ]
        )
    )


def read_curves(run) -> dict:
    """{name: [[images seen, value], ...]} of a run's losses and distances."""
    lines = read_stats(Path(run) / "denoiser")
    return {
        name: [[line["num_images_seen"], line[name]] for line in lines if name in line]
        for name in CURVES
    }


def run_experiment(arguments) -> Path:
    """Train and measure every point that the result file lacks; returns its path."""
    results = Results(
        arguments, arguments.experiment, TITLES[arguments.experiment], COLUMNS, ("ldm",)
    )
    reference = None
    for point in EXPERIMENTS[arguments.experiment]:
        settings = {name: value for name, value in asdict(point).items() if value is not None}
        if results.find(settings) is not None:
            continue
        config, run, pipeline = train(point, arguments)
        accelerator = create_accelerator(config.out, "no")
        reference = reference or Reference(arguments, config.tiles, accelerator.device)
        measured = reference.measure(generate(pipeline, config, len(reference.images), accelerator))
        curves = read_curves(config.out)
        measured |= {name: curves[name][-1][1] for name in ("loss", "held_out_loss")}
        measured |= {
            "num_images_seen": run["num_images_seen"],
            "train_seconds": run["train_seconds_by_stage"]["denoiser"],
            "num_parameters": sum(parameter.numel() for parameter in pipeline.unet.parameters()),
            "curves": curves,
        }
        results.add(settings, None, measured)
    results.write()
    draw_curves(results.points, results.path.with_suffix(".png"))
    print(results.format_table())
    return results.path


def draw_curves(points, path):
    """Draw each training's losses and distances over the images seen."""
    figure = create_figure(figsize=(12, 3.6))
    for axes, (name, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items()):
        for point in points:
            label = ", ".join(
                f"{key.removeprefix('num_').replace('_', ' ')} {value}"
                for key, value in point["settings"].items()
            )
            axes.plot(*zip(*point["curves"][name]), marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel="images seen")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def parse_arguments(argv=None):
    parser = create_parser(__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument(
        "--autoencoder",
        help="what load_autoencoder reads: a run, a pipeline, a checkpoint, a Hub id",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: print(run_experiment(parse_arguments())))
