"""Labels and classes in the columns of a data set."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from em_data.label_images import WORDS
from em_data.labels.placing import BadLabels, place
from em_data.labels.read_masks import (
    NUM_TRIED,
    annotate,
    find_meaning,
    read_mask,
    read_orientation,
    say_large_level,
)
from em_data.labels.read_objects import find_keys, make_defects, read_objects
from em_data.labels.read_tables import check_classes, choose_column
from em_data.micrograph import Defect, Micrograph
from em_data.reading import read_micrograph

OBJECTS = ("objects", "annotations", "labels")


@dataclass(eq=False)
class RowLabels:
    """Labels in columns of a data set.

    Args:
        name: Of the column, for messages and --tiles.labels.
        form: What it holds.
        columns: What must be read of each row.
        read: Returns the defects of a row, or None if it has no labels.
    """

    name: str
    form: str
    columns: list[str]
    read: Callable[[dict, Micrograph], list[Defect] | None]

    def attach(self, row: dict, micrograph: Micrograph, fails: bool) -> None:
        """Add the defects of a row; labels that cannot be used become a notice, or fail."""
        try:
            micrograph.defects = self.read(row, micrograph)
        except BadLabels as error:
            if fails:
                raise ValueError(
                    f"{micrograph.name}: its labels in column {self.name}: {error}"
                ) from error
            micrograph.metadata["notices"].append(f"labels not used: {error}")


def find_row_labels(features, image, config, read_rows, ignored) -> RowLabels | None:
    """Return the labels in the columns of a data set; append to `ignored` what is not used.

    Args:
        features: Columns of the data set.
        image: Name of the column of images.
        config: `DataConfig`.
        read_rows: As `Rows.read`.

    Raises:
        ValueError: There is no column of the name that --tiles.labels gives.
    """
    if config.labels == "none":
        return None
    found = [_open_objects(name, features) for name in OBJECTS if name in features]
    found = [each for each in found if each is not None]
    ours = [each for each in found if each.form == "objects with run lengths"]
    for name in _list_masks(features, image):
        if not (ours and name == "mask"):
            found.append(_open_masks(name, config.masks, read_rows))
    chosen = [each for each in found if config.labels in ("auto", each.name)]
    if config.labels != "auto" and not chosen:
        names = ", ".join(each.name for each in found) or "none"
        raise ValueError(
            f"tiles.labels is {config.labels}, but the columns of labels are: {names}. Use "
            "--tiles.labels with one of them, or auto or none."
        )
    others = [each.name for each in found if each not in chosen[:1]]
    if others:
        ignored.append(
            f"other labels: columns {', '.join(others)}. Column {chosen[0].name} is used; "
            "choose with --tiles.labels."
        )
    return chosen[0] if chosen else None


def _list_masks(features, image):
    import datasets

    return [
        name
        for name, feature in features.items()
        if name != image and isinstance(feature, datasets.Image) and WORDS.search(name)
    ]


def _open_objects(name, features):
    import datasets

    feature = features[name]
    fields = feature if isinstance(feature, dict) else getattr(feature, "feature", None)
    if not isinstance(fields, dict):
        return None
    if name == "objects" and {"kind", "box_px", "runs"} <= set(fields):
        mask = ["mask"] if isinstance(features.get("mask"), datasets.Image) else []
        return RowLabels(name, "objects with run lengths", [name, *mask], _read_ours)
    keys = find_keys(fields)
    if keys is None:
        return None
    kind = fields[keys[0]]
    while not isinstance(kind, datasets.ClassLabel) and hasattr(kind, "feature"):
        kind = kind.feature
    names = kind.names if isinstance(kind, datasets.ClassLabel) else None

    def name_kind(value):
        if names is None:
            return f"class {value}" if isinstance(value, int) else str(value)
        if not 0 <= value < len(names):
            raise BadLabels(f"a category is {value}, but there are {len(names)} names.")
        return names[value]

    def read(row, micrograph):
        objects = row[name]
        return None if objects is None else read_objects(objects, micrograph, name_kind)

    return RowLabels(name, "objects", [name], read)


def _read_ours(row, micrograph):
    objects = row.get("objects")
    if objects is None:
        return None
    mask = (row.get("mask") or {}).get("bytes")
    if mask is not None:
        mask = read_micrograph(mask, label_bar="keep", name=f"mask of {micrograph.name}").image
    return make_defects(objects, mask, micrograph.image.shape)


def _open_masks(name, meaning, read_rows):
    content = read_rows([name])

    def iterate():
        for i in range(NUM_TRIED):
            try:
                value = content[i][name]
            except (IndexError, StopIteration):
                return
            if value is not None:
                yield lambda value=value: _decode(value)

    has_instances = find_meaning(name, meaning, {}, iterate())

    def read(row, micrograph):
        if row[name] is None:
            return None
        levels, kinds = _decode(row[name])
        say_large_level(levels, kinds, {}, micrograph)
        annotations = annotate(levels, kinds, {}, has_instances)
        is_turned = read_orientation(_open(row[name])) != 1
        return place(annotations, micrograph, levels.shape, is_turned=is_turned)

    form = f"masks of {'instances' if has_instances else 'kinds'}"
    return RowLabels(name, form, [name], read)


def _decode(value):
    return read_mask(_open(value))


def _open(value):
    data = value["bytes"]
    return io.BytesIO(data) if data is not None else Path(value["path"])


def find_class_column(features, wanted: str) -> str | None:
    """Return the column of the classes: `class_name`, a `ClassLabel`, or one with such a name.

    Args:
        features: Columns of the data set.
        wanted: "auto", "none", or the name of a column.

    Raises:
        ValueError: There is no such column.
    """
    import datasets

    if wanted == "none":
        return None
    scalars = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
        or getattr(feature, "dtype", "").startswith(("string", "int", "large_string"))
    ]
    if wanted != "auto":
        if wanted in scalars:
            return wanted
        raise ValueError(
            f"tiles.classes is {wanted}, but the columns that can be classes are: "
            f"{', '.join(scalars) or 'none'}. Use --tiles.classes with one of them, or none."
        )
    named = [name for name in scalars if isinstance(features[name], datasets.ClassLabel)]
    column = choose_column(["class_name"] if "class_name" in scalars else named, "auto")
    return column or (named[0] if named else choose_column(scalars, "auto"))


def name_classes(values, feature, column, ignored) -> dict[int, str]:
    """Return {number of a row: class}; append to `ignored` why a column is not used."""
    names = getattr(feature, "names", None)
    if names is not None:  # a ClassLabel; -1 is no class
        return {i: names[each] for i, each in enumerate(values) if each is not None and each >= 0}
    classes, notes = check_classes(dict(enumerate(values)), f"column {column}", len(values))
    ignored += notes
    return classes
