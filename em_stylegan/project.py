"""Find the w whose image is nearest to a micrograph, see `em_stylegan.pictures.projection`.

python -m em_stylegan.project MICROGRAPH RUN --row 512 --column 512
"""

import argparse
import json
from pathlib import Path

from em_stylegan.pictures.projection import (
    ProjectionConfig,
    project,
    read_tile,
    save_projection,
)
from em_stylegan.pictures.styles import load_for_class
from em_training.cli import run_command


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m em_stylegan.project",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("micrograph")
    add("model", help="folder of a finished run or of a saved pipeline")
    add("--out", default="projection", help="folder to write to")
    add("--row", type=int, default=0, help="upper edge of the tile in the micrograph's pixels")
    add("--column", type=int, default=0, help="left edge of the tile")
    add("--downsample", type=int, default=1, help="as in the run's tiles")
    choices = ("auto", "full", "percentile")
    add("--intensity", default="auto", choices=choices, help="as in the run's tiles")
    add("--num-steps", type=int, default=ProjectionConfig.num_steps)
    add("--pixel-weight", type=float, default=ProjectionConfig.pixel_weight)
    add("--seed", type=int, default=0)
    add("--class-label", help="name or number of a class, where to start")
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    config = ProjectionConfig(
        num_steps=args.num_steps, pixel_weight=args.pixel_weight, seed=args.seed
    )
    generator, class_label = load_for_class(args.model, args.class_label)
    target = read_tile(
        args.micrograph,
        generator.config.resolution,
        args.row,
        args.column,
        args.downsample,
        args.intensity,
    )
    found, image, distances = project(generator, target, config, class_label=class_label)
    facts = {
        "micrograph": Path(args.micrograph).name,
        "row": args.row,
        "column": args.column,
        "downsample": args.downsample,
        "num_steps": config.num_steps,
        "perceptual_distance": distances[-1],
        "pixel_rms": (image - target).square().mean().sqrt().item(),
    }
    save_projection(args.out, found, image, target, facts)
    print(json.dumps(facts))


if __name__ == "__main__":
    run_command(main)
