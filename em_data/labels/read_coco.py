"""Read labels in COCO's form: polygons, run lengths of both forms, or boxes."""

import json
import mmap
from collections import Counter, defaultdict
from collections.abc import Hashable
from pathlib import Path

import numpy as np

from em_data.labels.label_set import LabelSet, say_unmatched
from em_data.labels.matching import ImageIndex
from em_data.labels.placing import Annotation, BadLabels, place, read_sizes
from em_data.labels.runs import decode_runs
from em_data.micrograph import Micrograph

MAX_BYTES = 2**30  # of a file; parsed, it takes about ten times as much memory
KEYS = (b'"images"', b'"annotations"')


def find_coco(folder: Path, files: list[Path], index: ImageIndex) -> list[LabelSet]:
    """Return the labels of each COCO file among `files`, relative to `folder`.

    Raises:
        ValueError: A file with COCO's keys cannot be read. The message says how to go on.
    """
    sets = []
    for file in files:
        if file.suffix.lower() == ".json" and _has_keys(folder / file):
            sets.append(CocoFile(folder, file, index).make_set())
    return sets


def _has_keys(path):
    try:
        if path.stat().st_size == 0:
            return False
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return all(data.find(key) >= 0 for key in KEYS)
    except OSError:
        return False


class CocoFile:
    """The labels of one COCO file, by image."""

    def __init__(self, folder: Path, file: Path, index: ImageIndex):
        self.file, self.name, self.notes = file, file.as_posix(), []
        coco = self._parse(folder / file)
        try:
            self.kinds = self._read_categories(coco.get("categories") or [])
            images = {each["id"]: each for each in coco["images"]}
            names = {key: str(each["file_name"]) for key, each in images.items()}
            self.by_image = defaultdict(list)
            for each in coco["annotations"]:
                self.by_image[each["image_id"]].append(each)
        except (KeyError, TypeError, AttributeError) as error:
            raise self._refuse(
                f"it is not in COCO's form ({error!r} is missing or wrong)"
            ) from error
        if len(images) < len(coco["images"]):
            raise self._refuse(f"image ids occur twice: {_list_twice(coco['images'])}")
        if twice := _list_twice(coco["annotations"]):
            self.notes.append(f"{self.name}: annotation ids occur twice, all are used: {twice}")
        self.images = self._match(images, names, index)
        unknown = sorted({str(key) for key in self.by_image if key not in images})
        num = sum(len(v) for key, v in self.by_image.items() if key not in images)
        if num:
            self.notes.append(
                f"{self.name}: {num} annotations of images that it does not list are not used: "
                f"image_id {', '.join(unknown[:5])}"
            )

    def _refuse(self, reason):
        return ValueError(
            f"{self.name}: {reason}. Correct or export it again, or leave its labels out with "
            "--tiles.labels none."
        )

    def _parse(self, path):
        if path.stat().st_size > MAX_BYTES:
            raise self._refuse(
                f"{path.stat().st_size / 2**30:.1f} GB, more than the {MAX_BYTES / 2**30:.3g} GB "
                "that are read; split it by images"
            )
        try:
            coco = json.loads(path.read_bytes())
        except (ValueError, OSError, RecursionError) as error:
            raise self._refuse(f"it cannot be read ({str(error)[:80]})") from error
        if not isinstance(coco, dict):
            raise self._refuse("it is a list, not COCO's dictionary")
        return coco

    def _read_categories(self, categories):
        kinds = {}
        for each in categories:
            name = str(each["name"]).strip()
            if not name or not name.isprintable():
                raise self._refuse(f"category {each['id']} has the name {each['name']!r}")
            if kinds.setdefault(each["id"], name) != name:
                raise self._refuse(f"category {each['id']} is named {kinds[each['id']]} and {name}")
        return kinds

    def _match(self, images, names, index):
        """Return {path of an image: its entry in the file}; say what does not match."""
        found, missing, unclear = {}, [], []
        for key, name in names.items():
            paths = index.find(name, self.file)
            if len(paths) == 1 and paths[0] in found:
                raise self._refuse(f"{name} has two entries among the images")
            if len(paths) == 1:
                found[paths[0]] = images[key]
            else:
                (unclear if paths else missing).append(name)
        self.notes += say_unmatched(f"images of {self.name} are not in the folder", missing)
        self.notes += say_unmatched(
            f"images of {self.name} fit several files by their name and are not used", unclear
        )
        return found

    def make_set(self) -> LabelSet:
        """Return the labels as one of the sets of a folder."""
        files = {path: [self.file] for path in self.images}
        return LabelSet(self.name, "COCO", files, self.read, self.notes)

    def read(self, path: Path, micrograph: Micrograph):
        """Return the defects of an image."""
        image = self.images[path]
        stated = image.get("height"), image.get("width")
        shape = None if None in stated else stated
        annotations = [self._convert(each) for each in self.by_image[image["id"]]]
        num_crowds = sum(bool(each.get("iscrowd")) for each in self.by_image[image["id"]])
        defects = place(annotations, micrograph, shape)
        if num_crowds:
            micrograph.metadata["notices"].append(
                f"{num_crowds} labels are crowds (iscrowd): each is used as one defect"
            )
        return defects

    def _convert(self, each) -> Annotation:
        where = f"annotation {each.get('id')}"
        category, attributes = each.get("category_id"), each.get("attributes")
        kind = self.kinds.get(category) if isinstance(category, Hashable) else None
        if kind is None:
            raise BadLabels(
                f"{where} has the category {category}, which {self.name} does not name. Add it to "
                "its categories."
            )
        if attributes is not None and not isinstance(attributes, dict):
            attributes = {"attributes": attributes}
        annotation = Annotation(kind, where, metadata=dict(attributes or {}))
        annotation.sizes_nm = read_sizes(each, where)
        try:
            if each.get("bbox"):
                x, y, width, height = (float(number) for number in each["bbox"])
                annotation.box = x, y, x + width, y + height
            segmentation = each.get("segmentation")
            if isinstance(segmentation, dict):
                annotation.take_mask(decode_segmentation(segmentation))
            elif segmentation:
                annotation.polygons = read_polygons(segmentation)
        except BadLabels as error:
            raise BadLabels(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadLabels(
                f"{where} has no readable box or segmentation ({str(error)[:80]}). Correct it."
            ) from error
        return annotation


def read_polygons(segmentation) -> list[np.ndarray]:
    """Return polygons as float [n, 2], of lists of numbers x, y, x, y or of one such list."""
    if not isinstance(segmentation[0], list | tuple):
        segmentation = [segmentation]
    polygons = []
    for each in segmentation:
        if len(each) % 2:
            raise BadLabels(f"a polygon of {len(each)} numbers, which are no pairs. Correct it.")
        polygons.append(np.array(each, np.float64).reshape(-1, 2))
    return polygons


def decode_segmentation(segmentation) -> np.ndarray:
    """Return the mask, bool [H, W], of COCO's run lengths: a list of them, or a string.

    Raises:
        BadLabels: The run lengths do not fill the size.
    """
    height, width = (int(side) for side in segmentation["size"])
    counts = segmentation["counts"]
    if isinstance(counts, str):
        return _decode_compressed(counts, (height, width))
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise BadLabels(
            f"run lengths of {sum(counts)} pixels, but the size has {height} x {width}. Export the "
            "labels again."
        )
    return decode_runs(counts, (height, width))


def _decode_compressed(text, shape):
    """Return the mask of COCO's compressed run lengths, a string."""
    from faster_coco_eval.core import mask

    try:
        return mask.decode({"size": list(shape), "counts": text}).astype(bool)
    except ValueError as error:
        raise BadLabels(
            f"its compressed run lengths do not fit {shape[0]} x {shape[1]} pixels. Export the "
            "labels again."
        ) from error


def _list_twice(items):
    counts = Counter(str(each["id"]) for each in items if each.get("id") is not None)
    return ", ".join(key for key, num in counts.items() if num > 1)[:80]
