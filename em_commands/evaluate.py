"""Compare trained models with held-out micrographs and with each other."""

import sys

from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_training.cli import run_command
from em_training.flags import parse_flags


def main() -> None:
    run_command(
        lambda: evaluate_runs(*parse_flags([EvaluationConfig], sys.argv[1:], command="evaluate.py"))
    )
