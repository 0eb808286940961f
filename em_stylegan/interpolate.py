"""Make pictures of what a generator has learned: a walk through w, mixed styles, truncation.

    python -m em_stylegan.interpolate walk RUN walk.gif      (.gif, .png for APNG, .mp4)
    python -m em_stylegan.interpolate mixing RUN mixing.png --layers 0 4
    python -m em_stylegan.interpolate truncation RUN truncation.png

RUN is the folder of a finished run or of a saved pipeline.
"""

import argparse

from em_stylegan.pictures.files import (
    check_grid_format,
    check_video_format,
    save_grid,
    save_video,
)
from em_stylegan.pictures.styles import load_for_class, make_mixing, make_truncation, make_walk
from em_training.cli import run_command


def run_walk(args):
    check_video_format(args.out)  # before the work
    generator, class_label = load_for_class(args.model, args.class_label)
    images = make_walk(
        generator,
        args.seed,
        args.num_keys,
        args.frames_per_key,
        args.truncation_psi,
        class_label,
    )
    save_video(images, args.out, args.fps)


def run_mixing(args):
    check_grid_format(args.out)
    generator, class_label = load_for_class(args.model, args.class_label)
    images = make_mixing(
        generator,
        args.seed,
        args.num_rows,
        args.num_columns,
        args.layers,
        args.truncation_psi,
        class_label,
    )
    save_grid(images, args.out, args.num_columns + 1)


def run_truncation(args):
    check_grid_format(args.out)
    generator, class_label = load_for_class(args.model, args.class_label)
    images = make_truncation(generator, args.seed, args.num_rows, args.psi, class_label)
    save_grid(images, args.out, len(args.psi))


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m em_stylegan.interpolate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="walk|mixing|truncation")

    def add(name, run, text):
        command = commands.add_parser(name, help=text)
        command.add_argument("model", help="folder of a finished run or of a saved pipeline")
        command.add_argument("out", help="file to write")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--class-label", help="name or number of a class")
        command.set_defaults(run=run)
        return command

    one = add("walk", run_walk, "a closed walk through w as GIF, APNG or MP4")
    one.add_argument("--num-keys", type=int, default=6, help="images that the walk passes")
    one.add_argument("--frames-per-key", type=int, default=24)
    one.add_argument("--fps", type=int, default=24)
    two = add("mixing", run_mixing, "a grid of images that mix two styles")
    two.add_argument("--num-rows", type=int, default=4)
    two.add_argument("--num-columns", type=int, default=5)
    two.add_argument(
        "--layers",
        type=int,
        nargs=2,
        metavar=("FIRST", "END"),
        help="layers that take the column's style; default: the coarsest third",
    )
    for command in (one, two):
        command.add_argument("--truncation-psi", type=float, default=1.0)
    three = add("truncation", run_truncation, "a grid of images that approach the mean")
    three.add_argument("--num-rows", type=int, default=4)
    three.add_argument("--psi", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    for name in ("num_keys", "frames_per_key", "fps", "num_rows", "num_columns"):
        value = getattr(args, name, 1)
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be at least 1.")
    args.run(args)
    print(args.out)


if __name__ == "__main__":
    run_command(main)
