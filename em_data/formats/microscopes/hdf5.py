"""Which format an HDF5 file holds, and whether all of its data lies in it."""

import math
import subprocess
import sys
from pathlib import Path

from em_data.formats.base import Refusal

MAX_DEPTH = 30
MAX_CHUNK_BYTES = 2**30
NOT_IMAGES = ("Metadata",)  # of Velox: reserved for all frames, written for some
ELSEWHERE = "an HDF5 file whose {} lies in another file. Copy the data into it."
# reads all that is not data, in a process of its own: some damaged files send HDF5 round in circles
PROBE = """
import sys, h5py
with h5py.File(sys.argv[1], "r") as file:
    list(file.attrs.items())
    file.visititems(lambda name, item: list(item.attrs.items()) and None)
"""
PROBE_SECONDS = 10


def find_hdf5_format(path: Path, missing: str) -> str:
    """Return the name of the format of an HDF5 file, by its layout.

    Args:
        path: The file.
        missing: What to say if h5py is not installed.

    Raises:
        Refusal: The layout is unknown, data lies in another file or was never written.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise Refusal(missing) from error
    _probe(path)
    with h5py.File(path, "r") as file:
        _check_group(file, h5py, 0)
        if "Experiments" in file:
            return "HyperSpy"
        groups = [file, *(each for each in file.values() if isinstance(each, h5py.Group))]
        if "Version" in file and "Data" in file:
            return "EMD"
        if any("version_major" in each.attrs for each in groups):
            return "EMD"
        classes = [each.attrs.get("NX_class", "") for each in groups]
        if any(str(name).removeprefix("b'").startswith("NX") for name in classes):
            return "NeXus"
    raise Refusal("an HDF5 file of an unknown layout. Export its images as TIFF.")


def _probe(path):
    """Refuse a file whose headers HDF5 does not come to the end of, or on which it crashes."""
    command = [sys.executable, "-P", "-c", PROBE, str(path)]
    try:
        code = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS).returncode
    except subprocess.TimeoutExpired:
        raise Refusal(
            f"a damaged HDF5 file: its headers take more than {PROBE_SECONDS} seconds. "
            "Copy it again."
        ) from None
    if code < 0:  # an error of Python is raised again when the file is read
        raise Refusal("a damaged HDF5 file, on which HDF5 itself crashes. Copy it again.")


def _check_group(group, h5py, depth):
    if depth > MAX_DEPTH:
        raise Refusal("an HDF5 file of groups in groups without end.")
    for name in group:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise Refusal(ELSEWHERE.format(name))
        if isinstance(link, h5py.SoftLink):
            continue
        item = group[name]
        if isinstance(item, h5py.Group):
            _check_group(item, h5py, depth + 1)
        elif isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise Refusal(ELSEWHERE.format(name))
            if name not in NOT_IMAGES and sum(each > 1 for each in item.shape or ()) > 1:
                _check_written(item, name)


def _check_written(dataset, name):
    """Refuse a dataset of which a part was never written: HDF5 fills it with zeros."""
    if dataset.chunks is None:
        if dataset.id.get_storage_size() == 0:
            raise Refusal(f"truncated: {name} was never written. Copy it again.")
        return
    if math.prod(dataset.chunks) * dataset.dtype.itemsize > MAX_CHUNK_BYTES:
        raise Refusal(f"{name} is stored in parts of more than 1 GB. Export it as TIFF.")
    needed = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks))
    written = dataset.id.get_num_chunks()
    if written < needed:
        raise Refusal(
            f"truncated: {written} of {needed} parts of {name} are written. Copy it again."
        )
