"""What the two training commands share: flags, then the training, then what to do next."""

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from em_training.config import is_complete
from em_training.flags import parse_preset

EPILOG = "--push-to-hub REPO publishes the finished run (--private: for you alone)."


def run_training(
    presets: Mapping[str, Callable[[], Any]],
    find_train: Callable[[], Callable[[Any], object]],
    *,
    command: str,
    description: str,
    main_flags: tuple[str, ...],
) -> None:
    """Train as the command line asks, and say where the result is.

    find_train: imports the training function, and torch, only after the flags were read.
    """
    chosen = {}

    def parse(argv: list[str]) -> Any:
        config, chosen["preset"] = parse_preset(
            presets,
            argv,
            command=command,
            default="demo",
            description=description,
            main_flags=main_flags,
            epilog=EPILOG,
        )
        return config

    def train(config: Any) -> None:
        preset = chosen["preset"]
        say_what_is_used(config, preset, presets, is_named=preset in sys.argv[1:2])
        if is_complete(config.out, config):
            say(f"The run in {config.out} is already complete.")
        else:
            find_train()(config)
        if getattr(config, "makes_pipeline", True):
            say(
                f"The trained model is in {Path(config.out) / 'pipeline'}. Next: python generate.py "
                f"--model {config.out} --num-images 1000"
            )

    train_and_publish(parse, train, sys.argv[1:])


def train_and_publish(parse: Callable, train: Callable, argv: list[str]) -> None:
    """Train as the command line asks and, with --push-to-hub REPO, publish the finished run.

    The token is tried before the training begins.

    Args:
        parse: The other words of the command line -> configuration with a field `out`.
        train: Configuration -> run.
    """
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--push-to-hub")
    flags.add_argument("--private", action="store_true")
    push, argv = flags.parse_known_args(argv)
    config = parse(argv)
    if push.push_to_hub is None:
        if push.private:
            raise ValueError("--private needs --push-to-hub REPO.")
        train(config)
        return
    if not getattr(config, "makes_pipeline", True):
        raise ValueError(
            "--push-to-hub publishes a finished run, but --last-stage leaves this one unfinished. "
            "Use only one of them."
        )
    from em_hub.publish import PublishConfig, publish_run
    from em_hub.transport import find_account

    repo = find_account(push.push_to_hub)
    train(config)
    if int(os.environ.get("RANK", "0")):
        return  # of several processes, the first publishes
    try:
        publish_run(PublishConfig(run=config.out, repo=repo, private=push.private))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error} The training is finished and saved. Publish it later with "
            f"`python publish.py {config.out} {repo}`."
        ) from error


def say_what_is_used(config: Any, preset: str, presets: Mapping, *, is_named: bool) -> None:
    """Say which preset, data and device a new run uses, and whether the device suits it."""
    if not is_named and not (Path(config.out) / "config.json").exists():
        data = "the embedded synthetic data" if config.data == "synthetic" else config.data
        say(
            f"No preset was named: preset {preset} on {data}. Give --data FOLDER for your own "
            f"micrographs. Presets: {', '.join(presets)}."
        )
    from em_training.precision import describe_device, use_cpu

    say(f"Device: {describe_device()}.")
    hardware = re.search(r"Hardware: ([^.]+)", inspect.getdoc(presets[preset]) or "")
    if hardware and "GPU" in hardware[1] and use_cpu():
        say(
            f"Preset {preset} is made for {hardware[1]}, but there is no GPU: expect days to "
            "months. `demo` is made for CPUs."
        )


def say(text: str) -> None:
    """Print a line from the main process to stderr."""
    if not int(os.environ.get("RANK", "0")):
        print(text, file=sys.stderr)
