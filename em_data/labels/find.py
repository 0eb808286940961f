"""Find the labels and the classes of a folder of images, and say what is not used."""

import re
from collections import Counter
from pathlib import Path

from em_data.labels.label_set import LabelSet
from em_data.labels.matching import ImageIndex
from em_data.labels.read_coco import find_coco
from em_data.labels.read_masks import find_masks
from em_data.labels.read_tables import (
    check_classes,
    choose_column,
    find_object_sets,
    find_tables,
)
from em_data.labels.read_yolo import find_yolo
from em_data.split import name_some

OTHER_FORMS = {
    ".json": (re.compile(rb'"shapes".*"imagePath"|"imagePath".*"shapes"', re.S), "LabelMe"),
    ".xml": (re.compile(rb"<annotation>.*<object>|<annotations>", re.S), "Pascal VOC or CVAT"),
}
SPLITS = re.compile(r"train(ing)?|val(id(ation)?)?|test(ing)?|images?|imgs?|data|raw|micrographs?")


def find_labels(
    folder: Path, paths, masks, files, labels: str, meaning: str
) -> tuple[LabelSet | None, list[str], set[Path]]:
    """Return the labels of a folder, sentences on those that are not used, and all their files.

    Args:
        folder: What all paths are relative to.
        paths: Its images.
        masks: Images that are labels by their names.
        files: Its other files that may hold labels.
        labels: "auto", "none" or the name of a set, as of `DataConfig.labels`.
        meaning: What grey levels of masks are, as of `DataConfig.masks`.

    Raises:
        ValueError: A file of labels cannot be read, two contradict each other, or there is no set
            of this name. The message says how to go on.
    """
    if labels == "none":
        return None, [], set()
    index = ImageIndex(paths)
    coco = find_coco(folder, files, index)
    others = find_yolo(folder, files, index)
    others += sorted(find_masks(folder, masks, files, index, meaning), key=_rank_masks)
    notes: list[str] = []
    others += find_object_sets(folder, find_tables(folder, files, index, notes))
    sets = [*coco, *others]
    notes += _say_other_forms(folder, files)
    if labels != "auto":
        chosen = [each for each in sets if each.name.rstrip("/") == labels.rstrip("/")]
        if not chosen:
            names = ", ".join(each.describe() for each in sets) or "none"
            raise ValueError(
                f"tiles.labels is {labels}, but the labels of {folder} are: {names}. Use "
                "--tiles.labels with one of them, or auto or none."
            )
    else:
        chosen = [each for each in coco if each.files] or others[:1]
    for each in chosen:
        each.form = each.look_closer() if each.look_closer else each.form
    unused = [each for each in sets if each not in chosen]
    for each in unused:
        notes += [] if each.files else each.notes
    unused = [each for each in unused if each.files]
    if unused:
        names = "; ".join(each.describe() for each in unused)
        notes.append(
            f"other labels: {names}. {chosen[0].name} is used; choose with --tiles.labels."
        )
    named = {file for each in sets for files in each.files.values() for file in files}
    return (_merge(chosen) if chosen else None), notes, named


def _rank_masks(labels):
    """Order masks: of instances before others, and those of kinds last."""
    is_kinds = bool(re.search(r"semantic|class", labels.name, re.IGNORECASE))
    is_instances = bool(re.search(r"instance", labels.name, re.IGNORECASE))
    return is_kinds, not is_instances, labels.name


def _merge(sets):
    """Return one set of several COCO files, such as those of a training and a test set."""
    if len(sets) == 1:
        return sets[0]
    counts = Counter(path for each in sets for path in each.files)
    twice = [path for path, num in counts.items() if num > 1]
    if twice:
        names = " and ".join(each.name for each in sets if twice[0] in each.files)
        raise ValueError(
            f"{names} both label {name_some([str(each) for each in twice], 3)}. Choose one with "
            "--tiles.labels, or use --tiles.labels none."
        )
    owners = {path: each for each in sets for path in each.files}
    return LabelSet(
        " + ".join(each.name for each in sets),
        sets[0].form,
        {path: files for each in sets for path, files in each.files.items()},
        lambda path, micrograph: owners[path].read(path, micrograph),
        [note for each in sets for note in each.notes],
    )


def _say_other_forms(folder, files):
    """Return sentences on labels in forms that are not read."""
    found = Counter()
    for file in files:
        pattern, form = OTHER_FORMS.get(file.suffix.lower(), (None, None))
        if pattern is None:
            continue
        try:
            with open(folder / file, "rb") as opened:
                start = opened.read(2**16)
        except OSError:
            continue
        found[form] += bool(pattern.search(start))
    return [
        f"{num} {form} files: labels in this form are not read. Export them as COCO."
        for form, num in found.items()
        if num
    ]


def find_classes(folder: Path, paths, files, classes: str) -> tuple[dict, str, list[str]]:
    """Return {image: class}, where they come from ("" if there are none), and sentences.

    Args:
        folder, paths, files: As of `find_labels`.
        classes: "auto", "none", "folder" or the name of a column, as of `DataConfig.classes`.

    Raises:
        ValueError: There is no such column.
    """
    if classes == "none":
        return {}, "", []
    if classes == "folder":
        return _list_folder_classes(paths), "the folders", []
    notes: list[str] = []
    for table in find_tables(folder, files, ImageIndex(paths), notes):
        column = choose_column(table.columns, classes)
        if column is None or classes not in ("auto", column):
            continue
        where = f"column {column} of {table.file}"
        values = {path: row.get(column) for path, row in table.rows.items()}
        named, said = check_classes(values, where, len(paths))
        notes += said
        if named:
            return named, where, notes + table.notes
    if classes != "auto":
        raise ValueError(
            f"tiles.classes is {classes}, but no table of {folder} has such a column of classes. "
            "Use --tiles.classes with a column's name, or auto, folder or none."
        )
    return {}, "", notes


def _list_folder_classes(paths):
    """Return each image's uppermost folder that is neither images/ nor a split such as train/."""
    classes = {}
    for path in paths:
        parts = [part for part in path.parts[:-1] if not SPLITS.fullmatch(part.lower())]
        if parts:
            classes[path] = parts[0]
    return classes
