"""Generate images from a trained model: a run, a saved pipeline or a Hub repository."""

import tyro

from em_generation.generate import GenerationConfig, generate_images
from em_training.cli import run_command


def run() -> None:
    generate_images(tyro.cli(GenerationConfig), refuse_unused=True)


def main() -> None:
    run_command(run)
