"""Compare trained models with held-out micrographs and with each other."""

import tyro

from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_training.cli import run_command


def run() -> None:
    evaluate_runs(tyro.cli(EvaluationConfig))


def main() -> None:
    run_command(run)
