"""The study's StyleGAN experiments (its Table 2, Figures 3 and 4): mapping depth, maximum feature maps, length of the training.

    python experiments/2024_gan_vs_ldm/gan.py mapping_depth --scale small
    python experiments/2024_gan_vs_ldm/gan.py max_feature_maps --scale small
    python experiments/2024_gan_vs_ldm/gan.py kimg --scale study --data FOLDER --extractor inception

One command an experiment, one result file: results/EXPERIMENT_SCALE.json, a list of points with the study's FID, our distance and the
difference. It is written after every point; the same command goes on where it was stopped.

`--scale study` is the study's: 256 x 256, up to 1200 kimg and 1024 feature maps, 50,000 images compared; each point takes hours on a GPU.
`--scale small` trains the same comparison at 64 x 64 on the embedded micrographs with a 200th of the images and a 16th of the maps, on a
CPU. Its distances are of other images by another network than the study's: they tell our points from each other, and the difference to
the study means nothing (`comparable` says so). Ours are to held-out micrographs; the study's FID was to images that it had trained on.

Where the study does not say a setting (the feature maps of its depth experiment), StyleGAN2's usual 512 stands.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from em_data import load_data
from em_evaluation.held_out import HeldOutDistance
from em_stylegan import PRESETS, EMStyleGANPipeline, StyleGANConfig, train_gan
from em_stylegan.loop import generate_images
from em_training import create_accelerator, write_text_atomically
from em_training.cli import run_command


@dataclass(frozen=True)
class Point:
    """A training of an experiment and the FID that the study reports for it (None where it reports none)."""

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


@dataclass(frozen=True)
class Scale:
    """What a point's numbers are multiplied by, and how the rest is trained and measured."""

    preset: str
    resolution: int
    images_per_kimg: int
    channel_share: float
    num_images: int


SCALES = {
    "study": Scale("paper", 256, 1000, 1, 50_000),
    "small": Scale("demo", 64, 5, 1 / 16, 500),
    "test": Scale("test", 32, 0, 1 / 64, 8),  # two steps each: that everything runs
}
CHANNEL_BASE_PER_MAP = 32  # at 256 px: 1024 maps up to 32 x 32, halving from there


def make_config(point: Point, arguments) -> StyleGANConfig:
    """The training of a point; points of an experiment that differ in kimg alone share a folder, where each goes on from the one before."""
    scale = SCALES[arguments.scale]
    config = PRESETS[scale.preset]()
    if point.architecture != "stylegan2" and scale.preset == "paper":
        config = PRESETS[point.architecture]()
    channels = max(8, round(point.max_channels * scale.channel_share))
    if point.architecture == "stylegan3-r":
        channels *= 2  # the architecture's own share (Karras et al. 2021, section 3.2)
    base = max(32768, CHANNEL_BASE_PER_MAP * channels) if scale.preset == "paper" else 16 * channels
    name = f"{point.architecture}-depth{point.mapping_depth}-maps{point.max_channels}"
    batch_size = config.training.batch_size
    num_images = max(2 * batch_size, point.kimg * scale.images_per_kimg)
    is_alias_free = point.architecture != "stylegan2"
    training = replace(config.training, num_images=num_images)
    if is_alias_free:
        training = replace(training, path_length_weight=0.0, style_mixing_probability=0.0)
    tiles = replace(
        config.tiles,
        resolution=scale.resolution,
        **({} if arguments.cache_dir is None else {"cache_dir": arguments.cache_dir}),
    )
    return replace(
        config,
        data=arguments.data,
        out=str(Path(arguments.runs) / f"{arguments.experiment}_{arguments.scale}" / name),
        save_untrained=False,
        tiles=tiles,
        generator=replace(
            config.generator, architecture=point.architecture, mapping_depth=point.mapping_depth,
            channel_base=base, max_channels=channels,
        ),
        discriminator=replace(config.discriminator, channel_base=base, max_channels=channels),
        training=training,
    )  # fmt: skip


def measure(run, config, num_images, extractor) -> dict:
    """Distance of a run's images to held-out tiles, {"distance", "num_images"}."""
    accelerator = create_accelerator(run, "no")
    held_out = load_data(config.data, config.tiles, log=lambda text: None).held_out
    distance = HeldOutDistance(held_out, num_images, config.seed, accelerator=accelerator, extractor=extractor)
    generator = EMStyleGANPipeline.from_pretrained(Path(run) / "pipeline").generator.to(accelerator.device)
    value = distance.measure(partial(generate_images, generator, config))
    return {"distance": value, "num_images": distance.num_images}


def run_experiment(arguments) -> Path:
    """Train and measure every point that the result file lacks; returns its path."""
    path = Path(arguments.results) / f"{arguments.experiment}_{arguments.scale}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "experiment": arguments.experiment,
        "scale": arguments.scale,
        "data": Path(arguments.data).name,  # no path of this machine
        "extractor": arguments.extractor,
    }
    rows = read_rows(path, facts)
    comparable = False  # held-out reference here, training images in the study
    for point in EXPERIMENTS[arguments.experiment]:
        settings = {name: value for name, value in asdict(point).items() if name != "study_fid"}
        if any(row["settings"] == settings for row in rows):
            continue
        config = make_config(point, arguments)
        run = train_gan(config)
        done = json.loads((run / "run.json").read_text())
        ours = measure(run, config, SCALES[arguments.scale].num_images, arguments.extractor)
        rows.append(
            {
                "settings": settings,
                "study": point.study_fid,
                "ours": ours["distance"],
                "difference": None if point.study_fid is None else ours["distance"] - point.study_fid,
                "comparable": comparable,
                "num_images_compared": ours["num_images"],
                "num_images_seen": done["num_images_seen"],
                "train_seconds": done["train_seconds"],
            }
        )
        write_text_atomically(path, json.dumps({**facts, "points": rows}, indent=2) + "\n")
    print_table(rows)
    return path


def read_rows(path, facts) -> list:
    """The points that a result file holds already; ValueError when it is of another experiment."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    other = [name for name, value in facts.items() if found.get(name) != value]
    if other:
        raise ValueError(f"{path} was made with another {', '.join(other)}: give another --results")
    return found["points"]


def print_table(rows):
    print(f"{'point':44}{'study':>10}{'ours':>10}{'difference':>12}")
    for row in rows:
        name = " ".join(str(value) for value in row["settings"].values())
        study, difference = ("-" if value is None else f"{value:.2f}" for value in (row["study"], row["difference"]))
        print(f"{name:44}{study:>10}{row['ours']:>10.2f}{difference:>12}")
    if not all(row["comparable"] for row in rows):
        print("other images or another network than the study's: compare our points with each other only")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--data", default="synthetic", help='a folder of micrographs, or "synthetic"')
    parser.add_argument("--extractor", default="efficientnet-lite0", choices=("efficientnet-lite0", "inception"))
    parser.add_argument("--runs", default="runs/2024_gan_vs_ldm", help="folder of the trainings")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--cache-dir", help="of the tiles")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: print(run_experiment(parse_arguments())))
