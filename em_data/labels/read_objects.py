"""Read labels as lists of objects: rows of a data set, or lines of metadata.jsonl."""

import json
import math
from collections.abc import Callable, Mapping

import numpy as np

from em_data.labels.masks import draw_whole_mask
from em_data.labels.placing import Annotation, BadLabels, place, read_sizes
from em_data.labels.read_coco import decode_segmentation, read_polygons
from em_data.labels.runs import decode_runs, encode_runs
from em_data.micrograph import Defect, Micrograph

KIND_KEYS = ("kind", "category", "categories", "label", "labels", "category_id", "class", "name")
BOX_KEYS = ("box_px", "bbox", "bboxes", "boxes")
SHAPE_KEYS = ("segmentation", "segmentations", "polygon", "polygons")


def make_objects(micrograph: Micrograph) -> list[dict]:
    """Return the defects of a micrograph as objects, for a row of a data set.

    An object has what a `Defect` has, but its mask as `runs` of the whole image (see
    `encode_runs`; None without a mask) and its metadata as `attributes` (JSON).
    """
    shape = micrograph.image.shape
    return [
        {
            "kind": each.kind,
            "box_px": list(each.box_px),
            "diameter_nm": each.diameter_nm,
            "length_nm": each.length_nm,
            "runs": None if each.mask is None else encode_runs(draw_whole_mask(each, shape)),
            "attributes": json.dumps(each.metadata),
        }
        for each in micrograph.defects or ()
    ]


def make_defects(objects, instances, shape) -> list[Defect]:
    """Return the defects of objects as of `make_objects`, in an image of `shape` (H, W).

    What lies outside the image, for example where a label bar was cropped, is cut off. Objects
    without runs have their mask in `instances`, uint [H, W], if that is not None.
    """
    height, width = shape
    defects = []
    for k, each in enumerate(objects, start=1):
        x0, y0, x1, y1 = each["box_px"]
        box = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
        if box[0] >= box[2] or box[1] >= box[3]:
            continue
        mask = None if instances is None else instances == k
        if each.get("runs"):
            mask = decode_runs(each["runs"], (sum(each["runs"]) // width, width))
        if mask is not None:
            mask = mask[box[1] : box[3], box[0] : box[2]].copy()
        sizes = each.get("diameter_nm"), each.get("length_nm")
        metadata = json.loads(each.get("attributes") or "{}")
        defects.append(Defect(each["kind"], box, mask, *sizes, metadata))
    return defects


def find_keys(fields) -> tuple[str, str] | None:
    """Return the names of the kind and of the box among the fields of objects, or None."""
    kind = next((key for key in KIND_KEYS if key in fields), None)
    box = next((key for key in BOX_KEYS if key in fields), None)
    return (kind, box) if kind and box else None


def read_objects(objects, micrograph: Micrograph, name_kind: Callable = str) -> list[Defect]:
    """Return the defects of objects of any data set, for example of an imagefolder.

    Args:
        objects: A list of dictionaries, or a dictionary of lists: `bbox` (x, y, width, height in
            pixels) or `box_px` (corners), a kind (`category`, `label` or others of KIND_KEYS) and
            perhaps `segmentation` as COCO has it.
        micrograph: Its notices tell what is dropped or cut off.
        name_kind: Returns the name of a kind.

    Raises:
        BadLabels: The objects cannot be read.
    """
    if isinstance(objects, Mapping):
        lists = objects.values()
        if not all(isinstance(values, list) for values in lists):
            raise BadLabels("its objects are no lists. Write a list of each field, or of objects.")
        if len({len(values) for values in lists}) > 1:
            raise BadLabels("the lists of its objects have different lengths. Correct them.")
        objects = [dict(zip(objects, values)) for values in zip(*lists)]
    if not (isinstance(objects, list) and all(isinstance(each, Mapping) for each in objects)):
        raise BadLabels("its objects are no list of objects. Write one of each bbox and category.")
    return place([_convert(i, each, name_kind) for i, each in enumerate(objects, 1)], micrograph)


def _convert(i, each, name_kind) -> Annotation:
    where, keys = f"object {i}", find_keys(each)
    if keys is None:
        raise BadLabels(f"{where} needs a bbox and a category, but has {', '.join(each)}.")
    kind, box = each[keys[0]], each[keys[1]]
    if kind is None or (isinstance(kind, float) and math.isnan(kind)):
        raise BadLabels(f"{where} has no kind. Give it a {keys[0]}.")
    name = name_kind(kind).strip()
    if not name or not name.isprintable():
        raise BadLabels(f"{where} has the kind {name!r}, which is no name. Give it one.")
    annotation = Annotation(name, where)
    annotation.sizes_nm = read_sizes(each, where)
    shape = next((each[key] for key in SHAPE_KEYS if each.get(key)), None)
    try:
        if isinstance(shape, Mapping):
            annotation.take_mask(decode_segmentation(shape))
        elif shape:
            annotation.polygons = read_polygons(shape)
        if box is not None and len(box):
            a, b, c, d = (float(number) for number in np.asarray(box).tolist())
            annotation.box = (a, b, c, d) if keys[1] == "box_px" else (a, b, a + c, b + d)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, BadLabels):
            raise
        raise BadLabels(f"{where} has no readable box ({str(error)[:80]}). Correct it.") from error
    return annotation
