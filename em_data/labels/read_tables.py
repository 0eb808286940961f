"""Read tables beside images, metadata.csv and metadata.jsonl: classes, and objects."""

import csv
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from em_data.labels.label_set import LabelSet, say_unmatched
from em_data.labels.matching import ImageIndex
from em_data.labels.placing import BadLabels
from em_data.labels.read_objects import read_objects
from em_data.micrograph import Micrograph

FILE_KEYS = ("file_name", "filename", "file", "image", "image_name", "name", "path")
CLASS_KEYS = ("class_name", "class", "label", "material", "category")
MAX_BYTES = 2**28


@dataclass(eq=False)
class Table:
    """The rows of a table that belong to images: {image: {column: value}}."""

    file: Path
    rows: dict[Path, dict]
    notes: list[str]

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in their order."""
        return list(dict.fromkeys(key for row in self.rows.values() for key in row))


def find_tables(
    folder: Path, files: list[Path], index: ImageIndex, notes: list[str]
) -> list[Table]:
    """Return the tables whose rows name images of the folder; note which cannot be read.

    Raises:
        ValueError: metadata.csv or metadata.jsonl cannot be read. The message says how to go on.
    """
    tables = []
    for file in files:
        if file.suffix.lower() not in (".csv", ".tsv", ".jsonl"):
            continue
        try:
            rows = _read_rows(folder / file)
        except (ValueError, OSError, csv.Error) as error:
            if file.stem.lower() != "metadata":
                notes.append(
                    f"{file} cannot be read as a table ({str(error)[:80]}): its labels and classes "
                    "are not used; save it as UTF-8 if it has any"
                )
                continue
            raise ValueError(
                f"{file} cannot be read ({str(error)[:80]}). Correct it, or leave it out with "
                "--tiles.labels none and --tiles.classes none."
            ) from error
        table = _match(file, rows, index)
        if table.rows:
            tables.append(table)
    return sorted(tables, key=lambda each: (each.file.stem.lower() != "metadata", str(each.file)))


def _read_rows(path):
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.stat().st_size / 2**20:.0f} MB, more than 256")
    text = path.read_text("utf-8-sig")
    if path.suffix.lower() == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no dictionary")
        return rows
    first = text.partition("\n")[0]
    mark = max("\t;,", key=first.count)
    return list(csv.DictReader(text.splitlines(), delimiter=mark))


def _match(file, rows, index):
    key = next((key for key in FILE_KEYS if rows and key in rows[0]), None)
    table, missing, unclear = Table(file, {}, []), [], []
    for row in rows if key else ():
        name = str(row[key] or "")
        images = index.find(name, file)
        if len(images) == 1:
            if images[0] in table.rows:
                table.notes.append(f"{file}: {name} has two rows, the first is used")
            table.rows.setdefault(images[0], row)
        else:
            (unclear if images else missing).append(name)
    table.notes += say_unmatched(f"rows of {file} have no image", missing)
    table.notes += say_unmatched(f"rows of {file} fit several images", unclear)
    return table


def find_object_sets(folder: Path, tables: list[Table]) -> list[LabelSet]:
    """Return the objects in the lines of each metadata.jsonl as labels."""
    sets = []
    for table in tables:
        rows = {path: row["objects"] for path, row in table.rows.items() if "objects" in row}
        if rows:

            def read(path: Path, micrograph: Micrograph, rows=rows):
                if rows[path] is None:
                    raise BadLabels("objects is null. Write an empty list if it has no defect.")
                return read_objects(rows[path], micrograph, _name_number)

            files = {path: [table.file] for path in rows}
            sets.append(LabelSet(table.file.as_posix(), "objects", files, read, table.notes))
    return sets


def _name_number(kind):
    return f"class {kind}" if isinstance(kind, int) else str(kind)


def choose_column(columns, wanted: str) -> str | None:
    """Return the column of the classes: the one that is wanted, or else one of CLASS_KEYS."""
    if wanted in columns:
        return wanted
    lower = {str(column).lower(): column for column in columns}
    return next((lower[key] for key in CLASS_KEYS if key in lower), None)


def name_class(value) -> str | None:
    """Return the class that a value of a table names; None if it is empty.

    Raises:
        ValueError: It is a number with decimals, or no name.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value == int(value):
        value = int(value)
    name = str(value).strip()
    is_number = name.replace(".", "", 1).replace("-", "", 1).isdigit() and "." in name
    if isinstance(value, float | list | dict) or is_number:
        raise ValueError(f"{name[:40]} is no name of a class")
    if not name.isprintable():
        raise ValueError(f"{name[:40]!r} has characters that cannot be printed")
    return name or None


def check_classes(classes: dict, where: str, num_images: int) -> tuple[dict, list[str]]:
    """Return {image: class} or {} where they are no classes, and sentences on it.

    Args:
        classes: {image: value of the column}.
        where: What messages call the column.
        num_images: Images of the folder.
    """
    try:
        named = {path: name_class(value) for path, value in classes.items()}
    except ValueError as error:
        return {}, [f"{where} is not used as the class: {error}"]
    named = {path: name for path, name in named.items() if name is not None}
    counts = Counter(named.values())
    if len(counts) > 2 and max(counts.values()) == 1:
        what = f"each of its {len(counts)} values stands at one image only"
        return {}, [f"{where} is not used as the class: {what}"]
    notes = []
    if named and len(named) < num_images:
        notes.append(f"{num_images - len(named)} images have no class in {where}")
    return named, notes
