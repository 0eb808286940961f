"""Convert a network pickle of stylegan2-ada-pytorch or stylegan3.

    python -m em_stylegan.load_official network-snapshot-000800.pkl OUT_DIR

OUT_DIR/G_ema, G and D hold the networks, for `train_gan.py --init-from OUT_DIR`. OUT_DIR/pipeline
holds the averaged generator as a pipeline, so OUT_DIR also works wherever a run does, for example
in `generate.py --model OUT_DIR`. From Python, use `em_stylegan.original.convert.convert`.
"""

import argparse
from pathlib import Path

from em_stylegan.original.convert import convert
from em_training.cli import run_command


def main():
    parser = argparse.ArgumentParser(
        prog="python -m em_stylegan.load_official",
        description="Convert a network pickle of stylegan2-ada-pytorch or stylegan3 to safetensors "
        "and to a pipeline.",
    )
    parser.add_argument("pickle", type=Path, help="network-snapshot-*.pkl")
    parser.add_argument("out_dir", type=Path, help="new or empty folder")
    args = parser.parse_args()
    names = convert(args.pickle, args.out_dir)
    for name in names:
        print(f"{name} -> {args.out_dir / name}")
    if "pipeline" in names:
        print(f"draw images with: python generate.py --model {args.out_dir} --out FOLDER")
    else:
        print(f"{args.pickle} holds no generator, so there is no pipeline to draw images with")


if __name__ == "__main__":
    run_command(main)
