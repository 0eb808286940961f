"""Checks of a file before RosettaSciIO reads it: what its header announces must be in it."""

import bz2
import math
import re
import struct
from pathlib import Path

from em_data.formats.base import Refusal
from em_data.formats.microscopes.dm import check_dm
from em_data.formats.microscopes.tia import check_ser

MAX_PHENOM_BYTES = 64 * 1024**2  # unpacked; RosettaSciIO reads them one by one
JEOL_ITEM_BYTES = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 4, 10: 8}


def check_header(path: Path, format_name: str) -> list[str]:
    """Refuse a file whose header announces more than the file holds.

    Returns:
        Sentences for the user.

    Raises:
        Refusal: The file is cut short or its header is damaged.
    """
    check = CHECKS.get(format_name)
    if check:
        try:
            return check(path, path.stat().st_size) or []
        except (struct.error, ValueError, OverflowError) as error:
            if isinstance(error, Refusal):
                raise
            raise Refusal("truncated: its header is cut short. Copy it again.") from error
    return []


def _check_tvips(path, size):
    part = re.search(r"_(\d{3})$", path.stem)
    if part and part[1] != "000":
        raise Refusal("a later part of a series, which is read with its first part, _000.tvips.")


def _check_jeol(path, size):
    """The pixels are in the last tag `Bits`, its type and length first; `Size` stands before it."""
    data = path.read_bytes()
    bits = data.rfind(b"Bits\0")
    sizes = data.rfind(b"Size\0", 0, max(bits, 0))
    if sizes < 0:
        raise Refusal("a JEOL file without an image.")
    kind, num_bytes = struct.unpack_from("<2i", data, bits + 5)
    width, height = struct.unpack_from("<2i", data, sizes + 13)
    needed = width * height * JEOL_ITEM_BYTES.get(kind, 0)
    if needed <= 0 or needed != num_bytes or bits + 13 + num_bytes > size:
        raise Refusal(
            f"truncated or damaged: {width} x {height} pixels are announced, {num_bytes} bytes of "
            "them are stored. Copy it again."
        )


def _check_ripple(path, size):
    """The header is text, a key and a value in a line; the pixels are in a file beside it."""
    lines = (line.split("\t") for line in path.read_text("latin-1").splitlines())
    facts = {line[0].strip().lower(): line[1].strip() for line in lines if len(line) > 1}
    raw = path.with_suffix(".raw")
    if not raw.is_file():
        raise Refusal(f"its pixels, {raw.name}, are missing. Copy them beside it.")
    num_values = math.prod(int(facts.get(key, 1)) for key in ("width", "height", "depth"))
    needed = int(facts.get("offset", 0)) + num_values * int(facts.get("data-length", 1))
    if needed != raw.stat().st_size:
        raise Refusal(
            f"truncated or damaged: {needed} bytes are announced, {raw.stat().st_size} are in "
            f"{raw.name}. Copy both again."
        )


def _check_phenom(path, size):
    """RosettaSciIO waits without end for the rest of a file that is cut short."""
    unpacker, num_bytes = bz2.BZ2Decompressor(), 0
    with open(path, "rb") as file:
        while not unpacker.eof:
            block = b""
            if unpacker.needs_input:
                block = file.read(2**20)
                if not block:
                    raise Refusal(
                        "truncated: the end of the packed data is missing. Copy it again."
                    )
            num_bytes += len(unpacker.decompress(block, 2**20))
            if num_bytes > MAX_PHENOM_BYTES:
                raise Refusal(
                    f"more than {MAX_PHENOM_BYTES // 1024**2} MB of Phenom data. "
                    "Export its images as TIFF."
                )


CHECKS = {
    "DigitalMicrograph": check_dm,
    "TIA": check_ser,
    "JEOL": _check_jeol,
    "Phenom": _check_phenom,
    "Ripple": _check_ripple,
    "TVIPS": _check_tvips,
}
