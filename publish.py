"""Publish a trained model on the Hub: python publish.py RUN REPO."""

import tyro

from em_hub.publish import PublishConfig, publish_run
from em_training.cli import run_command


def main():
    publish_run(tyro.cli(PublishConfig, config=(tyro.conf.PositionalRequiredArgs,)))


if __name__ == "__main__":
    run_command(main)
