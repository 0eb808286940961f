"""Look at micrographs before training."""

from em_data.look.command import run
from em_training.cli import run_command


def main() -> None:
    run_command(run)
