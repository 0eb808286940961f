"""Labels of the Damaged Alloys set: boxes as text, and ellipses as measured by ImageJ."""

import csv
import re
from math import cos, hypot, pi, radians, sin

from em_data.micrograph import Defect

KINDS = {"0": "loop_111", "1": "dot", "2": "loop_100"}
UNIT_TO_PX = 1024 / 485.54  # of the older ImageJ files, whose lengths are not pixels
LABEL_SUFFIX = re.compile(r"_(dis|res|111|crop)$", re.IGNORECASE)
NUM_COLUMNS = 11  # index, area, mean, min, max, XM, YM, major, minor, angle, length


def find_labels(paths, folders):
    """Return {image path: label file} for the images that have one below `folders`.

    A label file has the stem of its image, with or without a suffix such as _dis. Of several, an
    .xls (it has the ellipses) comes before a .txt, and the plain stem before one with a suffix.
    """
    by_stem = {}
    for folder in filter(lambda each: each.is_dir(), folders):
        for label in sorted(folder.iterdir()):
            if label.suffix.lower() in (".txt", ".xls") and label.is_file():
                stem = LABEL_SUFFIX.sub("", label.stem)
                rank = (label.suffix.lower() != ".xls", stem != label.stem, str(label))
                by_stem.setdefault(stem, []).append((rank, label))
    return {path: min(by_stem[path.stem])[1] for path in paths if path.stem in by_stem}


def read_defects(label, micrograph) -> list[Defect]:
    """Read the label file of a micrograph; append assumptions to its notices.

    Three formats are known: .txt in a folder bounding_boxes with lines `[type] ymin xmin ymax xmax`
    (from 0), .txt elsewhere with lines `x y w h` (from 1), and .xls, which is comma-separated text
    of ImageJ. A loop without a type is a "loop". What lies in a cropped label bar is cut off.
    """
    num_cropped = 0
    full_height, full_width = micrograph.metadata.get("full_shape", micrograph.image.shape)
    (height, width), pixel_size_nm = micrograph.image.shape, micrograph.pixel_size_nm
    is_table, defects = label.suffix.lower() == ".xls", []
    objects = _read_ellipses(label, micrograph) if is_table else _read_boxes(label)
    for number, kind, corners, diameter_px, metadata in objects:
        x0, y0, x1, y1 = (round(corner) for corner in corners)
        box = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
        if min(x1, full_width) <= max(x0, 0) or min(y1, full_height) <= max(y0, 0):
            raise ValueError(
                f"{label}, line {number}: the box {(x0, y0, x1, y1)} lies outside of the "
                f"{full_height} x {full_width} image"
            )
        if box[0] >= box[2] or box[1] >= box[3]:
            num_cropped += 1
            continue
        if diameter_px is None:
            diameter_px = max(x1 - x0, y1 - y0)
        diameter_nm = diameter_px * pixel_size_nm if pixel_size_nm else None
        defects.append(Defect(kind, box, diameter_nm=diameter_nm, metadata=metadata))
    if num_cropped:
        micrograph.metadata["notices"].append(
            f"{num_cropped} labels not used: they lie in what was cropped from the image"
        )
    return defects


def _read_boxes(label):
    """Yield (line, kind, corners x0 y0 x1 y1, None, {}) of each box in a text file."""
    is_corners = label.parent.name == "bounding_boxes"
    for number, line in enumerate(label.read_text(errors="replace").splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        try:
            kind = KINDS[words.pop(0).removesuffix(".0")] if len(words) == 5 else "loop"
            a, b, c, d = (float(word) for word in words)
        except (ValueError, KeyError):
            raise ValueError(
                f"{label}, line {number}: not a box of four numbers with or without a type 0, 1, "
                f"2: {line[:60]!r}"
            ) from None
        corners = (b, a, d, c) if is_corners else (a - 1, b - 1, a - 1 + c, b - 1 + d)
        yield number, kind, corners, None, {}


def _read_ellipses(label, micrograph):
    """Yield (line, kind, corners x0 y0 x1 y1, major axis in pixels, metadata) of ImageJ's ellipses.

    The file has full axes, and angles in degrees counter-clockwise.
    """
    text = label.read_text(errors="replace").replace("\t", ",")
    rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
    values = []
    for number, row in enumerate(rows[1:], 2):
        try:
            if len(row) != NUM_COLUMNS:
                raise ValueError
            values.append([float(cell) for cell in row])
        except ValueError:
            raise ValueError(
                f"{label}, line {number}: not the {NUM_COLUMNS} numbers of an ImageJ table"
            ) from None
    side = max(micrograph.image.shape)
    positions = [coordinate for row in values for coordinate in row[5:7]]
    scale = 1.0
    if positions and side >= 1024 and max(positions) <= 485.54:
        scale = UNIT_TO_PX * side / 1024
        micrograph.metadata["notices"].append(
            f"labels taken for lengths in an older unit of {scale:.4g} pixels: all positions are "
            "below 485.54"
        )
    for number, row in enumerate(values, 2):
        x, y, major, minor = (scale * value for value in row[5:9])
        angle = radians(-row[9])  # y points down in the image
        half_x = hypot(major / 2 * cos(angle), minor / 2 * sin(angle))
        half_y = hypot(major / 2 * sin(angle), minor / 2 * cos(angle))
        corners = (x - half_x, y - half_y, x + half_x, y + half_y)
        metadata = {
            "center_px": (x, y),
            "angle": angle % pi,
            "axis_ratio": minor / major if major else 1.0,
        }
        yield number, "loop", corners, major, metadata
