"""Series of TIA: the images in `NAME_1.ser`, what the microscope says in `NAME.emi`."""

import re
import struct
from pathlib import Path
from xml.etree import ElementTree

from em_data.formats.base import Refusal

ITEM_BYTES = {1: 1, 2: 2, 3: 4, 4: 1, 5: 2, 6: 4, 7: 4, 8: 8, 9: 8, 10: 16}
IMAGES = 0x4122
IMAGE_HEADER = "<ddIddIHII"
TIMES = 0x4152, 0x4142  # first bytes of the time of an image, without and with a position
PLAIN_KEYS = {
    "Microscope": "instrument",
    "High tension": "voltage_kV",
    "Magnification": "magnification",
    "User": "author",
}


def check_ser(path: Path, size: int) -> list[str]:
    """Refuse a series that announces more images than the file holds, or images of many sizes.

    Returns:
        A sentence if the time of an image, which follows its pixels, is not where the header says.

    Raises:
        Refusal: The file is cut short, damaged, or holds no image.
    """
    with open(path, "rb") as file:
        head = file.read(34)
        version, kind, _, num_total, num_valid = struct.unpack_from("<HIIII", head, 4)
        word = "I" if version <= 528 else "Q"
        (table,) = struct.unpack_from(f"<{word}", head, 22)
        if num_valid == 0:
            raise Refusal("a TIA series without an image. Open it in TIA and export it as TIFF.")
        word_bytes = struct.calcsize(f"<{word}")
        if table + num_valid * word_bytes > size:
            raise Refusal(f"truncated: {num_valid} images are announced. Copy it again.")
        if kind != IMAGES:
            return []
        file.seek(table)
        offsets = struct.unpack(f"<{num_valid}{word}", file.read(num_valid * word_bytes))
        file.seek(table + num_total * word_bytes)
        tags = file.read(num_valid * word_bytes).ljust(num_valid * word_bytes, b"\0")
        shapes, num_shifted = set(), 0
        for offset, (tag,) in zip(offsets, struct.iter_unpack(f"<{word}", tags)):
            file.seek(offset)
            *_, item, width, height = struct.unpack(IMAGE_HEADER, file.read(50))
            shapes.add((item, width, height))
            num_bytes = width * height * ITEM_BYTES.get(item, 0)
            if not num_bytes or file.tell() + num_bytes > size:
                raise Refusal(
                    f"truncated or damaged: an image of {width} x {height} pixels of type {item} "
                    f"at byte {offset} of {size}. Copy it again."
                )
            file.seek(min(tag, size))
            num_shifted += int.from_bytes(file.read(2), "little") not in TIMES
    if len(shapes) > 1:
        raise Refusal("a TIA series of images of several sizes. Export each as TIFF.")
    if not num_shifted:
        return []
    return [
        f"{num_shifted} of {num_valid} images have their time elsewhere than the header says: the "
        "file may be damaged and the pixels shifted. Compare it with the original"
    ]


def find_emi(path: Path) -> Path | None:
    """Return the header `NAME.emi` beside the series `NAME_1.ser`, or None if there is none."""
    match = re.fullmatch(r"(.+)_\d+", path.stem)
    emi = path.with_name(f"{match[1]}.emi") if match else None
    return emi if emi and emi.is_file() else None


def read_emi(path: Path) -> dict:
    """Return what an .emi file says of the microscope, under plain keys; {} if it is damaged."""
    text = path.read_bytes()
    start = text.find(b"<ExperimentalDescription>")
    end = text.find(b"</ExperimentalDescription>", start)
    if start < 0 or end < 0:
        return {}
    try:
        tree = ElementTree.fromstring(text[start : end + len("</ExperimentalDescription>")])
    except ElementTree.ParseError:
        return {}
    found = {}
    for item in tree.iter("Data"):
        label, value = item.findtext("Label") or "", (item.findtext("Value") or "").strip()
        if label == "Mode" and "TEM" in value.split() and "Diffraction" in value.split():
            raise Refusal(f"a diffraction pattern: {path.name} says {value!r}.")
        if label in PLAIN_KEYS and value:
            found[PLAIN_KEYS[label]] = _number(value.removeprefix("Microscope "))
    return found


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text[:200]
