"""Read labels in YOLO's form: a text file per image, with boxes or polygons as shares of it."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from em_data.labels.label_set import LabelSet, say_unmatched
from em_data.labels.matching import ImageIndex
from em_data.labels.names_files import read_names
from em_data.labels.placing import Annotation, BadLabels, place
from em_data.micrograph import Micrograph

NUM_TRIED = 20  # files of a folder that are looked at to see whether they are labels
MOST = 1.01  # shares of the image; more is no rounding error
START_BYTES = 4096
LINE = re.compile(r"\d+(\.0*)?(\s+[-+.\deEnainf]+){4,}")


def find_yolo(folder: Path, files: list[Path], index: ImageIndex) -> list[LabelSet]:
    """Return the labels of each folder of text files in YOLO's form among `files`.

    An image whose file is empty has no defects. An image without a file has no labels.
    """
    by_folder = defaultdict(list)
    for file in files:
        if file.suffix.lower() == ".txt":
            by_folder[_find_top(file)].append(file)
    names = read_names(folder, files)
    sets = []
    for top, texts in by_folder.items():
        pairs, alone, unclear = {}, [], []
        for text in texts:
            images = index.find_beside(text, text.stem)
            if len(images) == 1:
                pairs[images[0]] = [text]
            else:
                (unclear if images else alone).append(text)
        alone = [each for each in alone if _is_yolo(folder / each)]
        starts = [files[0] for files in pairs.values() if (folder / files[0]).stat().st_size]
        if not any(_is_yolo(folder / each) for each in starts[:NUM_TRIED]):
            continue
        where = f"{top.as_posix()}/" if top.parts else "*.txt"
        notes = say_unmatched(f"label files of {where} have no image", alone)
        notes += say_unmatched(f"label files of {where} fit several images", unclear)
        reader = YoloReader(folder, pairs, names)
        recipe = repr(sorted(names.items()))
        sets.append(LabelSet(where, "YOLO", pairs, reader.read, notes, recipe))
    return sets


def _find_top(file):
    """Return the folder of a label file without folders such as train/ below labels/."""
    for i, part in enumerate(file.parts[:-1], 1):
        if re.match(r"labels?([-_ ].*)?$|yolo", part, re.IGNORECASE):
            return Path(*file.parts[:i])
    return Path()


def _is_yolo(path):
    """Return True if each of the first lines of a file is a number and at least four more."""
    with open(path, "rb") as file:
        lines = file.read(START_BYTES).decode("utf-8", "replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    whole = lines[:-1] or lines  # the last one may be cut
    return bool(whole) and all(LINE.fullmatch(line) for line in whole)


class YoloReader:
    """Reads the label files of images. names: {number: kind}, or empty."""

    def __init__(self, folder: Path, files: dict[Path, list[Path]], names: dict[int, str]):
        self.folder, self.files, self.names = folder, files, names

    def read(self, path: Path, micrograph: Micrograph):
        """Return the defects of an image."""
        (file,) = self.files[path]
        height, width = micrograph.metadata.get("full_shape", micrograph.image.shape)
        text = (self.folder / file).read_text("utf-8", "replace")
        lines = [(i, line.split()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        annotations = [self._convert(f"line {i}", words, (width, height)) for i, words in lines]
        return place(annotations, micrograph)

    def _convert(self, where, words, size) -> Annotation:
        try:
            number, *values = (float(word) for word in words)
        except ValueError:
            raise BadLabels(f"{where} is {' '.join(words)[:60]!r}, which are no numbers.") from None
        if number != int(number) or number < 0:
            raise BadLabels(f"{where} has the class {words[0]}, but it must be a whole number.")
        if self.names and int(number) not in self.names:
            raise BadLabels(
                f"{where} has the class {int(number)}, but the file of names has "
                f"{min(self.names)} to {max(self.names)}. Add its name."
            )
        kind = self.names.get(int(number), f"class {int(number)}")
        if len(values) == 5:
            raise BadLabels(
                f"{where} has 6 numbers: a box with a confidence is a prediction, not a label. "
                "Remove the last number if it is one."
            )
        if len(values) < 4 or len(values) % 2:
            raise BadLabels(
                f"{where} has {len(values) + 1} numbers, but a box has 5 (class, centre x and y, "
                "width, height) and a polygon a class and pairs of x and y."
            )
        if not np.isfinite(values).all():
            raise BadLabels(f"{where} has a coordinate that is no number. Correct it.")
        if max(map(abs, values)) > MOST:
            raise BadLabels(
                f"{where} has the value {max(values, key=abs):g}, but coordinates are shares of "
                "the image, 0 to 1. Divide x by its width and y by its height."
            )
        points = np.array(values).reshape(-1, 2) * size
        if len(points) > 2:
            return Annotation(kind, where, polygons=[points])
        (x, y), (w, h) = points.tolist()
        return Annotation(kind, where, box=(x - w / 2, y - h / 2, x + w / 2, y + h / 2))
