"""Strict configuration: frozen dataclasses to JSON and back, where an unknown key is an error."""

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path


def config_to_json(config) -> str:
    """Return a dataclass, nested ones included, as indented JSON; tuples become lists."""
    return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False) + "\n"


def config_from_json(cls, text: str):
    """Build the dataclass `cls` from JSON text.

    Raises `ValueError` that names the key for an unknown key (with the nearest known one), a missing key without a default, or a value
    of another type than the field's.
    """
    return config_from_dict(cls, json.loads(text))


def config_from_dict(cls, values: dict):
    """Build the dataclass `cls` from plain values as JSON has them; errors as in `config_from_json`."""
    return _build(cls, values, path="")


def save_config(config, path) -> None:
    """Write `config` as JSON to `path`, whole or not at all."""
    write_text_atomically(path, config_to_json(config))


def load_config(cls, path):
    """Read the dataclass `cls` from the JSON file `path`; errors name the file."""
    try:
        return config_from_json(cls, Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def changed_fields(old, new, prefix: str = "") -> dict[str, tuple]:
    """Return {dotted name: (old, new)} of all fields in which two configurations of one class differ."""
    changes = {}
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            changes |= changed_fields(a, b, f"{prefix}{field.name}.")
        elif a != b:
            changes[prefix + field.name] = (a, b)
    return changes


def refuse_other_run(out, config, is_allowed) -> None:
    """Refuse to go on in the folder `out` when its config.json differs from `config` in a field that decides the result.

    is_allowed: (dotted name, old value, new value) -> whether that change may be made in the middle of a run. Raises `ValueError` with
    the changed fields and the way out.
    """
    path = Path(out) / "config.json"
    if not path.exists():
        return
    changes = changed_fields(load_config(type(config), path), config)
    refused = [
        f"{name} was {old!r}, is now {new!r}"
        for name, (old, new) in changes.items()
        if not is_allowed(name, old, new)
    ]
    if refused:
        raise ValueError(
            f"{out} holds a run of another configuration: {'; '.join(refused)}. Choose another folder with --out, remove this one, "
            "or start again with the old values to go on."
        )


def refuse_other_data(out, summary: dict) -> None:
    """Refuse to go on in the folder `out` when its micrographs or their split are no longer those that it began with.

    summary: of the data as loaded now; its fingerprint and split_hash are written to `out`/data.json at the first start and compared at
    every later one. Without this, a file added in between would move micrographs across the split. Raises `ValueError`.
    """
    path = Path(out) / "data.json"
    now = {key: summary[key] for key in ("fingerprint", "split_hash", "num_micrographs")}
    if not path.exists():
        write_text_atomically(path, json.dumps(now, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    if before != now:
        raise ValueError(
            f"the micrographs are not those that the run in {out} began with ({before['num_micrographs']} then, "
            f"{now['num_micrographs']} now, or other pixels): held-out ones may have been trained on. "
            "Bring the old ones back, or choose another folder with --out."
        )


def write_text_atomically(path, text: str) -> None:
    """Write `text` beside `path` and rename it there, so that a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _build(cls, values, path: str):
    if not isinstance(values, dict):
        raise ValueError(
            f"'{path or cls.__name__}' must be an object of {cls.__name__}, not {values!r}"
        )
    types_by_name = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1)
            hint = (
                f"; did you mean '{nearest[0]}'?" if nearest else f"; known are {', '.join(fields)}"
            )
            raise ValueError(f"unknown key '{path}{name}'{hint}")
    arguments = {
        name: _convert(types_by_name[name], value, path + name) for name, value in values.items()
    }
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{path or cls.__name__}: {error}") from error


def _convert(kind, value, path: str):
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        for choice in typing.get_args(kind):
            try:
                return _convert(choice, value, path)
            except ValueError:
                continue
        raise ValueError(f"'{path}' must be {kind}, not {value!r}")
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path + ".")
    if origin is typing.Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"'{path}' must be one of {typing.get_args(kind)}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"'{path}' must be a list, not {value!r}")
        inner = typing.get_args(kind)
        if len(inner) == 2 and inner[1] is Ellipsis:
            inner = (inner[0],) * len(value)
        if len(inner) != len(value):
            raise ValueError(f"'{path}' must hold {len(inner)} values, not {len(value)}")
        return tuple(_convert(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(inner, value)))
    if kind is type(None):
        if value is not None:
            raise ValueError(f"'{path}' must be null, not {value!r}")
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, str, bool) and type(value) is not kind:
        raise ValueError(f"'{path}' must be {kind.__name__}, not {value!r}")
    return value
