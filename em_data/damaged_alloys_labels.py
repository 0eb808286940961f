"""Labels of the Damaged Alloys set: boxes as text, and ellipses as ImageJ measured them."""

import csv
import re
from math import cos, hypot, radians, sin

from em_data.micrograph import Defect

KINDS = {"0": "loop_111", "1": "dot", "2": "loop_100"}  # of the variant with types
UNIT_TO_PX = 1024 / 485.54  # of the older ImageJ files, whose lengths are not in pixels
LABEL_SUFFIX = re.compile(r"_(dis|res|111|crop)$", re.IGNORECASE)
NUM_COLUMNS = 11  # index, area, mean, min, max, XM, YM, major, minor, angle, length


def find_labels(paths, folders):
    """Return {image path: label file}: the file below `folders` with the image's stem, less a suffix such as _dis.

    Where several fit, an .xls before a .txt (it has the ellipses), and the plain stem before one with a suffix.
    """
    by_stem = {}
    for folder in folders:
        if not folder.is_dir():
            continue
        for label in sorted(folder.iterdir()):
            if label.suffix.lower() in (".txt", ".xls") and label.is_file():
                rank = (label.suffix.lower() != ".xls", bool(LABEL_SUFFIX.search(label.stem)))
                by_stem.setdefault(LABEL_SUFFIX.sub("", label.stem), []).append(
                    (rank, str(label), label)
                )
    return {path: min(by_stem[path.stem])[2] for path in paths if path.stem in by_stem}


def read_defects(label, shape, pixel_size_nm, notices):
    """Return the Defects of a label file for an image of `shape` (H, W); what was assumed is appended to `notices`.

    .txt in a folder bounding_boxes: `[type] ymin xmin ymax xmax` (0-based); .txt elsewhere: `x y w h`, 1-based; .xls:
    comma-separated text of ImageJ. A loop whose type the file does not tell is a "loop". `ValueError` for anything else.
    """
    text = label.read_text(errors="replace")
    if label.suffix.lower() == ".xls":
        return _read_imagej(text, label, shape, pixel_size_nm, notices)
    defects = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        try:
            kind = KINDS[words.pop(0).removesuffix(".0")] if len(words) == 5 else "loop"
            a, b, c, d = (float(word) for word in words)
        except (ValueError, KeyError):
            raise ValueError(
                f"{label}, line {number}: not a box of four numbers with or without a type 0, 1, 2: {line[:60]!r}"
            ) from None
        corners = (
            (b, a, d, c)
            if label.parent.name == "bounding_boxes"
            else (a - 1, b - 1, a - 1 + c, b - 1 + d)
        )
        defects.append(_make(kind, corners, shape, pixel_size_nm, label, number))
    return defects


def _make(kind, corners, shape, pixel_size_nm, label, number, **known):
    """Return the Defect of (x0, y0, x1, y1), clipped to the image; `ValueError` where nothing of it lies inside."""
    height, width = shape
    x0, y0, x1, y1 = (round(corner) for corner in corners)
    box = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(
            f"{label}, line {number}: the box {(x0, y0, x1, y1)} lies outside of the {height} x {width} image"
        )
    diameter_px = known.pop("diameter_px", max(x1 - x0, y1 - y0))
    return Defect(
        kind,
        box,
        diameter_nm=diameter_px * pixel_size_nm if pixel_size_nm else None,
        metadata=known,
    )


def _read_imagej(text, label, shape, pixel_size_nm, notices):
    """Return the ellipses of an ImageJ table: major and minor are full axes, the angle counts counter-clockwise."""
    rows = [
        row
        for row in csv.reader(text.replace("\t", ",").splitlines())
        if any(cell.strip() for cell in row)
    ][1:]
    values = []
    for number, row in enumerate(rows, 2):
        try:
            if len(row) != NUM_COLUMNS:
                raise ValueError
            values.append([float(cell) for cell in row])
        except ValueError:
            raise ValueError(
                f"{label}, line {number}: not the {NUM_COLUMNS} numbers of an ImageJ table"
            ) from None
    places = [coordinate for row in values for coordinate in row[5:7]]
    scale = 1.0
    if places and max(shape) >= 1024 and max(places) <= 485.54:
        scale = UNIT_TO_PX * max(shape) / 1024
        notices.append(
            f"labels taken for lengths in an older unit, {scale:.4g} pixels each, since none lies beyond 485.54"
        )
    defects = []
    for number, row in enumerate(values, 2):
        x, y, major, minor = (scale * value for value in row[5:9])
        angle = radians(-row[9])  # y points down in the image
        half_x = hypot(major / 2 * cos(angle), minor / 2 * sin(angle))
        half_y = hypot(major / 2 * sin(angle), minor / 2 * cos(angle))
        corners = (x - half_x, y - half_y, x + half_x, y + half_y)
        known = {
            "center_px": (x, y),
            "angle": angle % radians(180),
            "axis_ratio": minor / major if major else 1.0,
        }
        defects.append(
            _make("loop", corners, shape, pixel_size_nm, label, number, diameter_px=major, **known)
        )
    return defects
