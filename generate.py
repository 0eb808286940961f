"""Generate images from a trained model: a run, a saved pipeline or a Hub repository."""

import tyro

from em_generation.generate import GenerationConfig, generate_images
from em_training.cli import run_command


def main():
    generate_images(tyro.cli(GenerationConfig), refuse_unused=True)


if __name__ == "__main__":
    run_command(main)
