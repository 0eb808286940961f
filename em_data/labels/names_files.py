"""Files that name the numbers in labels: data.yaml, classes.txt and others."""

import re
from pathlib import Path

import yaml

NAMES_FILE = re.compile(
    r"data\.ya?ml|dataset\.ya?ml|(classes|names|obj\.names|class_names|_darknet\.labels)(\.txt)?|"
    r".*\.names|labels?\.txt",
    re.IGNORECASE,
)
BACKGROUND = re.compile(r"_*(background|bg|ignored?|unlabel+ed)_*", re.IGNORECASE)
NUMBERED = re.compile(r"(?P<key>\d+|#[0-9a-fA-F]{6})\s*[:=,;\t ]\s*(?P<name>.+)")


def read_names(folder: Path, files: list[Path]) -> dict:
    """Return {number: name} of the first file that names them, or {}.

    The file is data.yaml with `names`, or a text with one name a line from number 0, or with lines
    `NUMBER NAME`. In place of a number, a colour of a mask may stand as #rrggbb.

    Raises:
        ValueError: The file cannot be read. The message says how to go on.
    """
    found = sorted(
        (each for each in files if NAMES_FILE.fullmatch(each.name)),
        key=lambda each: (each.suffix.lower() not in (".yaml", ".yml"), len(each.parts), str(each)),
    )
    for file in found:
        names = _read(folder / file, file)
        if names:
            return names
    return {}


def list_background(names: dict) -> set:
    """Return the numbers and colours that are named as background, such as 1 or "#000080".

    "void" is no such name: voids are defects of materials.
    """
    return {key for key, name in names.items() if BACKGROUND.fullmatch(name)}


def _read(path, file):
    try:
        text = path.read_text("utf-8")
        names = _read_yaml(text) if file.suffix.lower() in (".yaml", ".yml") else _read_lines(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{file} names the kinds of labels, but it cannot be read ({str(error)[:80]}). Correct "
            "it, or leave the labels out with --tiles.labels none."
        ) from error
    for number, name in names.items():
        if not name or not name.isprintable():
            raise ValueError(
                f"{file}: the name of {number} is {name!r}. Give it a name of printable characters."
            )
    return names


def _read_yaml(text):
    content = yaml.safe_load(text)
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if names is not None and not isinstance(names, dict):
        raise ValueError(f"names is {names!r}")
    return {_to_key(key): str(name).strip() for key, name in (names or {}).items()}


def _read_lines(text):
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    matches = [NUMBERED.fullmatch(line) for line in lines]
    if matches and all(matches):
        return {_to_key(match["key"]): match["name"].strip() for match in matches}
    return dict(enumerate(lines))


def _to_key(key):
    text = str(key).strip().lower()
    return text if text.startswith("#") else int(text)
