"""Publish a trained model on the Hub."""

import sys

from em_hub.publish import PublishConfig, publish_run
from em_training.cli import run_command
from em_training.flags import parse_flags


def run() -> None:
    (config,) = parse_flags(
        [PublishConfig], sys.argv[1:], command="publish.py", positional=("run", "repo")
    )
    publish_run(config)


def main() -> None:
    run_command(run)
