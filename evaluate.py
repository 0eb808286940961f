"""Compare trained models with held-out micrographs and with each other: report.html and report.json; or reports with --compare."""

import tyro

from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_training.cli import run_command


def main():
    evaluate_runs(tyro.cli(EvaluationConfig))


if __name__ == "__main__":
    run_command(main)
