"""Find and read the yaml beside a checkpoint of taming-transformers or latent-diffusion."""

import math
import re
from pathlib import Path

import yaml


def find_config(checkpoint) -> Path:
    """Return the yaml of a checkpoint, from where the original trainings and downloads put it."""
    checkpoint = Path(checkpoint)
    folder, configs = checkpoint.parent, checkpoint.parent.parent / "configs"
    candidates = [
        checkpoint.with_suffix(".yaml"),
        checkpoint.with_suffix(".yml"),
        folder / "config.yaml",
        folder / "model.yaml",
        configs / "model.yaml",
        *sorted(configs.glob("*-project.yaml"))[-1:],
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(
        f"{checkpoint} needs the yaml that describes its model: there is no {candidates[0].name}, "
        "config.yaml or model.yaml beside it; put it there, or name it with --config."
    )


def read_config(path) -> dict:
    """Return the section `model` of a yaml, with `target`, `params` and resolved references."""
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"it is not a yaml that can be read safely: {' '.join(str(error).split())}"
        ) from error
    model = contents.get("model", contents) if isinstance(contents, dict) else None
    if not isinstance(model, dict) or "params" not in model or "target" not in model:
        raise ValueError("it describes no model: expected `model` with `target` and `params`")
    return _resolve(model, contents)


def _resolve(value, root):
    """Replace OmegaConf's references to numbers elsewhere in the file, `${a.b}`."""
    if isinstance(value, dict):
        return {key: _resolve(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, root) for item in value]
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if reference is None:
        return value
    for key in reference[1].split("."):
        if not isinstance(root, dict) or key not in root:
            raise ValueError(f"{value} refers to nothing in it")
        root = root[key]
    if isinstance(root, str | dict | list):
        raise ValueError(f"{value} refers to no number")
    return root


def class_name(section) -> str:
    """Return the last part of a section's `target`."""
    target = section.get("target") if isinstance(section, dict) else None
    if not isinstance(target, str):
        raise ValueError("a model in it has no `target`")
    return target.rpartition(".")[2]


# Values under a key, of the type that they must have; `ValueError` with the key otherwise.


def section(values, key) -> dict:
    value = values.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{key} is missing")
    return value


def number(values, key, default) -> float:
    """Return a positive number; yaml reads 1e-4 as text."""
    value = values.get(key, default)
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result) or result <= 0:
        raise ValueError(f"{key} is {value!r}; expected a positive number")
    return result


def count(values, key, largest=2**20) -> int:
    """Return a positive whole number."""
    value = values.get(key)
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{key} is {value!r}; expected a whole number from 1 to {largest}")
    return value


def optional_count(values, key) -> int | None:
    """Return a positive whole number, or None if it is absent or the originals' -1."""
    return None if values.get(key) in (None, -1) else count(values, key)


def counts(values, key, default=None) -> tuple[int, ...]:
    """Return positive whole numbers; only resolutions with attention may be an empty list."""
    items = values.get(key, default)
    if items is None:
        raise ValueError(f"{key} is missing")
    is_list = isinstance(items, list | tuple) and len(items) <= 16
    if not is_list or not (items or key.startswith("att")):
        raise ValueError(f"{key} is {items!r}; expected a list of positive whole numbers")
    return tuple(count({key: item}, key) for item in items)


def flag(values, key, default) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; expected true or false")
    return value
