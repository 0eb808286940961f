"""Files of images: tar archives as WebDataset reads them, and Arrow files as `datasets` has them.

The bytes of a file depend on its images alone: rows in the order of their numbers, blocks of fixed
size, headers without a time or an owner.
"""

import json
import tarfile
import threading
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from em_data.images import encode_png, make_png_options
from em_data.intensity import to_uint8, to_uint16
from em_generation.generate import Started
from em_generation.label_store import encode_labels

ROWS = 100  # of an Arrow file, written together
ENDINGS = {
    "masks": "mask.png",
    "semantic": "semantic.png",
    "labels": "txt",
    "coco": "coco",  # not .json: `datasets` needs one structure of all JSON files
    "records": "json",
}


class Sink(Protocol):
    """An open file of images."""

    def encode(self, numbers: Sequence[int], images) -> list[Any]:
        """Return what `add` takes of each image [B, 1, H, W] in [-1, 1]. Thread-safe."""

    def add(self, number: int, sample: Any) -> None:
        """Write an image behind the last one."""

    def close(self) -> None:
        """Write the end of the file."""


class TarSink:
    """A tar archive: NUMBER.png, NUMBER.json and the labels of each image.

    The JSON has the number, the pixel size, the class and where labels are from. NUMBER.coco has
    COCO's annotations and categories, as JSON.
    """

    def __init__(self, path: Path, started: Started):
        self.started = started
        self.tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def encode(self, numbers: Sequence[int], images) -> list[dict[str, bytes]]:
        """Return {ending of the name: content} of each image [B, 1, H, W] in [-1, 1]."""
        levels = (to_uint8 if self.started.bits == 8 else to_uint16)(images)[:, 0]
        options = [make_png_options(self.started.pixel_size_nm) for _ in levels]
        return [
            {"png": encode_png(image, **each)} | self._describe(number, image.shape)
            for number, image, each in zip(numbers, levels, options, strict=True)
        ]

    def _describe(self, number, shape) -> dict[str, bytes]:
        facts = (self.started.pixel_size_nm, self.started.name_classes)
        if self.started.labels is not None:
            found = self.started.labels.take(number)
            files = encode_labels(number, found, shape, self.started.labels, *facts)
            record = json.loads(files.pop("records"))
            coco = {"annotations": record.pop("annotations")}
            names = enumerate(self.started.labels.kinds, start=1)
            coco["categories"] = [{"id": i, "name": name} for i, name in names]
            if "coco" in self.started.labels.formats:
                files["coco"] = json.dumps(coco).encode()
            files["records"] = json.dumps(record).encode()
            return {ENDINGS[name]: content for name, content in files.items()}
        record = {"number": number, "pixel_size_nm": facts[0]}
        if facts[1] is not None:
            record["class_name"] = facts[1]([number])[0]
        return {"json": json.dumps(record).encode()}

    def add(self, number: int, sample: dict[str, bytes]) -> None:
        """Write the files of an image."""
        for ending, content in sample.items():
            header = tarfile.TarInfo(f"{number:09d}.{ending}")
            header.size = len(content)
            self.tar.addfile(header, BytesIO(content))

    def close(self) -> None:
        """Write the end of the archive."""
        self.tar.close()


class ArrowSink:
    """An Arrow file with the columns of `em_generation.store.ArrowStore`."""

    def __init__(self, path: Path, started: Started):
        self.path, self.store = path, started.create_store(path.parent, "arrow")
        self.numbers: list[int] = []
        self.files: list[bytes] = []
        self.writer: Any = None

    def encode(self, numbers: Sequence[int], images) -> list[bytes]:
        """Return each image [B, 1, H, W] in [-1, 1] as a PNG file."""
        return self.store.encode(numbers, images)

    def add(self, number: int, sample: bytes) -> None:
        """Take an image; write a block of rows when it is full."""
        self.numbers.append(number)
        self.files.append(sample)
        if len(self.files) == ROWS:
            self._write_block()

    def close(self) -> None:
        """Write the last rows and the end of the file."""
        if self.files:
            self._write_block()
        self.writer.finalize()
        self.writer.close()

    def _write_block(self) -> None:
        import datasets
        from datasets.arrow_writer import ArrowWriter

        rows = range(self.numbers[0], self.numbers[-1] + 1)
        found = self.store.list_columns(rows, self.files)
        if self.writer is None:
            kinds = {name: kind for name, (kind, _) in found.items()}
            self.writer = ArrowWriter(path=str(self.path), features=datasets.Features(kinds))
        self.writer.write_batch({name: values for name, (_, values) in found.items()})
        self.numbers, self.files = [], []


class OrderedWriter:
    """Takes images in any order and writes them to a file in the order of their numbers."""

    def __init__(self, sink: Sink, numbers: range):
        self.sink, self.next, self.waiting = sink, numbers.start, {}
        self.lock = threading.Lock()

    def write(self, numbers: Sequence[int], images) -> int:
        """Take images [B, 1, H, W] in [-1, 1]; return how many are written. Thread-safe."""
        samples = self.sink.encode(numbers, images)
        with self.lock:
            self.waiting.update(zip(numbers, samples, strict=True))
            before = self.next
            while self.next in self.waiting:
                self.sink.add(self.next, self.waiting.pop(self.next))
                self.next += 1
            return self.next - before


def create_sink(format: str, path: Path, started: Started) -> Sink:
    """Open a file of a format: "arrow" or "webdataset"."""
    return (ArrowSink if format == "arrow" else TarSink)(path, started)
