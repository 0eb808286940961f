"""Train a latent diffusion model on micrographs."""

from em_commands.training import run_training
from em_diffusion.family import FAMILY
from em_training.cli import run_command


def main() -> None:
    run_command(lambda: run_training(FAMILY))
