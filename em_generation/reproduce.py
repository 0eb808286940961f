"""The commands that make a report again, without private paths."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_generation.candidates import Candidate
from em_generation.loading import Model
from em_training.config import flatten

LOCAL = ("models", "out", "compare", "weights", "cache_dir")  # fields that need care, or none


def list_commands(config, candidates: Sequence[Candidate]) -> list[str]:
    """Return the commands that make a report again: trainings, then the evaluation.

    config: An `EvaluationConfig`. Paths are relative to where the command ran; a path elsewhere
    is replaced by its last part.
    """
    commands = []
    for candidate in candidates:
        if candidate.model is not None:
            commands += list_training(candidate.model)
    words = ["python evaluate.py --models"]
    words += [to_text(f"{each.name}={each.source}") for each in candidates]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in LOCAL and (value != field.default or field.name == "num_images"):
            words.append(to_flag(field.name, value))
    return [*commands, " ".join([*words, to_flag("out", config.out)])]


def list_training(model: Model) -> list[str]:
    """Return the command that trained a model, as far as its run says."""
    family, config = model.family, model.config
    if not config or not family.script:
        return []
    values = flatten(config)
    presets = {
        name: flatten(dataclasses.asdict(make())) for name, make in family.import_presets().items()
    }
    private = ("out", "data", "tiles.cache_dir")

    def changes(preset):
        return {
            key: value
            for key, value in values.items()
            if key not in private and to_text(presets[preset].get(key)) != to_text(value)
        }

    nearest = min(presets, key=lambda preset: len(changes(preset)))
    words = [f"python {family.script} {nearest}"]
    if values.get("data"):
        words.append(to_flag("data", values["data"]))
    words += [to_flag(key, value) for key, value in changes(nearest).items()]
    return [" ".join([*words, to_flag("out", model.source)])]


def to_flag(name: str, value: Any) -> str:
    """Return a field and its value as they stand on a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        section, dot, last = flag.rpartition(".")
        return f"--{section}{dot}{'' if value else 'no-'}{last}"
    return f"--{flag} {to_text(value)}".rstrip()


def to_text(value: Any) -> str:
    """Return a value as it stands on a command line, without private paths."""
    if isinstance(value, list | tuple):
        return " ".join(to_text(each) for each in value)
    return shlex.quote(hide_path(str(value)))


def hide_path(text: str) -> str:
    """Return a path relative to the working folder, or its last part if it lies elsewhere."""
    name, equals, path = text.rpartition("=")
    path = os.path.expanduser(path)
    if not os.path.isabs(path):
        parts = Path(path).parts
        return text if ".." not in parts else name + equals + Path(path).name
    relative = os.path.relpath(path)
    return name + equals + (Path(path).name if relative.startswith("..") else relative)
