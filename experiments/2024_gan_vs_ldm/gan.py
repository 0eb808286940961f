"""The study's StyleGAN experiments (Table 2, Figures 3 and 4): mapping depth, feature maps, length.

    python experiments/2024_gan_vs_ldm/gan.py mapping_depth --scale small
    python experiments/2024_gan_vs_ldm/gan.py max_feature_maps --scale small
    python experiments/2024_gan_vs_ldm/gan.py kimg --scale study --data damaged-alloys:FOLDER

Each experiment writes one result file, results/EXPERIMENT_SCALE.json: a list of points with the
study's FID, our distance and the difference; a table and a picture of it. It is written after every
point, and the same command resumes. A point that another experiment of the same scale has trained
with the same settings is taken from there.

`--scale study` has the study's sizes: 256 x 256, up to 1200 kimg and 1024 feature maps, 50,000
images compared; each point takes hours on a GPU. `--scale small` trains the same comparisons at
64 x 64 on the embedded micrographs, on a CPU, with 10 images per kimg and a 16th of the maps
(mapping_depth, whose StyleGAN3 takes ten times as long: 3 images and a 64th). These distances are
of other images by another network: they compare our points with each other, and the difference to
the study means nothing (`comparable` says so). Ours compare with held-out micrographs, the study's
FID with images that it had trained on.

If the study does not state a setting (the feature maps of its depth experiment), it is StyleGAN2's
usual 512.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from recipe import SCALES, Reference, Results, choose_tiles, create_parser, draw_points
from small_presets import make_gan

from em_data import to_uint8
from em_evaluation.images import ImageSet
from em_stylegan import EMStyleGANPipeline, StyleGANConfig, train_gan
from em_stylegan.gan_loop import generate_images
from em_training import create_accelerator
from em_training.cli import run_command


@dataclass(frozen=True)
class Point:
    """A training of an experiment and the study's FID for it (None if there is none)."""

    study_fid: float | None
    architecture: str = "stylegan2"
    mapping_depth: int = 4
    max_channels: int = 512
    kimg: int = 800


EXPERIMENTS = {
    "mapping_depth": (
        Point(None, mapping_depth=2),
        Point(75.44, mapping_depth=4),
        Point(76.82, mapping_depth=8),
        Point(90.54, "stylegan3-t", 2),
        Point(147.42, "stylegan3-t", 4),
        Point(163.28, "stylegan3-t", 8),
        Point(86.92, "stylegan3-r", 2),
        Point(None, "stylegan3-r", 4),
        Point(None, "stylegan3-r", 8),
    ),
    "max_feature_maps": (
        Point(214.87, max_channels=256, kimg=200),
        Point(85.73, max_channels=256),
        Point(64.28, max_channels=512),
        Point(60.26, max_channels=1024),
    ),
    "kimg": tuple(
        Point(fid, max_channels=1024, kimg=kimg)
        for kimg, fid in zip(range(200, 1201, 200), (141.41, 77.93, 66.69, 60.26, 61.60, 58.96))
    ),
}


TITLES = {
    "mapping_depth": "Table 2: depth of the mapping network",
    "max_feature_maps": "Figure 3: maximum feature maps",
    "kimg": "Figure 4: length of the training",
}
COLUMNS = {"num_images_seen": ("images trained on", ",d"), "train_seconds": ("training, s", ".0f")}
SLOW = ("mapping_depth",)  # the experiments with StyleGAN3's points
GENERATED_AT_ONCE = 512
CHANNEL_BASE_PER_MAP = 32  # at 256 px: 1024 maps up to 32 x 32, halving from there


def make_config(point: Point, arguments) -> StyleGANConfig:
    """Return the training of a point; points that differ in kimg only continue each other."""
    scale = SCALES[arguments.scale].gan
    is_slow = arguments.experiment in SLOW
    images_per_kimg = scale.slow_images_per_kimg if is_slow else scale.images_per_kimg
    config = make_gan(scale.preset)
    if point.architecture != "stylegan2" and scale.preset == "paper":
        config = make_gan(point.architecture)
    share = scale.slow_channel_share if is_slow else scale.channel_share
    channels = max(8, round(point.max_channels * share))
    if point.architecture == "stylegan3-r":
        channels *= 2  # the architecture's own share (Karras et al. 2021, section 3.2)
    base = max(32768, CHANNEL_BASE_PER_MAP * channels) if scale.preset == "paper" else 16 * channels
    name = f"{point.architecture}-depth{point.mapping_depth}-maps{point.max_channels}"
    halve = is_slow and scale.preset == "demo"  # more steps
    batch_size = config.training.batch_size // (2 if halve else 1)
    num_images = max(2 * batch_size, round(point.kimg * images_per_kimg))
    training = replace(config.training, num_images=num_images, batch_size=batch_size)
    if point.architecture != "stylegan2":
        training = replace(training, path_length_weight=0.0, style_mixing_probability=0.0)
    return replace(
        config,
        data=arguments.data,
        out=str(Path(arguments.runs) / f"{arguments.experiment}_{arguments.scale}" / name),
        save_untrained=False,
        tiles=replace(config.tiles, **choose_tiles(config.tiles, arguments)),
        generator=replace(
            config.generator, architecture=point.architecture, mapping_depth=point.mapping_depth,
            channel_base=base, max_channels=channels,
        ),
        discriminator=replace(config.discriminator, channel_base=base, max_channels=channels),
        training=training,
    )  # fmt: skip


def train(point: Point, arguments) -> tuple:
    """Train a point unless it is trained; return its configuration and its run.json."""
    config = make_config(point, arguments)
    run = train_gan(config)
    return config, json.loads((run / "run.json").read_text())


def generate(run, config, num_images, device) -> ImageSet:
    """Return images of a run with 8 bits."""
    generator = EMStyleGANPipeline.from_pretrained(Path(run) / "pipeline").generator.to(device)
    numbers = range(num_images)
    parts = (
        numbers[start : start + GENERATED_AT_ONCE]
        for start in range(0, num_images, GENERATED_AT_ONCE)
    )
    return ImageSet(
        np.concatenate([to_uint8(generate_images(generator, config, part)) for part in parts])
    )


def count_images_seen(config) -> int:
    """Return the images that a training sees: its last batch is a whole one."""
    batch_size = config.training.batch_size
    return -(-config.training.num_images // batch_size) * batch_size


def open_results(arguments, experiment) -> Results:
    """Return the result file of an experiment of this module."""
    return Results(arguments, experiment, TITLES[experiment], COLUMNS, ("gan",))


def find_elsewhere(settings, num_images, arguments) -> dict | None:
    """Return the point with these settings from another experiment's results, or None."""
    for experiment in EXPERIMENTS:
        results = open_results(arguments, experiment)
        point = results.find(settings)
        if (
            experiment != arguments.experiment
            and point is not None
            and point["num_images_seen"] == num_images
        ):
            return {**point, "from": experiment}
    return None


def run_experiment(arguments) -> Path:
    """Train and measure every point that the result file lacks; return its path."""
    results = open_results(arguments, arguments.experiment)
    results.notes = [say_steps(arguments)]
    reference = None
    for point in EXPERIMENTS[arguments.experiment]:
        settings = {name: value for name, value in asdict(point).items() if name != "study_fid"}
        if results.find(settings) is not None:
            continue
        config = make_config(point, arguments)
        found = find_elsewhere(settings, count_images_seen(config), arguments)
        if found is not None:
            results.points.append(found)
            results.write()
            continue
        _, run = train(point, arguments)
        device = create_accelerator(config.out, "no").device
        reference = reference or Reference(arguments, config.tiles, device)
        measured = reference.measure(generate(config.out, config, len(reference.images), device))
        measured |= {name: run[name] for name in ("num_images_seen", "train_seconds")}
        results.add(settings, point.study_fid, measured)
    results.write()
    draw_points(
        results.points,
        [label(point["settings"], arguments) for point in results.points],
        results.path.with_suffix(".png"),
    )
    print(results.format_table())
    return results.path


def say_steps(arguments) -> str:
    """Say how long the trainings of an experiment are."""
    configs = [
        make_config(point, arguments).training for point in EXPERIMENTS[arguments.experiment]
    ]
    steps = sorted({-(-training.num_images // training.batch_size) for training in configs})
    span = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    return f"The trainings are of {span} steps of {configs[0].batch_size} images."


def label(settings, arguments) -> str:
    """Return a point's label for the picture."""
    if arguments.experiment == "mapping_depth":
        return f"{settings['architecture'].removeprefix('stylegan')} d{settings['mapping_depth']}"
    if arguments.experiment == "max_feature_maps":
        return f"{settings['max_channels']} maps\n{settings['kimg']} kimg"
    return f"{settings['kimg']} kimg"


def parse_arguments(argv=None):
    parser = create_parser(__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: print(run_experiment(parse_arguments())))
