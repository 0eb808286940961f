"""Checks of a microscope's file before RosettaSciIO reads it: its header must fit its size."""

import re
import struct
from pathlib import Path

from em_data.formats.base import Refusal

SER_ITEM_BYTES = {1: 1, 2: 2, 3: 4, 4: 1, 5: 2, 6: 4, 7: 4, 8: 8, 9: 8, 10: 16}
SER_IMAGES = 0x4122
MRC_ITEM_BYTES = {0: 1, 1: 2, 2: 4, 4: 8, 6: 2, 12: 2}
CUT = "truncated: {0}, but the file holds {1} bytes. Copy it again."


def check_header(path: Path, format_name: str) -> None:
    """Refuse a file whose header announces more than the file holds.

    Raises:
        Refusal: The file is cut short or its header is damaged.
    """
    check = {"TIA": _check_ser, "MRC": _check_mrc, "TVIPS": _check_tvips}.get(format_name)
    if check:
        try:
            check(path, path.stat().st_size)
        except struct.error as error:
            raise Refusal("truncated: its header is cut short. Copy it again.") from error


def find_hdf5_format(path: Path, missing: str) -> str:
    """Return the name of the format of an HDF5 file, by its layout.

    Raises:
        Refusal: The layout is unknown, links lead out of the file, or h5py is missing.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise Refusal(missing) from error
    with h5py.File(path, "r") as file:
        _refuse_links(file, h5py)
        if "Experiments" in file:
            return "HyperSpy"
        children = [file[name] for name in file if isinstance(file[name], h5py.Group)]
        if "Version" in file and "Data" in file:
            return "EMD"
        if any("version_major" in each.attrs for each in (file, *children)):
            return "EMD"
        classes = [each.attrs.get("NX_class", b"") for each in (file, *children)]
        if any(str(name).strip("b'").startswith("NX") for name in classes):
            return "NeXus"
    raise Refusal("an HDF5 file of an unknown layout. Export its images as TIFF.")


def _refuse_links(group, h5py, depth=0):
    """Refuse an HDF5 file that would have other files read."""
    if depth > 30:
        raise Refusal("an HDF5 file of groups in groups without end.")
    for name in group:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise Refusal(f"an HDF5 file whose {name} lies in another file. Copy the data into it.")
        if isinstance(link, h5py.SoftLink):
            continue
        item = group[name]
        if isinstance(item, h5py.Group):
            _refuse_links(item, h5py, depth + 1)
        elif isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
            raise Refusal(f"an HDF5 file whose {name} lies in another file. Copy the data into it.")


def _check_ser(path, size):
    """Series of TIA: a header, then images whose headers have 50 bytes."""
    with open(path, "rb") as file:
        head = file.read(34)
        version, kind, _, _, num_valid = struct.unpack_from("<HIIII", head, 4)
        offset_format = "<I" if version <= 528 else "<Q"
        (table,) = struct.unpack_from(offset_format, head, 22)
        if num_valid == 0:
            raise Refusal("a TIA series without an image. Read it in TIA and export it as TIFF.")
        if kind != SER_IMAGES:
            return
        file.seek(table)
        (first,) = struct.unpack(offset_format, file.read(struct.calcsize(offset_format)))
        file.seek(first + 40)
        item, width, height = struct.unpack("<HII", file.read(10))
    if item not in SER_ITEM_BYTES:
        raise Refusal(f"a TIA image of the unknown type {item}. Export it as TIFF.")
    needed = num_valid * (50 + width * height * SER_ITEM_BYTES[item])
    if needed > size:
        text = f"{num_valid} images of {width} x {height} pixels are announced"
        raise Refusal(CUT.format(text, size))


def _check_mrc(path, size):
    with open(path, "rb") as file:
        head = file.read(1024)
    order = ">" if head[212:213] == b"\x11" else "<"
    width, height, depth, mode = struct.unpack_from(f"{order}4I", head)
    (extended,) = struct.unpack_from(f"{order}I", head, 92)
    if mode not in MRC_ITEM_BYTES:
        raise Refusal(f"an MRC file of the unknown mode {mode}. Export it as TIFF.")
    if 1024 + extended + width * height * depth * MRC_ITEM_BYTES[mode] > size:
        raise Refusal(CUT.format(f"{depth} x {height} x {width} pixels are announced", size))


def _check_tvips(path, size):
    part = re.search(r"_(\d{3})$", path.stem)
    if part and part[1] != "000":
        raise Refusal("a later part of a series, which is read with its first part, _000.tvips.")
