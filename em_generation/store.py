"""Where generated images go: one file each, or a data set in shards; and which are missing."""

import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from em_data import to_uint8, to_uint16, write_image
from em_data.files import flush_to_disk, write_atomically

NameClasses = Callable[[Sequence[int]], Sequence[str]]
SHARD_IMAGES = 256  # of a data set: written together, and lost together by a kill
SHARD_NAME = r"images-(\d+)-(\d+)\.arrow"


class FileStore:
    """One file per image: NUMBER.png or NUMBER.tif, each written atomically.

    Args:
        out: The folder.
        suffix: "png" or "tif".
        bits: 8 or 16.
        pixel_size_nm: Written into each file; None if unknown.
        name_classes: Numbers of images -> names of their classes, for metadata.jsonl; None if they
            have no class.
    """

    def __init__(
        self,
        out: Path,
        suffix: str,
        bits: int,
        pixel_size_nm: float | None,
        name_classes: NameClasses | None = None,
    ):
        self.out, self.suffix, self.bits, self.pixel_size_nm = out, suffix, bits, pixel_size_nm
        self.name_classes = name_classes

    def find_missing(self, num_images: int) -> list[int]:
        """Return the numbers below `num_images` that have no file, by one scan of the folder."""
        present = self._find_present()
        return [i for i in range(num_images) if i not in present]

    def _find_present(self):
        name = re.compile(rf"(\d{{6,}})\.{self.suffix}")
        matches = map(name.fullmatch, scan_names(self.out))
        return {int(match[1]) for match in matches if match}

    def share(self, missing: list[int], process_index: int, num_processes: int) -> list[int]:
        """Return the part of `missing` that one of several processes makes."""
        return missing[process_index::num_processes]

    def write(self, numbers: Sequence[int], images) -> int:
        """Write images [B, 1, H, W] in [-1, 1]; return how many are safe. Thread-safe."""
        for number, image in zip(numbers, images, strict=True):
            path = self.out / f"{number:06d}.{self.suffix}"
            write_image(image, path, bits=self.bits, pixel_size_nm=self.pixel_size_nm)
        return len(images)

    def finish(self) -> None:
        """Write the classes as metadata.jsonl, which `datasets` and our sources read."""
        if self.name_classes is None:
            return
        numbers = sorted(self._find_present())
        lines = [
            json.dumps({"file_name": f"{number:06d}.{self.suffix}", "class_name": name})
            for number, name in zip(numbers, self.name_classes(numbers), strict=True)
        ]
        write_atomically(self.out / "metadata.jsonl", "\n".join(lines) + "\n")


class ArrowStore:
    """A `datasets.Dataset` with the columns "image", "number" and, if known, others.

    These are "pixel_size_nm" and "class_name".

    Images are stored as PNG in a column of the type `datasets.Image`, so that viewers show them; 8
    and 16 bits are kept without loss. Rows are images 0, 1, 2 ... in order. Shards of up to 256
    rows, images-FIRST-END.arrow, are written atomically. `datasets.load_from_disk` opens the folder
    once `finish` has written its index. A finished folder that is being extended opens as it was.
    """

    def __init__(
        self,
        out: Path,
        bits: int,
        pixel_size_nm: float | None,
        name_classes: NameClasses | None = None,
    ):
        self.out, self.bits, self.pixel_size_nm = out, bits, pixel_size_nm
        self.name_classes = name_classes
        self._waiting: dict[int, bytes] = {}
        self._shard_of: dict[int, range] = {}
        self._lock = threading.Lock()

    def list_shards(self) -> list[tuple[int, int, str]]:
        """Return (first, end, file name) of each shard, in order."""
        matches = (re.fullmatch(SHARD_NAME, name) for name in scan_names(self.out))
        return sorted((int(match[1]), int(match[2]), match[0]) for match in matches if match)

    def find_missing(self, num_images: int) -> list[int]:
        """Return the numbers below `num_images` that no shard holds."""
        present = {i for first, end, _ in self.list_shards() for i in range(first, end)}
        return [i for i in range(num_images) if i not in present]

    def share(self, missing: list[int], process_index: int, num_processes: int) -> list[int]:
        """Return the part of `missing` that one of several processes makes: whole shards."""
        mine = cut_into_shards(missing)[process_index::num_processes]
        self._shard_of = {number: shard for shard in mine for number in shard}
        return [number for shard in mine for number in shard]

    def write(self, numbers: Sequence[int], images) -> int:
        """Take images [B, 1, H, W] in [-1, 1] that `share` gave out; write complete shards.

        Returns how many images these hold. Thread-safe.
        """
        files = self.encode(numbers, images)
        complete = []
        with self._lock:
            self._waiting.update(zip(numbers, files, strict=True))
            for shard in {self._shard_of[number] for number in numbers}:
                if all(number in self._waiting for number in shard):
                    complete.append((shard, [self._waiting.pop(number) for number in shard]))
        for shard, files in complete:
            self._write_shard(shard, files)
        return sum(len(shard) for shard, _ in complete)

    def encode(self, numbers: Sequence[int], images) -> list[bytes]:
        """Return images [B, 1, H, W] in [-1, 1] as PNG files. Thread-safe."""
        levels = (to_uint8 if self.bits == 8 else to_uint16)(images)[:, 0]  # [B, H, W]
        return [encode_png(image) for image in levels]

    def finish(self) -> None:
        """Write the index that makes the folder a data set, once no image is missing."""
        write_index(self.out, [name for _, _, name in self.list_shards()])

    def list_columns(self, shard: range, files: list[bytes]) -> dict[str, tuple[Any, list]]:
        """Return {column: (type, values)} of a shard."""
        import datasets

        images = [{"bytes": file, "path": None} for file in files]
        columns: dict[str, tuple[Any, list]] = {
            "image": (datasets.Image(), images),
            "number": (datasets.Value("int64"), list(shard)),
        }
        if self.pixel_size_nm is not None:
            sizes = [self.pixel_size_nm] * len(shard)
            columns["pixel_size_nm"] = (datasets.Value("float64"), sizes)
        if self.name_classes is not None:
            names = list(self.name_classes(shard))
            columns["class_name"] = (datasets.Value("string"), names)
        return columns

    def _write_shard(self, shard: range, files: list[bytes]) -> None:
        import datasets
        from datasets.arrow_writer import ArrowWriter

        found = self.list_columns(shard, files)
        columns = {name: kind for name, (kind, _) in found.items()}
        values = {name: each for name, (_, each) in found.items()}
        path = self.out / f"images-{shard.start:06d}-{shard.stop:06d}.arrow"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with ArrowWriter(path=str(temporary), features=datasets.Features(columns)) as writer:
            writer.write_batch(values)
            writer.finalize()
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(self.out)


def write_index(out: Path, names: Sequence[str]) -> None:
    """Write the index by which `datasets.load_from_disk` opens a folder of Arrow files.

    names: The files, relative to the folder, in order. Nothing is written for none.
    """
    import datasets
    import pyarrow

    if not names:
        return
    with (out / names[0]).open("rb") as file:
        schema = pyarrow.ipc.open_stream(file).schema
    features = datasets.Features.from_arrow_schema(schema)
    info = datasets.DatasetInfo(description="generated micrographs", features=features)
    content = "".join(f"{name} {(out / name).stat().st_size}" for name in names)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info.write_to_directory(str(out))
    write_atomically(out / "state.json", json.dumps(state, indent=2) + "\n")


def create_store(
    out: Path,
    format: str,
    bits: int,
    pixel_size_nm: float | None,
    name_classes: NameClasses | None = None,
):
    """Return the store of a format: "png", "tiff" or "arrow"."""
    if format == "arrow":
        return ArrowStore(out, bits, pixel_size_nm, name_classes)
    suffix = {"png": "png", "tiff": "tif"}[format]
    return FileStore(out, suffix, bits, pixel_size_nm, name_classes)


def encode_png(levels: np.ndarray) -> bytes:
    """Return grey levels [H, W], uint8 or uint16, as a PNG file."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def scan_names(folder: Path) -> list[str]:
    """Return the names in a folder without looking at the files, which takes moments."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def remove_remains(folder: Path) -> None:
    """Delete what a killed process left half-written: a dot, and the name of one of our files."""
    for name in scan_names(folder):
        if re.fullmatch(rf"\.(\d{{6,}}\.(png|tif|txt|json)|{SHARD_NAME})\..+", name):
            (folder / name).unlink(missing_ok=True)


def cut_into_shards(numbers: list[int], size: int = SHARD_IMAGES) -> list[range]:
    """Cut sorted numbers into runs without a gap that do not cross a multiple of `size`."""
    shards: list[range] = []
    for number in numbers:
        if shards and shards[-1].stop == number and number % size:
            shards[-1] = range(shards[-1].start, number + 1)
        else:
            shards.append(range(number, number + 1))
    return shards
