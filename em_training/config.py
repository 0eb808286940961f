"""Configurations: frozen pydantic dataclasses, checked strictly, to JSON and back.

A configuration class is a `pydantic.dataclasses.dataclass(frozen=True, config=strict("section"))`.
Choices are `Literal`s, bounds are `annotated_types` such as `Annotated[int, Gt(0)]`, and a field
that may change in the middle of a run has the word `MAY_CHANGE` in its `Annotated`. A field with
the word `MEASURED` may be None: the run measures its value on the data and saves that.
"""

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from em_data.files import write_atomically

MAY_CHANGE = "may change"
MEASURED = "measured"
MOST_IMAGES = 10**11  # names of checkpoints hold 12 digits
# whole numbers of configurations: of images, of sizes (channels, batches, steps), of layers
Positive = Annotated[int, Gt(0), Le(MOST_IMAGES)]
NotNegative = Annotated[int, Ge(0), Le(MOST_IMAGES)]
Size = Annotated[int, Gt(0), Le(65_536)]
Depth = Annotated[int, Gt(0), Le(32)]
PositiveFloat = Annotated[float, Gt(0), Le(1e30)]  # float32 ends at 3e38
NotNegativeFloat = Annotated[float, Ge(0), Le(1e30)]
MAX_JSON_BYTES = 2**26  # of a file of others
MOST_CHANGES = 3  # named in one message
PRESET_FILE = "preset.txt"
TEST_NOTE = "A run of preset test checks that the software works. Its images mean nothing."
Config = TypeVar("Config")


class OtherRunError(ValueError):
    """The folder holds a run with another configuration."""


def strict(section: str | None = None) -> ConfigDict:
    """Return the rules of a configuration class: no conversion, no unknown key, no nan or inf.

    section: the lower-case name under which the class is a field of the whole configuration, for
    error messages; None for the whole configuration.
    """
    return ConfigDict(title=section, extra="forbid", strict=True, allow_inf_nan=False)


def config_to_json(config: Any) -> str:
    """Return a configuration as indented JSON; tuples become lists."""
    return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False) + "\n"


def config_from_json(cls: type[Config], text: str) -> Config:
    """Build the configuration class `cls` from JSON text.

    Raises:
        ValueError: One sentence a mistake, with the key, its value and what it must be.
    """
    try:
        return TypeAdapter(cls).validate_json(text)
    except ValidationError as error:
        raise ValueError(describe_error(error, cls)) from error


def config_from_dict(cls: type[Config], values: dict) -> Config:
    """Build `cls` from plain values as JSON has them; errors as in `config_from_json`."""
    return config_from_json(cls, json.dumps(values))


def parse_pairs(pairs: Sequence[str], flag: str, example: str) -> dict[str, Any]:
    """Return {key: value} of the KEY=VALUE texts of a flag; a value is read as JSON if it is JSON.

    flag, example: What the error names, such as "--tiles" and "resolution=64".
    """
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"{flag} takes KEY=VALUE, such as {example}, not {pair!r}.")
        try:
            values[key.replace("-", "_")] = json.loads(text)
        except json.JSONDecodeError:
            values[key.replace("-", "_")] = text
    return values


def save_config(config: Any, path: str | Path) -> None:
    """Write `config` as JSON to `path`, atomically."""
    write_atomically(path, config_to_json(config))


def load_config(cls: type[Config], path: str | Path) -> Config:
    """Read the configuration class `cls` from the JSON file `path`; errors name the file."""
    text = read_json_text(path, "if the command has the configuration that the run began with")
    try:
        return config_from_json(cls, text)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error} If another version wrote this file, correct it there, "
            "or start a new run in another folder."
        ) from error


def read_json_text(path: str | Path, condition: str) -> str:
    """Return the text of a JSON file of a run.

    Raises:
        ValueError: It is no JSON object. It can be removed under a condition, such as "if ...".
    """
    try:
        text = Path(path).read_text()
        if not isinstance(json.loads(text), dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove it to go on with the run, {condition}, or train "
            "in another folder with --out."
        ) from error
    return text


def describe_error(error: ValidationError, cls: type | None = None) -> str:
    """Return pydantic's error as plain sentences: name, value, requirement and flag.

    cls: the configuration class that was being read, for the nearest key to an unknown one.
    """
    prefix = error.title + "." if error.title.islower() else ""
    problems = error.errors(include_url=False)
    return " ".join(_describe_problem(problem, prefix, cls) for problem in problems)


def changed_fields(old: Any, new: Any, prefix: str = "") -> dict[str, tuple]:
    """Return {dotted name: (old, new)} of the fields in which two configurations differ."""
    changes = {}
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            changes |= changed_fields(a, b, f"{prefix}{field.name}.")
        elif a != b:
            changes[prefix + field.name] = (a, b)
    return changes


def flatten(values: dict, prefix: str = "") -> dict:
    """Return nested values as {"section.name": value}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def find_marked(cls: type, marker: str, prefix: str = "") -> set[str]:
    """Return the dotted names of the fields of `cls` whose `Annotated` holds `marker`."""
    found = set()
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= find_marked(hint, marker, f"{prefix}{name}.")
        elif marker in getattr(hint, "__metadata__", ()):
            found.add(prefix + name)
    return found


def find_to_measure(config: Any) -> set[str]:
    """Return the dotted names of the fields whose values the run measures: `MEASURED` and None."""
    return {
        name
        for name in find_marked(type(config), MEASURED)
        if functools.reduce(getattr, name.split("."), config) is None
    }


def refuse_other_run(
    out: str | Path,
    config: Any,
    is_allowed: Callable[[str, Any, Any], bool] = lambda *change: False,
) -> None:
    """Refuse to resume the run in `out` with a configuration that would change its result.

    Fields marked `MAY_CHANGE` may differ from those in `out`/config.json. Fields marked `MEASURED`
    may be None where it holds what the run measured.

    Args:
        is_allowed: (dotted name, old value, new value) -> whether this change is allowed, too.

    Raises:
        ValueError: With the changed fields and what to do.
    """
    path = Path(out) / "config.json"
    if not path.exists():
        return
    refuse_other_kind(out, path, config)
    before = load_config(type(config), path)
    may_change = find_to_measure(config) | find_marked(type(config), MAY_CHANGE)
    refused = [
        f"{name} was {old!r}, is now {new!r}"
        for name, (old, new) in changed_fields(before, config).items()
        if name not in may_change and not is_allowed(name, old, new)
    ]
    if refused:
        rest = len(refused) - MOST_CHANGES
        listed = "; ".join(refused[:MOST_CHANGES]) + (f"; and {rest} more" if rest > 0 else "")
        raise OtherRunError(
            f"{out} holds a run with another configuration: {listed}. Train in "
            "another folder with --out, remove this one, or resume with the old values."
        )


def refuse_other_kind(out: str | Path, path: Path, config: Any) -> None:
    """Refuse a run of another kind of model, whose sections would look like unknown keys."""
    try:
        stored = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):  # damaged, as `load_config` tells
        return
    fields = [field.name for field in dataclasses.fields(config)]
    sections = {name for name in fields if dataclasses.is_dataclass(getattr(config, name))}
    strange = {key for key, value in stored.items() if isinstance(value, dict)} - set(fields)
    if strange and sections - stored.keys():
        raise OtherRunError(
            f"{out} holds a run of another kind of model; choose another folder with --out."
        )


def save_preset(out: str | Path, preset: str) -> None:
    """Write the name of a new run's preset into its folder; a run that began keeps its own."""
    if not (Path(out) / "config.json").exists():
        write_atomically(Path(out) / PRESET_FILE, preset + "\n")


def read_preset(out: str | Path) -> str | None:
    """Return the name of the preset that a run began with; None if it is unknown."""
    path = Path(out) / PRESET_FILE
    return path.read_text().strip() if path.is_file() else None


def describe_preset(out: str | Path) -> dict[str, str | None]:
    """Return what run.json says about the preset: its name and, for `test`, a warning."""
    preset = read_preset(out)
    return {"preset": preset} | ({"note": TEST_NOTE} if preset == "test" else {})


def is_complete(out: str | Path, config: Any) -> bool:
    """Say whether `out` holds the finished run of `config`, with its pipeline.

    The run's own folder and cache may have moved. "auto" precision was resolved and values were
    measured.
    """
    out = Path(out)
    try:
        record = json.loads((out / "run.json").read_text())["config"]
        before = config_from_dict(type(config), record)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    changes = changed_fields(before, config)
    free = {"out", "tiles.cache_dir"} | find_to_measure(config)
    free |= {"precision"} if config.precision == "auto" else set()
    return changes.keys() <= free and (out / "pipeline" / "model_index.json").exists()


def refuse_other_data(out: str | Path, identity: dict) -> None:
    """Refuse to resume the run in `out` with other data than it began with.

    Args:
        identity: What must stay the same, such as the data's fingerprint and their split. The
            first call writes it to `out`/data.json; later calls compare.

    Raises:
        ValueError: With what has changed and what to do.
    """
    path = Path(out) / "data.json"
    if not path.exists():
        write_atomically(path, json.dumps(identity, indent=2) + "\n")
        return
    before = json.loads(read_json_text(path, "if the data are those that the run began with"))
    changes = [
        f"{key} was {before.get(key)}, is now {value}"
        for key, value in identity.items()
        if before.get(key) != value
    ]
    if changes:
        raise ValueError(
            f"The data are not those that the run in {out} began with ({'; '.join(changes)}), so "
            "it may have been trained on what is now held out. Restore the old data, or train in "
            "another folder."
        )


def _describe_problem(problem: ErrorDetails, prefix: str, cls) -> str:
    kind, location = problem["type"], problem["loc"]
    if kind == "value_error":  # from a __post_init__, in its own words
        return str(problem["ctx"]["error"])
    if kind == "json_invalid":
        return f"This is not JSON: {problem['ctx']['error']}."
    name = prefix + ".".join(part for part in location if isinstance(part, str))
    if kind.startswith("unexpected") or kind == "extra_forbidden":
        return f"Unknown key '{name}'.{_suggest_key(cls, location)}"
    if kind.startswith("missing"):
        return f"'{name}' is missing or too short."
    expected = problem["msg"].removeprefix("Input should be ")
    expected = expected.replace("greater than or equal to", "at least")
    expected = expected.replace("less than or equal to", "at most")
    flag = name.replace("_", "-")
    return f"{name} is {problem['input']!r}, but must be {expected}. Use --{flag}."


def _suggest_key(cls, location) -> str:
    *parents, unknown = location
    for parent in parents:
        cls = typing.get_type_hints(cls).get(parent) if cls is not None else None
    if not dataclasses.is_dataclass(cls):
        return ""
    known = [field.name for field in dataclasses.fields(cls)]
    nearest = difflib.get_close_matches(unknown, known, n=1)
    return f" Did you mean '{'.'.join([*parents, *nearest])}'?" if nearest else ""


def read_json_object(path: Path) -> dict:
    """Read a JSON object; raise `ValueError` with the path if it is missing or damaged.

    Pipes and devices, which never end, and huge files are not read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file. Download or save the model again.")
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no {path}. Download or save the model again.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content
