"""Measure what adaptive augmentation gains on few micrographs.

    python experiments/ada/run.py [--num-train 2] [--num-held-out 30] [--data FOLDER]

Trains StyleGAN2 twice on the tiles of `--num-train` micrographs, each tile in one view. The two
trainings differ only in `training.augmentation.mode`. Every `--evaluate-every` images the averaged
generator's distance to tiles of `--num-held-out` other micrographs is measured. By default the
embedded micrographs have 256 pixels a side and are averaged over 2 x 2, which makes 32 training
tiles of 32 x 32.

Writes results/ada.json (both curves) and results/ada.png, and resumes where it stopped. Without
augmentation the distance falls and then rises again, once the discriminator has learned the few
images by heart (Karras et al. 2020, ADA, figure 1).
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from em_data.files import write_atomically
from em_stylegan import PRESETS, train_gan
from em_training import read_stats
from em_training.cli import run_command

MODES = ("none", "adaptive")


def make_config(mode, arguments):
    config = PRESETS[arguments.preset]()
    num_micrographs = arguments.num_train + arguments.num_held_out
    tiles = {
        "num_micrographs": num_micrographs,
        "held_out_fraction": arguments.num_held_out / num_micrographs,
    }
    tiles |= {"micrograph_size": arguments.micrograph_px}
    tiles |= {"resolution": arguments.resolution, "downsample": arguments.downsample}
    tiles |= {"symmetries": "none"}  # few images: six views of each would be six times as many
    tiles |= {} if arguments.cache_dir is None else {"cache_dir": arguments.cache_dir}
    augmentation = replace(
        config.training.augmentation, mode=mode, images_to_one=arguments.images_to_one
    )
    training = replace(
        config.training,
        num_images=arguments.num_images,
        augmentation=augmentation,
        r1_gamma=arguments.r1_gamma,
        evaluate_every=arguments.evaluate_every,
        log_every=arguments.evaluate_every,
        num_evaluation_images=arguments.num_evaluation_images,
    )
    return replace(
        config,
        data=arguments.data,
        out=str(Path(arguments.runs) / mode),
        save_untrained=False,
        tiles=replace(config.tiles, **tiles),
        generator=limit_channels(config.generator, arguments.max_channels),
        discriminator=limit_channels(config.discriminator, arguments.max_channels),
        training=training,
    )


def limit_channels(network, max_channels):
    """Scale the feature maps at every resolution so that none exceeds `max_channels`."""
    share = min(1, max_channels / network.max_channels)
    return replace(
        network,
        channel_base=round(network.channel_base * share),
        max_channels=round(network.max_channels * share),
    )


def read_curve(run):
    """Return [[images seen, distance, probability of augmentation], ...] of a run."""
    return [
        [
            line["num_images_seen"],
            line["held_out_frechet_distance"],
            line.get("augmentation_probability", 0.0),
        ]
        for line in read_stats(run / "stylegan")
        if "held_out_frechet_distance" in line
    ]


def run_experiment(arguments) -> dict:
    """Train twice, write the files of the comparison, and return the content of ada.json."""
    curves, data = {}, None
    for mode in MODES:
        run = train_gan(make_config(mode, arguments))
        curves[mode] = read_curve(run)
        data = json.loads((run / "run.json").read_text())["data"]
    result = {
        "settings": {
            k: v for k, v in vars(arguments).items() if k not in ("runs", "results", "cache_dir")
        },
        "num_micrographs": data["num_micrographs"],
        "num_training_tiles": data.get("num_train_tiles"),
        "columns": ["num_images_seen", "held_out_frechet_distance", "augmentation_probability"],
        "curves": curves,
        "best": {mode: min(point[1] for point in curve) for mode, curve in curves.items()},
        "last": {mode: curve[-1][1] for mode, curve in curves.items()},
    }
    folder = Path(arguments.results)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "ada.json", json.dumps(result, indent=2) + "\n")
    draw(curves, folder / "ada.png")
    return result


def draw(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for mode, label in zip(MODES, ("without augmentation", "adaptive augmentation")):
        axes.plot(
            [point[0] for point in curves[mode]],
            [point[1] for point in curves[mode]],
            marker="o",
            label=label,
        )
    axes.set(xlabel="real images shown", ylabel="Frechet distance to held-out tiles")
    axes.set_ylim(bottom=0)
    axes.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="demo")
    parser.add_argument("--data", default="synthetic")
    parser.add_argument("--num-train", type=int, default=2, help="micrographs to train on")
    parser.add_argument(
        "--num-held-out", type=int, default=30, help="other micrographs, to compare with"
    )
    parser.add_argument(
        "--micrograph-px", type=int, default=256, help="side of the embedded micrographs"
    )
    parser.add_argument("--resolution", type=int, default=32, help="of the tiles in pixels")
    parser.add_argument(
        "--downsample", type=int, default=2, help="pixels of the micrograph averaged along a side"
    )
    parser.add_argument("--r1-gamma", type=float, help="weight of R1; default: the paper's rule")
    parser.add_argument("--max-channels", type=int, default=64, help="feature maps at most")
    parser.add_argument("--num-images", type=int, default=40_000)
    # the paper's 500,000 are a fiftieth of its training
    parser.add_argument(
        "--images-to-one", type=float, default=4_000, help="images in which p can rise from 0 to 1"
    )
    parser.add_argument("--evaluate-every", type=int, default=4_000)
    parser.add_argument("--num-evaluation-images", type=int, default=500)
    parser.add_argument("--runs", default="runs/ada")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--cache-dir", help="of the tiles")
    return parser.parse_args(argv)


def main():
    result = run_experiment(parse_arguments())
    print(json.dumps({name: result[name] for name in ("best", "last")}))


if __name__ == "__main__":
    run_command(main)
