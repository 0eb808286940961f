"""What the training commands share: flags, then the training, then what to do next."""

import argparse
import contextlib
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from em_data.files import leave_nothing_if_refused
from em_training.config import (
    PRESET_FILE,
    TEST_NOTE,
    OtherRunError,
    is_complete,
    read_preset,
    save_preset,
)
from em_training.family import Family
from em_training.flags import parse_preset

# what a run's folder holds before its first result
START_FILES = (PRESET_FILE, "config.json", "data.json", "started_from.json")
EPILOG = "--push-to-hub REPO publishes the finished run (--private: for you alone)."
DESCRIPTION = f"""Train a {{noun}} on electron micrographs.

  python {{script}} demo
      the embedded synthetic micrographs, minutes on 2 CPU cores
  python {{script}} small --data FOLDER --out runs/mine
      your own micrographs (TIFF, PNG, JPEG, BMP; 8 or 16 bits)
  accelerate launch {{script}} paper --data FOLDER
      all GPUs of the machine

The same command resumes a run that was stopped or killed.
{EPILOG}
`python {{script}} PRESET --help` shows the main flags of a preset."""
# of any family; a preset's help shows those that it has
MAIN_FLAGS = (
    "base",
    "source",
    "data",
    "out",
    "init_from",
    "prompt",
    "tiles.resolution",
    "tiles.downsample",
    "tiles.pixel_size_nm",
    "tiles.split",
    "tiles.label_bar",
    "autoencoder.num_images",
    "autoencoder.batch_size",
    "denoiser.num_images",
    "denoiser.batch_size",
    "last_stage",
    "source_tiles.downsample",
    "generator.architecture",
    "lora.rank",
    "training.method",
    "training.num_images",
    "training.batch_size",
    "training.r1_gamma",
    "training.augmentation.mode",
    "precision",
    "seed",
)


def run_training(
    family: Family, argv: Sequence[str] | None = None, description: str | None = None
) -> None:
    """Train a model of a family as the command line asks, and say where the result is.

    Args:
        argv: The words of the command line. Default: those of this process.
        description: Text of `--help`. Default: that of the other families.

    torch is imported only after the flags were read.
    """
    presets = family.import_presets()
    push, argv = read_push_flags(sys.argv[1:] if argv is None else argv)
    config, preset = parse_preset(
        presets,
        argv,
        command=family.script,
        default="demo",
        description=description or DESCRIPTION.format(noun=family.card.noun, script=family.script),
        main_flags=MAIN_FLAGS,
        epilog=EPILOG,
    )

    def train() -> None:
        say_what_is_used(
            config,
            preset,
            presets,
            is_named=preset in argv[:1],
            has_data=any(w.split("=")[0] == "--data" for w in argv),
        )
        from em_training.nodes import ask_main_process
        from em_training.precision import create_process_state

        state = create_process_state()
        if ask_main_process(state, lambda: is_complete(config.out, config)):
            say(f"The run in {config.out} is already complete.")
        else:
            start_or_resume(family, config, preset)
        if (read_preset(config.out) or preset) == "test":
            say(TEST_NOTE)
        if getattr(config, "makes_pipeline", True):
            out = Path(config.out)
            run, images = (shlex.quote(str(path)) for path in (out, f"{out}-images"))
            say(
                f"The trained model is in {out / 'pipeline'}. Next: python generate.py "
                f"--model {run} --out {images} --num-images 1000"
            )

    train_and_publish(push, config, train)


def start_or_resume(family: Family, config: Any, preset: str) -> None:
    """Train a model in the run's folder; a training that is refused leaves nothing there."""
    with contextlib.ExitStack() as stack:
        if is_main_process():
            stack.enter_context(leave_nothing_if_refused(config.out, START_FILES))
            save_preset(config.out, preset)
        try:
            family.import_train()(config)
        except OtherRunError as error:
            before = read_preset(config.out)
            if before in (None, preset):
                raise
            raise OtherRunError(
                f"The run was made with preset {before}, this is {preset}. {error}"
            ) from error


def is_main_process() -> bool:
    """Say whether this is the first of the processes that torchrun or accelerate started."""
    return not int(os.environ.get("RANK", "0"))


def read_push_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the values of --push-to-hub and --private, and the other words."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--push-to-hub")
    flags.add_argument("--private", action="store_true")
    return flags.parse_known_args(argv)


def train_and_publish(push: argparse.Namespace, config: Any, train: Callable[[], object]) -> None:
    """Train and, with --push-to-hub REPO, publish the finished run.

    The token is tried before the training begins.
    """
    if push.push_to_hub is None:
        if push.private:
            raise ValueError("--private needs --push-to-hub REPO.")
        train()
        return
    if not getattr(config, "makes_pipeline", True):
        raise ValueError(
            "--push-to-hub publishes a finished run, but --last-stage leaves this one unfinished. "
            "Use only one of them."
        )
    from em_hub.publish import PublishConfig, publish_run
    from em_hub.transport import find_account

    repo = find_account(push.push_to_hub)
    train()
    if not is_main_process():
        return
    try:
        publish_run(PublishConfig(run=config.out, repo=repo, private=push.private))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error} The training is finished and saved. Publish it later with "
            f"`python publish.py {config.out} {repo}`."
        ) from error


def say_what_is_used(
    config: Any, preset: str, presets: Mapping, *, is_named: bool, has_data: bool = True
) -> None:
    """Say which preset, data and device a new run uses, and whether the device suits it."""
    is_new = not (Path(config.out) / "config.json").exists()
    if is_new and config.data.startswith("synthetic") and not has_data:
        say(f"No --data given: training on the embedded micrographs ({config.data}).")
    if not is_named and is_new:
        say(f"No preset was named: preset {preset}. Presets: {', '.join(presets)}.")
    from em_training.precision import describe_device, use_cpu

    say(f"Device: {describe_device()}.")
    hardware = find_hardware(presets[preset])
    if "GPU" in hardware and use_cpu():
        hint = " `demo` is made for CPUs." if "CPU" in find_hardware(presets["demo"]) else ""
        say(
            f"Preset {preset} is made for {hardware}, but there is no GPU: expect a very long "
            f"training.{hint}"
        )


def find_hardware(preset: Callable) -> str:
    """Return what a preset's docstring says of the hardware; "" if nothing."""
    found = re.search(r"Hardware: ([^.]+)", inspect.getdoc(preset) or "")
    return found[1] if found else ""


def say(text: str) -> None:
    """Print a line from the main process to stderr."""
    if is_main_process():
        print(text, file=sys.stderr)
