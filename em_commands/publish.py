"""Publish a trained model on the Hub."""

import sys

from em_hub.publish import PublishConfig, publish_run
from em_training.cli import run_command
from em_training.flags import parse_flags


def run() -> None:
    publish_run(
        *parse_flags(
            [PublishConfig], sys.argv[1:], command="publish.py", positional=("run", "repo")
        )
    )


def main() -> None:
    run_command(run)
