"""Generate images from a trained model: a run, a saved pipeline or a Hub repository."""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_generation.families import FAMILIES
from em_generation.generate import GenerationConfig, generate_images, write_preview
from em_generation.loading import Model, read_model
from em_generation.pairs import PairOptions
from em_generation.pairs.preview import write_pairs_preview
from em_generation.shards.check import check_shards, describe_check
from em_generation.shards.plan import SUFFIXES, ShardOptions
from em_generation.shards.work import Written, generate_shard
from em_training.cli import run_command
from em_training.flags import UsageError, parse_flags

HELP = """Generate images from a trained model into a folder.

  python generate.py --model runs/demo/ldm --out images --num-images 5000
  python generate.py --model MODEL --help
      also shows the sampling options of MODEL's family
  python generate.py --model MODEL --out pairs --pairs simulated --labels coco yolo
      writes images with the labels of their defects
  python generate.py --model MODEL --out OUT --num-images 1000000 --format arrow --shard 3/20
      writes one of 20 shards
  python generate.py --check OUT
      says which files of OUT are missing

Beside the folder, OUT-preview.png shows the first images. The same command resumes where it
stopped."""


def parse(argv: Sequence[str]) -> tuple[GenerationConfig, Model]:
    """Read the command line: --model first, then the flags that a model of its family takes."""
    argv = [
        "tiff" if (before, word) == ("--format", "tif") else word
        for before, word in zip(["", *argv], argv, strict=False)
    ]
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model", nargs="?")
    source = finder.parse_known_args(argv)[0].model
    general = [GenerationConfig, PairOptions, ShardOptions]
    settings: dict[str, Any] = {
        "command": "generate.py",
        "description": HELP,
        "headings": {PairOptions: "pairs", ShardOptions: "shards"},
    }
    if source is None:
        if not {"--help", "-h"} & set(argv):
            raise UsageError("Name a model: python generate.py --model MODEL --out FOLDER")
        parse_flags(general, ["--help"], **settings)
    model = read_model(source)
    refuse_options_of_others(argv, model)
    config, pairs, shards, options = parse_flags([*general, model.family.options], argv, **settings)
    if shards.check is not None:
        raise UsageError("--check only takes the name of a folder. Leave the other flags out.")
    if shards.shard is None and config.format == "webdataset":
        raise UsageError("--format webdataset is written by shards. Add --shard 1/1.")
    if shards.shard is not None and config.format not in SUFFIXES:
        raise UsageError(
            f"--format is {config.format}, but shards are arrow or webdataset. Add --format arrow."
        )
    pairs = None if pairs.pairs is None else pairs
    shards = None if shards.shard is None else shards
    return dataclasses.replace(config, pairs=pairs, shards=shards, options=options), model


def refuse_options_of_others(argv: Sequence[str], model: Model) -> None:
    """Refuse a flag that only models of another family have, with a sentence that says so."""
    own = {field.name for field in dataclasses.fields(model.family.options)}
    words = [word.partition("=")[0].removeprefix("--") for word in argv if word[:2] == "--"]
    given = {word.replace("-", "_") for word in words}
    for family in FAMILIES:
        names = {field.name for field in dataclasses.fields(family.options)} - own
        wrong = [name for name in given if name in names or name.removeprefix("no_") in names]
        if wrong:
            flags = ", ".join("--" + name.replace("_", "-") for name in sorted(wrong))
            raise UsageError(
                f"{flags}: only models of the family {family.title} have this option, and "
                f"{model.source} is a {model.title}. Leave it out."
            )


def run() -> None:
    argv = sys.argv[1:]
    if len(argv) == 2 and argv[0] == "--check":
        check_folder(argv[1])
        return
    config, model = parse(argv)
    if config.shards is not None:
        command = shlex.join(["python", "generate.py", *drop_shard(argv)])
        say_shard(config.shards.shard, generate_shard(config, model, command))
        return
    record = generate_images(config, model)
    if config.pairs is not None:
        say_pairs(config, record)
        return
    preview = write_preview(config.out)
    print(f"{record['num_images']:,} images in {config.out}, the first ones in {preview}")
    if record["num_images"] > config.num_images:
        print(
            f"{config.out} held more images than --num-images {config.num_images} asks for; all "
            "of them are kept."
        )
    if model.config and model.config.get("data"):  # else evaluate.py asks for real images
        print(f"Next: judge the model by such images: {say_evaluation(config)}")


def check_folder(out: str) -> None:
    """Say what is missing in a folder of shards; end with code 1 if it is not whole."""
    check = check_shards(out)
    print(describe_check(check))
    if not check.is_whole:
        raise SystemExit(1)


def drop_shard(argv: Sequence[str]) -> list[str]:
    """Return a command line without --shard and its value."""
    words = zip(["", *argv], argv, strict=False)
    return [
        word for before, word in words if before != "--shard" and not word.startswith("--shard")
    ]


def say_shard(shard: str, written: Written) -> None:
    """Say what a worker wrote, and what to do next."""
    plan = written.plan
    print(
        f"shard {shard}: {len(written.files):,} files written, {written.num_done_before:,} were "
        "done before"
    )
    missing = plan.num_files - len(plan.list_marked())
    if missing > 0:
        print(f"{missing:,} of {plan.num_files:,} files in {plan.out} are missing: other shards")
    else:
        print(f"{plan.num_images:,} images in {plan.out}")
        print(f"Next: check them: python generate.py --check {shlex.quote(str(plan.out))}")


def say_pairs(config: GenerationConfig, record: dict) -> None:
    """Say where pairs are, and what to do with them."""
    out = Path(config.out)
    preview = write_pairs_preview(out)
    files = {"coco": "labels/coco.json", "yolo": "data.yaml", "masks": "masks/"}
    if config.format == "arrow":
        files = {"coco": "column objects", "masks": "columns mask and semantic"}
    labels = ", ".join(files[name] for name in files if name in config.pairs.labels)
    print(
        f"{record['num_images']:,} images with labels in {out} ({labels}), the first ones in "
        f"{preview}"
    )
    print(f"Next: look at them: {shlex.join(['python', '-m', 'em_data.look', str(out)])}")


def say_evaluation(config: GenerationConfig) -> str:
    """Return the command that evaluates a model with the same sampling options.

    Larger images than tiles are evaluated as a folder, which is cut into tiles.
    """
    words = ["python", "evaluate.py", "--models", config.model]
    changed = {
        field.name: getattr(config.options, field.name)
        for field in dataclasses.fields(config.options)
        if getattr(config.options, field.name) != field.default
    }
    if changed.pop("size", None) is not None:
        words.append(config.out)
    if changed:
        words += ["--sampling", *(f"{key}={to_json(value)}" for key, value in changed.items())]
    return shlex.join(words)


def to_json(value: object) -> str:
    """Return a value as `KEY=VALUE` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def main() -> None:
    run_command(run)
