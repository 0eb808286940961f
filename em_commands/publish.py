"""Publish a trained model on the Hub: python publish.py RUN REPO."""

import tyro

from em_hub.publish import PublishConfig, publish_run
from em_training.cli import run_command


def run() -> None:
    publish_run(tyro.cli(PublishConfig, config=(tyro.conf.PositionalRequiredArgs,)))


def main() -> None:
    run_command(run)
