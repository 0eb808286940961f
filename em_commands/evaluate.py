"""Compare trained models with held-out micrographs and with each other."""

import sys

from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_generation.shards.features import FeatureOptions
from em_generation.shards.merge import run_feature_step
from em_training.cli import run_command
from em_training.flags import parse_flags


def run() -> None:
    config, options = parse_flags(
        [EvaluationConfig, FeatureOptions],
        sys.argv[1:],
        command="evaluate.py",
        headings={FeatureOptions: "shards"},
    )
    if options.features_of is not None or options.merge:
        run_feature_step(config, options)
        return
    evaluate_runs(config)


def main() -> None:
    run_command(run)
