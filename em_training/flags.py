"""Presets and flags of a command, with short help and the nearest flag to a wrong one.

Imports neither torch nor our other modules, so that a typo is told at once.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import ValidationError

# how other programs call what we call otherwise
ALIASES = {
    "tiles.size": "tiles.resolution",
    "image-size": "tiles.resolution",
    "lr": "learning-rate",
    "output": "out",
    "data-dir": "data",
    "mixed-precision": "precision",
    "epochs": "num-images",
}


T = TypeVar("T")


class UsageError(ValueError):
    """A mistake on the command line, in plain sentences."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a configuration: dotted name with hyphens, value in the preset, help text."""

    name: str
    value: Any
    help: str


def parse_preset(
    presets: Mapping[str, Callable[[], Any]],
    argv: Sequence[str],
    *,
    command: str,
    default: str,
    description: str,
    main_flags: Sequence[str],
    epilog: str = "",
) -> tuple[Any, str]:
    """Return (configuration, name of the preset) of the command line `PRESET --flags`.

    `--help` prints the description or, after a preset, its main flags; `--help-all` all flags.

    Args:
        presets: Name -> function that returns a frozen dataclass, with a docstring as help text.
        command: The command's name in messages, such as "train_ldm.py".
        default: Preset to use when the first word is a flag.
        main_flags: Dotted names of the flags that people set first.
        epilog: Last line of a preset's help.

    Raises:
        UsageError: For unknown presets, unknown flags and impossible values.
    """
    name, argv = _choose_preset(presets, list(argv), command, default)
    if name is None:
        print(_describe_presets(presets, description))
        raise SystemExit(0)
    if argv and not argv[0].startswith("-"):
        raise UsageError(f"{argv[0]!r} is no flag; did you mean --data {argv[0]}?")
    config = presets[name]()
    prog = f"{command} {name}"
    if "--help" in argv or "-h" in argv:
        print(_describe_main_flags(config, presets[name], prog, main_flags))
        print(epilog)
        raise SystemExit(0)
    if "--help-all" in argv:
        argv = ["--help"]
    advice = f"`python {prog} --help` lists the main flags, --help-all all of them."
    _refuse_unknown(list(list_flags(config)), argv, advice)
    with _plain_errors(prog):
        return tyro.cli(type(config), default=config, args=argv, prog=prog), name


def parse_flags(
    classes: Sequence[type],
    argv: Sequence[str],
    *,
    command: str,
    description: str = "",
    positional: Sequence[str] = (),
    headings: Mapping[type, str] | None = None,
) -> list[Any]:
    """Return an object of each dataclass that the flags of a command without presets ask for.

    Fields of the type `Any` are no flags and keep their defaults.

    Args:
        classes: Their fields together are the flags.
        command: The command's name in messages, such as "generate.py".
        description: Text of `--help`. Default: the docstring of the first class.
        positional: Fields that are words without a flag.
        headings: Classes whose flags have a heading of their own in `--help`, and the heading.

    Raises:
        UsageError: For unknown flags and impossible values.
    """
    headings = headings or {}
    fields, flags, shown = [], [], []
    for cls in classes:
        own = list(_list_fields(cls, positional))
        fields += own
        flags += [Flag(name.replace("_", "-"), field.default, text) for name, _, field, text in own]
        plain = [(name, hint, field) for name, hint, field, _ in own]
        if cls in headings:
            group: Any = dataclasses.make_dataclass(cls.__name__, plain, frozen=True, kw_only=True)
            group.__doc__ = inspect.cleandoc(cls.__doc__ or "")
            hint: Any = Annotated[group, tyro.conf.OmitArgPrefixes]
            plain = [(headings[cls], hint, dataclasses.field(default_factory=group))]
        shown += plain
    _refuse_unknown(flags, argv, f"`python {command} --help` lists all flags.")
    _refuse_missing([each[:3] for each in fields], argv, positional, command)
    shape = dataclasses.make_dataclass("Flags", shown, frozen=True, kw_only=True)
    description = description or inspect.cleandoc(classes[0].__doc__ or "")
    with _plain_errors(command, positional):
        values = tyro.cli(shape, args=list(argv), prog=command, description=description)
    return [
        cls(
            **{
                f.name: getattr(found, f.name)
                for f in dataclasses.fields(cls)
                if hasattr(found, f.name)
            }
        )
        for cls in classes
        for found in [getattr(values, headings[cls]) if cls in headings else values]
    ]


def _list_fields(cls: type, positional: Sequence[str]) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield (name, annotation for tyro, field, help text) of each flag of a class."""
    hints, texts = typing.get_type_hints(cls, include_extras=True), _read_help_texts(cls)
    for field in dataclasses.fields(cls):
        if hints[field.name] is Any:
            continue
        text = " ".join(texts.get(field.name, "").split())
        metavar = _name_value(hints[field.name])
        about = [tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=_show_default)]
        if field.name in positional:
            metavar = field.name.upper()
            about = [tyro.conf.arg(help=text, metavar=metavar), tyro.conf.Positional]
        hint: Any = Annotated[hints[field.name], *about]
        default = dataclasses.field(default=field.default, default_factory=field.default_factory)
        yield field.name, hint, default, text


def _name_value(hint: Any) -> str | None:
    """Return how help names a value that may be missing, without None; None for other values."""
    kinds = [each for each in typing.get_args(hint) if each is not type(None)]
    if type(None) not in typing.get_args(hint) or len(kinds) != 1:
        return None
    if typing.get_origin(kinds[0]) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(kinds[0]))) + "}"
    return getattr(kinds[0], "__name__", "value").upper()


def _show_default(value: str) -> str:
    """Return how help shows a default; nothing for one that is no value, which the text tells."""
    return "" if value in ("None", "") else f"(default: {value})"


def parse_config(cls: type[T], module: str, description: str) -> T:
    """Return the configuration that the command line of `python -m MODULE` asks for.

    Raises:
        UsageError: For unknown flags and impossible values.
    """
    with _plain_errors(f"-m {module}"):
        return tyro.cli(cls, prog=f"python -m {module}", description=description)


def list_flags(config: Any, prefix: str = "") -> Iterator[Flag]:
    """Yield the flags of a configuration, nested ones included."""
    helps = _read_help_texts(type(config))
    for field in dataclasses.fields(config):
        name, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from list_flags(value, name + ".")
        else:
            yield Flag(name, value, helps.get(field.name, ""))


def find_nearest_flags(word: str, flags: Sequence[Flag], count: int = 2) -> list[Flag]:
    """Return the flags whose names are most like `word`, nearest first."""
    by_name = {flag.name: flag for flag in flags}
    names = {name: name for name in by_name}
    for alias, name in ALIASES.items():
        for found in by_name:
            if found == name or found.split(".")[-1] == name:
                names.setdefault(alias, found)
                names.setdefault(found.removesuffix(name) + alias, found)

    def likeness(name: str) -> float:
        last = difflib.SequenceMatcher(None, word.split(".")[-1], name.split(".")[-1]).ratio()
        return max(difflib.SequenceMatcher(None, word, name).ratio(), 0.95 * last)

    ranked = sorted(names, key=likeness, reverse=True)
    least = max(0.6, likeness(ranked[0]) - 0.1)
    best = [names[name] for name in ranked if likeness(name) >= least]
    return [by_name[name] for name in list(dict.fromkeys(best))[:count]]


def _choose_preset(presets, argv, command, default) -> tuple[str | None, list[str]]:
    if argv and argv[0] in presets:
        return argv[0], argv[1:]
    if argv and argv[0] in ("-h", "--help"):
        return None, argv
    names = ", ".join(presets)
    for word in argv:
        if word.split("=")[0] == "--preset":
            raise UsageError(
                f"--preset is not a flag: the preset is the first word, as in `python {command} "
                f"{default} --out FOLDER`. Presets: {names}."
            )
    if argv and not argv[0].startswith("-"):
        nearest = difflib.get_close_matches(argv[0], presets, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(f"There is no preset {argv[0]!r}.{hint} Presets: {names}.")
    return default, argv


def _refuse_unknown(flags: Sequence[Flag], argv: Sequence[str], advice: str) -> None:
    known = {flag.name for flag in flags} | {"help"}
    for flag in flags:
        if isinstance(flag.value, bool):
            *section, last = flag.name.split(".")
            known.add(".".join([*section, f"no-{last}"]))
    for word in argv:
        name = word[2:].split("=")[0].replace("_", "-")
        if not word.startswith("--") or name in known:
            continue
        nearest = find_nearest_flags(name, flags)
        hint = "".join(
            "\n" + _wrap_row(f"--{flag.name} {_format(flag.value)}", _first_sentence(flag.help), 36)
            for flag in nearest
        )
        raise UsageError(
            f"There is no flag --{name}.{' Did you mean:' + hint if hint else ''}\n{advice}"
        )


def _refuse_missing(fields, argv: Sequence[str], positional: Sequence[str], command: str) -> None:
    """Refuse a command line without a flag that has no default."""
    given = {word.partition("=")[0].replace("_", "-") for word in argv}
    if {"--help", "-h"} & given:
        return
    for name, _, default in fields:
        has_default = not (
            default.default is dataclasses.MISSING
            and default.default_factory is dataclasses.MISSING
        )
        flag = "--" + name.replace("_", "-")
        if not has_default and name not in positional and flag not in given:
            value = "FOLDER" if name == "out" else name.upper()
            raise UsageError(f"Give {flag} {value}. See `python {command} --help`.")


@contextlib.contextmanager
def _plain_errors(prog: str, positional: Sequence[str] = ()) -> Iterator[None]:
    """Turn tyro's boxes into plain errors, and let a configuration's own error through."""
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            yield
    except SystemExit as stop:
        error: BaseException | None = stop
        while error is not None and not isinstance(error, ValidationError):
            error = error.__context__
        if error is not None:
            raise error from None
        if stop.code in (0, None):
            raise
        text = _say_expected(_read_box(written.getvalue()))
        if positional and text.startswith("Missing from"):
            text = f"Give {' and '.join(name.upper() for name in positional)}."
        raise UsageError(f"{text} See `python {prog} --help`.") from None


def _read_box(text: str) -> str:
    """Return the first paragraph in a box of tyro's as one line."""
    words = []
    for line in text.splitlines()[1:]:
        inner = line.strip().strip("│").strip()
        if not inner or set(inner) <= set("-─╰╯"):  # tyro draws hyphens where text is not UTF-8
            if words:
                break
            continue
        words.append(inner)
    return " ".join(words).rstrip(".") + "."


def _say_expected(text: str) -> str:
    """Return tyro's error on a value in plain words; other errors as they are."""
    if found := re.fullmatch(
        r"Error parsing (\S+): (invalid literal for int|could not).*: (.*)\.", text
    ):
        flag, problem, value = found.groups()
        number = "a whole number" if problem.startswith("invalid") else "a number"
        return f"{flag} is {value}, but must be {number}."
    if found := re.match(
        r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)", text
    ):
        value, flag, listed = found.groups()
        choices = re.findall("'(.*?)'", listed)
        if "None" in choices:  # tyro has no order then
            choices = sorted({*choices} - {"None"})
        return f"{flag} is {value}; choose one of {', '.join(choices)}."
    if found := re.match(r"Missing value for argument '(\S+)'\. Expected (\d+) values", text):
        flag, count = found.groups()
        return f"{flag} needs {'a value' if count == '1' else f'{count} values'}."
    if found := re.match(r"Unrecognized options: (.*)\.$", text):
        return f"{found[1]} belongs to no flag."
    return text


def _describe_presets(presets, description) -> str:
    rows = []
    for name, preset in presets.items():
        summary = _first_sentence(inspect.cleandoc(preset.__doc__ or ""))
        rows.append(_wrap_row(name, summary, indent=15))
    return "\n".join([description, "", "presets:", *rows])


def _describe_main_flags(config, preset, prog, main_flags) -> str:
    flags = {flag.name: flag for flag in list_flags(config)}
    names = [name.replace("_", "-") for name in main_flags]
    rows = [
        _wrap_row(f"--{name} {_format(flags[name].value)}", _first_sentence(flags[name].help), 36)
        for name in names
        if name in flags
    ]
    paragraphs = [
        textwrap.fill(paragraph, _width()) if not paragraph.startswith(" ") else paragraph
        for paragraph in inspect.cleandoc(preset.__doc__ or "").split("\n\n")
    ]
    return "\n".join(
        [f"usage: python {prog} [--flags]", "", *paragraphs]
        + ["", "main flags and their values in this preset:", *rows]
        + ["", f"`python {prog} --help-all` shows all {len(flags)} flags."]
    )


def _wrap_row(left: str, text: str, indent: int) -> str:
    lines = textwrap.wrap(text, _width() - indent) or [""]
    if len(left) + 4 > indent:
        return "\n".join([f"  {left}", *(" " * indent + line for line in lines)]).rstrip()
    first = f"  {left}".ljust(indent) + lines[0]
    return "\n".join([first, *(" " * indent + line for line in lines[1:])]).rstrip()


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[^.]\.)\s+(?=[A-Z0-9])", " ".join(text.split()), maxsplit=1)[0]


def _format(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "(none)"
    return str(value)


def _width() -> int:
    return max(60, min(100, shutil.get_terminal_size((80, 24)).columns))


def _read_help_texts(cls: type) -> dict[str, str]:
    """Return the strings under the fields of a class, by field."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, following in zip(body.body, body.body[1:]):
        if not isinstance(following, ast.Expr) or not isinstance(following.value, ast.Constant):
            continue
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            texts[statement.target.id] = str(following.value.value)
    return texts
