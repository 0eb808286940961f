"""Train a StyleGAN on micrographs."""

import sys

from em_hub.publish import train_and_publish
from em_stylegan.presets import PRESETS
from em_stylegan.train import train_gan
from em_training.cli import parse_preset, run_command

DESCRIPTION = """Train a StyleGAN on electron micrographs.

  python train_gan.py demo                                  the embedded synthetic micrographs, minutes on 2 CPU cores
  python train_gan.py small --data FOLDER --out runs/mine   your own micrographs (TIFF, PNG, JPEG, BMP; 8 or 16 bit)
  accelerate launch train_gan.py paper --data FOLDER        all GPUs of the machine

--push-to-hub REPO publishes the finished run on the Hub (--private: for you alone).
A run that was stopped or killed goes on when the same command is given again.
`python train_gan.py PRESET --help` lists the flags of a preset with their values."""


def run() -> None:
    def parse(argv):
        return parse_preset(PRESETS, default="demo", description=DESCRIPTION, argv=argv)

    train_and_publish(parse, train_gan, sys.argv[1:])


def main() -> None:
    run_command(run)
