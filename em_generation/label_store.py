"""Images with their labels on the disk.

A folder has images/, masks/, semantic/, labels/, records/, data.yaml and metadata.jsonl. The record
of an image is written before the image, so that a kill loses no label.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from em_data.files import flush_to_disk, make_folder, write_atomically
from em_data.images import encode_png, make_png_options
from em_data.labels import draw_whole_mask, encode_runs
from em_data.labels.annotations import (
    draw_semantic_mask,
    make_annotation,
    make_yolo_index,
    make_yolo_lines,
)
from em_data.labels.masks import draw_instances
from em_data.micrograph import Defect
from em_generation.store import ArrowStore, FileStore, NameClasses, remove_remains, scan_names

FOLDERS = ("images", "masks", "semantic", "labels", "records")
SUFFIXES = {"masks": "png", "semantic": "png", "labels": "txt", "records": "json"}
COCO, METADATA, YOLO = "labels/coco.json", "metadata.jsonl", "data.yaml"


@dataclass(eq=False)
class Labels:
    """The labels of one image.

    facts: what else is known of it, as JSON values: seed, strength, where the layout is from.
    """

    defects: list[Defect]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelFormat:
    """What is written of labels.

    kinds: of defects, in a fixed order. formats: of "coco", "yolo" and "masks". take: number of an
    image that is drawn -> its labels, which are then forgotten.
    """

    kinds: tuple[str, ...]
    formats: tuple[str, ...]
    take: Callable[[int], Labels]


def encode_labels(
    number: int,
    found: Labels,
    shape: tuple[int, int],
    labels: LabelFormat,
    pixel_size_nm: float | None,
    name_classes: NameClasses | None = None,
) -> dict[str, bytes]:
    """Return the files about one image: its masks, YOLO's lines and, always, its record.

    The keys are those of `SUFFIXES`; the record comes last.
    """
    kinds, files = labels.kinds, {}
    if "masks" in labels.formats:
        options = make_png_options(pixel_size_nm)
        files["masks"] = encode_png(draw_instances(found.defects, shape), **options)
        semantic = draw_semantic_mask(found.defects, kinds, shape)
        files["semantic"] = encode_png(semantic, **options)
    if "yolo" in labels.formats:
        files["labels"] = make_yolo_lines(found.defects, kinds, shape).encode()
    annotations = [
        make_annotation(each, shape, category_id=kinds.index(each.kind) + 1)
        for each in found.defects
    ]
    names = {} if name_classes is None else {"class_name": name_classes([number])[0]}
    record = {
        "number": number,
        "height": shape[0],
        "width": shape[1],
        "pixel_size_nm": pixel_size_nm,
        **names,
        **found.facts,
        "annotations": annotations,
    }
    return files | {"records": (json.dumps(record) + "\n").encode()}


class LabelledFileStore(FileStore):
    """One file per image in images/, and its labels beside.

    - masks/NUMBER.png: uint16, 0 for the matrix, k for the k-th defect.
    - semantic/NUMBER.png: 0 for the matrix, else 1 + number of the kind.
    - labels/NUMBER.txt and data.yaml: YOLO's segment format.
    - labels/coco.json, metadata.jsonl: written by `finish` from records/NUMBER.json.
    """

    def __init__(
        self,
        out: Path,
        suffix: str,
        bits: int,
        pixel_size_nm: float | None,
        labels: LabelFormat,
        name_classes: NameClasses | None = None,
    ):
        super().__init__(out / "images", suffix, bits, pixel_size_nm, name_classes)
        self.root, self.labels = out, labels
        for name in FOLDERS:
            if (out / name).is_dir():
                remove_remains(out / name)
        make_folder(self.out)
        make_folder(out / "records")

    def find_missing(self, num_images: int) -> list[int]:
        """Return the numbers below `num_images` without an image or without its record."""
        missing = super().find_missing(num_images)
        records = set(scan_names(self.root / "records"))
        lost = [i for i in range(num_images) if f"{i:06d}.json" not in records]
        return sorted({*missing, *lost})

    def write(self, numbers: Sequence[int], images) -> int:
        """Write images [B, 1, H, W] in [-1, 1] and their labels; return how many are safe."""
        for number, image in zip(numbers, images, strict=True):
            self._write_labels(number, self.labels.take(number), tuple(image.shape[-2:]))
        return super().write(numbers, images)

    def _write_labels(self, number, found, shape):
        options = (self.labels, self.pixel_size_nm, self.name_classes)
        for folder, data in encode_labels(number, found, shape, *options).items():
            write_atomically(self.root / folder / f"{number:06d}.{SUFFIXES[folder]}", data)

    def finish(self) -> None:
        """Write the files about all images: metadata.jsonl, coco.json and data.yaml."""
        kinds = self.labels.kinds
        _write_in_parts(self.root / METADATA, self._list_metadata())
        if "coco" in self.labels.formats:
            _write_in_parts(self.root / COCO, self._list_coco())
        if "yolo" in self.labels.formats:
            write_atomically(self.root / YOLO, make_yolo_index(kinds, self.pixel_size_nm))

    def _read_records(self) -> Iterator[tuple[str, dict]]:
        """Yield the file name of each image and its record, in order."""
        for name in sorted(scan_names(self.out), key=lambda name: (len(name), name)):
            stem, _, suffix = name.partition(".")
            if not stem or suffix != self.suffix:
                continue
            path = self.root / "records" / f"{stem}.json"
            try:
                yield name, json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(
                    f"{path} is damaged. Delete it and images/{name}, and repeat the command."
                ) from error

    def _list_metadata(self) -> Iterator[str]:
        for name, record in self._read_records():
            yield json.dumps(self._describe(name, record), ensure_ascii=False) + "\n"

    def _describe(self, name, record) -> dict:
        """Return a line of metadata.jsonl. Columns whose names end in _file_name are images."""
        row = {"file_name": f"images/{name}"}
        if "masks" in self.labels.formats:
            mask = f"{name.partition('.')[0]}.png"
            row |= {"mask_file_name": f"masks/{mask}", "semantic_file_name": f"semantic/{mask}"}
        row |= {key: value for key, value in record.items() if key != "annotations"}
        return row | {"objects": make_objects(record["annotations"], self.labels.kinds)}

    def _list_coco(self) -> Iterator[str]:
        """Yield the parts of coco.json. Annotations come first: they need not be in memory."""
        images, number, comma = [], 0, ""
        yield '{"annotations": ['
        for name, record in self._read_records():
            image_id = record["number"] + 1
            facts = {key: value for key, value in record.items() if key != "annotations"}
            images.append({"id": image_id, "file_name": name} | facts)
            for annotation in record["annotations"]:
                number += 1
                yield comma + json.dumps({"id": number, "image_id": image_id} | annotation)
                comma = ",\n"
        categories = [{"id": i, "name": kind} for i, kind in enumerate(self.labels.kinds, start=1)]
        yield f'],\n"images": {json.dumps(images)},\n"categories": {json.dumps(categories)}}}\n'


class LabelledArrowStore(ArrowStore):
    """A `datasets.Dataset` with the columns of `ArrowStore`, and labels as `em_data.push` has them.

    `objects` also has COCO's bbox, category and area; `mask` and `semantic` are images.
    """

    def __init__(
        self,
        out: Path,
        bits: int,
        pixel_size_nm: float | None,
        labels: LabelFormat,
        name_classes: NameClasses | None = None,
    ):
        super().__init__(out, bits, pixel_size_nm, name_classes)
        self.labels = labels
        self._labels_of: dict[int, tuple[Labels, tuple[int, int]]] = {}

    def encode(self, numbers: Sequence[int], images) -> list[bytes]:
        """Return images [B, 1, H, W] in [-1, 1] as PNG files; keep their labels for the columns."""
        shape = tuple(images.shape[-2:])
        self._labels_of.update((number, (self.labels.take(number), shape)) for number in numbers)
        return super().encode(numbers, images)

    def list_columns(self, shard: range, files: list[bytes]) -> dict[str, tuple[Any, list]]:
        """Return {column: (type, values)} of a shard."""
        import datasets

        columns = super().list_columns(shard, files)
        found = [self._labels_of.pop(number) for number in shard]
        if "masks" in self.labels.formats:
            masks = [draw_instances(labels.defects, shape) for labels, shape in found]
            semantic = [
                draw_semantic_mask(labels.defects, self.labels.kinds, shape)
                for labels, shape in found
            ]
            for name, arrays in (("mask", masks), ("semantic", semantic)):
                images = [{"bytes": encode_png(array), "path": None} for array in arrays]
                columns[name] = (datasets.Image(), images)
        if "coco" in self.labels.formats:
            columns["objects"] = (
                list_object_features(),
                [make_rows_of_objects(*each) for each in found],
            )
        facts = [json.dumps(labels.facts) for labels, _ in found]
        columns["facts"] = (datasets.Value("string"), facts)
        return columns


def make_objects(annotations: Sequence[dict], kinds: Sequence[str]) -> dict[str, list]:
    """Return COCO annotations as the columns that viewers of `datasets` take for boxes.

    Nothing may be null: pyarrow's JSON reader fills lists of nulls with other rows' numbers.
    """
    names = [kinds[each["category_id"] - 1] for each in annotations]
    columns = ("bbox", "area")
    return {key: [each[key] for each in annotations] for key in columns} | {"category": names}


def list_object_features():
    """Return the type of the column `objects`: that of `em_data.push`, and COCO's boxes."""
    from datasets import List, Value

    integers, number, text = List(Value("int32")), Value("float64"), Value("string")
    return List(
        {"kind": text, "box_px": integers, "diameter_nm": number, "length_nm": number}
        | {"runs": integers, "attributes": text}
        | {"bbox": integers, "category": text, "area": Value("int64")}
    )


def make_rows_of_objects(labels: Labels, shape: tuple[int, int]) -> list[dict]:
    """Return the objects of one image for `list_object_features`."""
    rows = []
    for defect in labels.defects:
        annotation = make_annotation(defect, shape)
        mask = None if defect.mask is None else draw_whole_mask(defect, shape)
        rows.append(
            {
                "kind": defect.kind,
                "box_px": list(defect.box_px),
                "diameter_nm": defect.diameter_nm,
                "length_nm": defect.length_nm,
                "runs": None if mask is None else encode_runs(mask),
                "attributes": json.dumps(defect.metadata),
                "bbox": annotation["bbox"],
                "category": defect.kind,
                "area": annotation["area"],
            }
        )
    return rows


def create_labelled_store(
    out: Path,
    format: str,
    bits: int,
    pixel_size_nm: float | None,
    labels: LabelFormat,
    name_classes: NameClasses | None = None,
):
    """Return the store of a format: "png", "tiff" or "arrow".

    Raises:
        ValueError: YOLO's text files are asked for beside a data set of rows.
    """
    if format != "arrow":
        suffix = {"png": "png", "tiff": "tif"}[format]
        return LabelledFileStore(out, suffix, bits, pixel_size_nm, labels, name_classes)
    if "yolo" in labels.formats:
        raise ValueError(
            "--labels yolo needs one file per image, but --format is arrow. Use --format png, or "
            "--labels coco masks, which become columns."
        )
    return LabelledArrowStore(out, bits, pixel_size_nm, labels, name_classes)


def _write_in_parts(path: Path, parts: Iterator[str]) -> None:
    """Write a text that need not fit the memory, under a temporary name first."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)
    flush_to_disk(temporary)
    temporary.replace(path)
    flush_to_disk(path.parent)
