"""Write the command reference and the API pages from the code, and keep flags on one line.

A page asks for a part by a comment on a line of its own:

    <!-- flags: module:Dataclass -->    every field as a flag, with type, default and text
    <!-- presets: module -->            the PRESETS of a module, with their docstrings
    <!-- module commands -->            the help text of each module that is a command, too
    <!-- api: package -->               the public names of a package, for mkdocstrings
"""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import logging
import re
import runpy
import sys
import types
import typing
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
MARKER = re.compile(r"^<!-- (flags|presets|module commands|api)(?:: (\S+))? -->$", re.MULTILINE)


def on_page_markdown(markdown, **_):
    logging.getLogger("torch").setLevel(logging.ERROR)
    return MARKER.sub(lambda match: WRITERS[match[1]](match[2]), markdown)


def on_page_content(html, **_):
    """Keep each flag in running text on one line; browsers break lines behind hyphens."""
    return re.sub(
        r"(?<!>)<code>[^<]*</code>",
        lambda code: FLAG.sub(r'<span class="flag">\g<0></span>', code[0]),
        html,
    )


def write_flags(where):
    module, name = where.split(":")
    cls = getattr(importlib.import_module(module), name)
    head = "| flag | value | default | meaning |\n|---|---|---|---|\n"
    sections = []
    for title, rows in list_sections(cls):
        table = head + "\n".join(f"| {' | '.join(row)} |" for row in rows)
        sections.append(f"**`--{title}.`**\n\n{table}" if title else table)
    return "\n\n".join(sections)


def find_configurations():
    """Return the dataclasses whose fields are flags: those that a command parses."""
    names = set()
    for path in sorted(ROOT.glob("em_*/**/*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Options")):
                names.add((module, node.name))
    classes = [getattr(importlib.import_module(module), name) for module, name in sorted(names)]
    return [each for each in classes if dataclasses.is_dataclass(each)]


def list_sections(cls, prefix=""):
    """Return [(prefix, rows)]: the fields of `cls`, then those of its dataclass fields."""
    texts, types_ = read_field_texts(cls), typing.get_type_hints(cls, include_extras=True)
    rows, nested = [], []
    for field in dataclasses.fields(cls):
        kind = strip(types_[field.name])
        flag = f"{prefix}{field.name}".replace("_", "-")
        if kind is typing.Any:  # set by the program
            continue
        if dataclasses.is_dataclass(kind):
            nested += list_sections(kind, f"{flag}.")
            continue
        required = field.default is dataclasses.MISSING
        if field.default_factory is not dataclasses.MISSING:
            default, required = field.default_factory(), False
        else:
            default = field.default
        text = escape(" ".join(texts.get(field.name, "").split()))
        shown = "required" if required else f"`{show(default)}`"
        rows.append((f"`--{flag}`", escape(describe(kind)), escape(shown), text))
    return [(prefix.rstrip("."), rows), *nested] if rows else nested


def read_field_texts(cls):
    """Return {field: the string below it} of a dataclass and its bases."""
    texts = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (node,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body
        for field, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                texts[field.target.id] = below.value.value
    return texts


def strip(kind):
    return strip(kind.__origin__) if hasattr(kind, "__metadata__") else kind


def describe(kind):
    """Return a type as a reader of flags wants it: choices, or the kind of value."""
    kind = strip(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(each) for each in arguments if each is not type(None))
    if origin is tuple:
        return f"{describe(arguments[0])} ..."
    names = {bool: "flag", int: "integer", float: "number", str: "text"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def show(value):
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else value


def escape(text):
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def write_presets(module):
    presets = importlib.import_module(module).PRESETS
    return "\n\n".join(
        f"`{name}`\n:   " + inspect.cleandoc(preset.__doc__).replace("\n", "\n    ")
        for name, preset in presets.items()
    )


def write_module_commands(_):
    parts = []
    for path in sorted(ROOT.glob("em_*/**/*.py")):
        if '\nif __name__ == "__main__":' not in path.read_text(encoding="utf-8"):
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        name = name.removesuffix(".__main__")
        parts.append(f"### python -m {name}\n\n```text\n{read_help(name)}\n```")
    return "\n\n".join(parts)


def read_help(module):
    out = io.StringIO()
    arguments = mock.patch.object(sys, "argv", [f"python -m {module}", "--help"])
    plain = mock.patch.dict("os.environ", {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    with arguments, plain, warnings.catch_warnings(), contextlib.redirect_stdout(out):
        warnings.simplefilter("ignore")
        with contextlib.suppress(SystemExit):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).strip()
    if not text:
        raise ValueError(f"python -m {module} --help prints nothing")
    return text.replace(str(ROOT), "").replace(str(Path.home()), "~")


def write_api(package):
    lines = []
    for node in ast.parse((ROOT / package / "__init__.pyi").read_text()).body:
        for alias in node.names:
            line = f"::: {package}.{node.module}.{alias.name}"
            if alias.name.endswith("Config"):  # its fields are the flags of commands.md
                line += "\n    options:\n      members: false\n      show_signature: false"
            lines.append(line)
    return "\n\n".join(lines)


WRITERS = {
    "flags": write_flags,
    "presets": write_presets,
    "module commands": write_module_commands,
    "api": write_api,
}
