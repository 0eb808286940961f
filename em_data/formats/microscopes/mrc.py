"""What RosettaSciIO does not look at in the header of an MRC file."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from em_data.formats.base import Refusal

HEADER_BYTES = 1024
ITEM_BYTES = {0: 1, 1: 2, 2: 4, 4: 8, 6: 2, 12: 2}
IMOD_STAMP = 1146047817
UNSTATED_NM = 0.1, 0.1  # a cell of 1 angstrom per pixel is what programs write by default
FEI_BYTES = 128 * 1024  # of the extended header that RosettaSciIO takes for one of FEI
UNSTATED = (
    "the header gives exactly 1 angstrom per pixel, which programs write when they do not know it: "
    "the pixel size is unknown; give it with --tiles.pixel-size-nm"
)


@dataclass
class MrcHeader:
    """How the pixels of a file are stored.

    Args:
        order: "<" or ">", the order of bytes.
        is_signed: Whether bytes are signed, which mode 0 leaves open.
        size_nm: (x, y) of a pixel by the unit cell, or None if the cell is empty.
        has_fei: Whether the pixel size is in an extended header of FEI.
        notices: Sentences for the user.
    """

    order: str
    is_signed: bool
    size_nm: tuple[float, float] | None
    has_fei: bool
    notices: list[str]


def read_mrc_header(path: Path, size: int) -> MrcHeader:
    """Return what the header of a file of `size` bytes says.

    Raises:
        Refusal: The file is cut short or its header is damaged.
    """
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    order = ">" if head[212:213] == b"\x11" else "<"

    def read(layout, position):
        return struct.unpack_from(order + layout, head, position)

    width, height, depth, mode = read("4I", 0)
    (extended,) = read("I", 92)
    if mode not in ITEM_BYTES:
        raise Refusal(f"an MRC file of the unknown mode {mode}. Export it as TIFF.")
    needed = HEADER_BYTES + extended + width * height * depth * ITEM_BYTES[mode]
    if needed > size:
        raise Refusal(
            f"truncated: {depth} x {height} x {width} pixels are announced, but the file holds "
            f"{size} bytes. Copy it again."
        )
    notices = []
    if needed < size:
        notices.append(f"{size - needed} bytes behind the pixels that the header announces")
    least, most = read("2f", 76)
    (version,), (stamp, flags) = read("I", 108), read("2I", 152)
    is_signed = bool(flags & 1) if stamp == IMOD_STAMP else version >= 20140 or least < 0
    if not least < 0 and 127 < most < 256:
        is_signed = False
    cell, samples = read("2f", 40), read("2I", 28)
    sizes = [length / num / 10 for length, num in zip(cell, samples) if num]
    is_known = len(sizes) == 2 and all(math.isfinite(each) and each > 0 for each in sizes)
    is_fei = head[104:108].strip(b"\0 ") in (b"", b"FEI1")
    return MrcHeader(
        order,
        is_signed,
        (sizes[0], sizes[1]) if is_known else None,
        extended == FEI_BYTES and is_fei,
        notices,
    )


def correct_mrc(signal: dict, header: MrcHeader) -> dict:
    """Return what RosettaSciIO read with the order of bytes, the sign and the scale corrected."""
    data, axes = signal["data"], signal["axes"]
    if data.dtype == np.uint8 and header.is_signed:
        data = data.view(np.int8)
    elif data.dtype.itemsize > 1 and header.order == ">":
        data = data.view(data.dtype.newbyteorder(">"))
    x, y = axes[-1], axes[-2]
    size_nm, notices = header.size_nm, header.notices
    if not (header.has_fei and 0 < float(x["scale"]) < math.inf):
        if size_nm == UNSTATED_NM:
            size_nm, notices = None, [*notices, UNSTATED]
        for axis, length in zip((x, y), size_nm or (0, 0)):
            axis |= {"scale": length, "units": "nm" if size_nm else ""}
    return signal | {"data": data, "notices": notices}
