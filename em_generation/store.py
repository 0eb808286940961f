"""Where generated images go: files in a folder, or a `datasets.Dataset` in shards; what is there already, and what is missing."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from em_data import to_uint8, to_uint16, write_image
from em_training import write_text_atomically

SHARD_IMAGES = 256  # of an Arrow folder: written together, lost together by a kill


class FileStore:
    """One file an image: NUMBER.png or NUMBER.tif, each put in place whole.

    out: the folder. suffix: "png" or "tif". bits: 8 or 16. pixel_size_nm: written into each file; None if unknown.
    """

    def __init__(self, out: Path, suffix: str, bits: int, pixel_size_nm: float | None):
        self.out, self.suffix, self.bits, self.pixel_size_nm = out, suffix, bits, pixel_size_nm

    def find_missing(self, num_images: int) -> list[int]:
        """Numbers below `num_images` without a file, by one scan of the folder."""
        name = re.compile(rf"(\d{{6,}})\.{self.suffix}")
        present = {
            int(match[1]) for path in scan_names(self.out) if (match := name.fullmatch(path))
        }
        return [i for i in range(num_images) if i not in present]

    def share(self, missing: list[int], process_index: int, num_processes: int) -> list[int]:
        """The part of `missing` that one of several processes makes."""
        return missing[process_index::num_processes]

    def write(self, numbers: Iterable[int], images) -> int:
        """Write images [B, 1, H, W] in [-1, 1]; return how many are safe on the disk now. May be called from several threads."""
        for number, image in zip(numbers, images, strict=True):
            path = self.out / f"{number:06d}.{self.suffix}"
            write_image(image, path, bits=self.bits, pixel_size_nm=self.pixel_size_nm)
        return len(images)

    def finish(self) -> None:
        """Nothing is left to do: every file stands for itself."""


class ArrowStore:
    """A `datasets.Dataset` of columns "image" (2-D array, uint8 or uint16: no loss), "number" and, where known, "pixel_size_nm".

    Rows are images 0, 1, 2 ... in order. Shards images-FIRST-END.arrow hold runs of up to 256 of them and are put in place
    whole. `datasets.load_from_disk` opens the folder once `finish` has written its index; while a finished folder is made
    longer, it opens as it was.
    """

    def __init__(self, out: Path, bits: int, pixel_size_nm: float | None):
        self.out, self.bits, self.pixel_size_nm = out, bits, pixel_size_nm
        self._waiting: dict[int, np.ndarray] = {}
        self._shard_of: dict[int, range] = {}
        self._lock = threading.Lock()

    def list_shards(self) -> list[tuple[int, int, str]]:
        """(first, end, file name) of each shard, in order."""
        matches = (
            re.fullmatch(r"images-(\d+)-(\d+)\.arrow", name) for name in scan_names(self.out)
        )
        return sorted((int(match[1]), int(match[2]), match[0]) for match in matches if match)

    def find_missing(self, num_images: int) -> list[int]:
        """Numbers below `num_images` that no shard holds."""
        present = {i for first, end, _ in self.list_shards() for i in range(first, end)}
        return [i for i in range(num_images) if i not in present]

    def share(self, missing: list[int], process_index: int, num_processes: int) -> list[int]:
        """The part of `missing` that one of several processes makes: whole shards."""
        shards = cut_into_shards(missing)
        mine = shards[process_index::num_processes]
        self._shard_of = {number: shard for shard in mine for number in shard}
        return [number for shard in mine for number in shard]

    def write(self, numbers: Iterable[int], images) -> int:
        """Take images [B, 1, H, W] in [-1, 1] that `share` gave out, and write the shards that are complete; return how many images
        those hold. May be called from several threads."""
        pixels = (to_uint8 if self.bits == 8 else to_uint16)(images)[:, 0]  # [B, H, W]
        complete = []
        with self._lock:
            for number, image in zip(numbers, pixels, strict=True):
                self._waiting[number] = image
            for shard in {self._shard_of[number] for number in numbers}:
                if all(number in self._waiting for number in shard):
                    complete.append(
                        (shard, np.stack([self._waiting.pop(number) for number in shard]))
                    )
        for shard, stack in complete:
            self._write_shard(shard, stack)
        return sum(len(shard) for shard, _ in complete)

    def finish(self) -> None:
        """Write the index that makes the folder a data set; called once, when no image is missing."""
        import datasets

        shards = self.list_shards()
        if not shards:
            return
        with (self.out / shards[0][2]).open("rb") as file:
            import pyarrow

            schema = pyarrow.ipc.open_stream(file).schema
        features = datasets.Features.from_arrow_schema(schema)
        info = datasets.DatasetInfo(description="generated micrographs", features=features)
        content = "".join(f"{name} {(self.out / name).stat().st_size}" for _, _, name in shards)
        state = {
            "_data_files": [{"filename": name} for _, _, name in shards],
            "_fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        info.write_to_directory(str(self.out))
        write_text_atomically(self.out / "state.json", json.dumps(state, indent=2) + "\n")

    def _write_shard(self, shard: range, pixels) -> None:
        import datasets
        from datasets.arrow_writer import ArrowWriter

        columns = {"image": datasets.Array2D(shape=pixels.shape[1:], dtype=str(pixels.dtype))}
        columns["number"] = datasets.Value("int64")
        values = {"image": pixels, "number": np.arange(shard.start, shard.stop)}
        if self.pixel_size_nm is not None:
            columns["pixel_size_nm"] = datasets.Value("float64")
            values["pixel_size_nm"] = np.full(len(shard), self.pixel_size_nm)
        path = self.out / f"images-{shard.start:06d}-{shard.stop:06d}.arrow"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with ArrowWriter(path=str(temporary), features=datasets.Features(columns)) as writer:
            writer.write_batch(values)
            writer.finalize()
        temporary.replace(path)


def create_store(out: Path, format: str, bits: int, pixel_size_nm: float | None):
    """The store for a format: "png", "tiff" or "arrow"."""
    if format == "arrow":
        return ArrowStore(out, bits, pixel_size_nm)
    return FileStore(out, {"png": "png", "tiff": "tif"}[format], bits, pixel_size_nm)


def scan_names(folder: Path) -> list[str]:
    """The names in a folder, by one pass without looking at the files: 50,000 take a tenth of a second."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def remove_remains(folder: Path) -> None:
    """Delete what a killed process left half-written, whose names begin with a dot and an image's or a shard's name."""
    for name in scan_names(folder):
        if re.fullmatch(r"\.(\d{6,}\.(png|tif)|images-\d+-\d+\.arrow)\..+", name):
            (folder / name).unlink(missing_ok=True)


def holds_images(folder: Path) -> bool:
    """Say whether a folder holds images by the names that are given here."""
    return any(
        re.fullmatch(r"\d{6,}\.(png|tif)|images-\d+-\d+\.arrow", name)
        for name in scan_names(folder)
    )


def cut_into_shards(numbers: list[int], size: int = SHARD_IMAGES) -> list[range]:
    """Cut sorted numbers into runs without a gap that do not cross a multiple of `size`."""
    shards: list[range] = []
    for number in numbers:
        if shards and shards[-1].stop == number and number % size:
            shards[-1] = range(shards[-1].start, number + 1)
        else:
            shards.append(range(number, number + 1))
    return shards
