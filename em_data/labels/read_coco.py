"""Read labels in COCO's form."""

import json
from pathlib import Path

from em_data.labels.runs import decode_runs
from em_data.micrograph import Defect


def read_labels(folder) -> dict[str, list[dict]] | None:
    """Read labels/coco.json of a folder as {name of the image below images/: its objects}, or None.

    An object has what a `Defect` has, but its mask as `runs` (see `encode_runs`; None if the
    segmentation has another form) and its metadata as `attributes` (JSON).
    """
    path = Path(folder) / "labels" / "coco.json"
    if not path.is_file():
        return None
    coco = json.loads(path.read_text())
    kinds = {each["id"]: each["name"] for each in coco["categories"]}
    names = {each["id"]: each["file_name"] for each in coco["images"]}
    objects = {name: [] for name in names.values()}
    for each in coco["annotations"]:
        x, y, width, height = (round(number) for number in each["bbox"])
        segmentation = each.get("segmentation")
        runs = segmentation.get("counts") if isinstance(segmentation, dict) else None
        objects[names[each["image_id"]]].append(
            {
                "kind": kinds[each["category_id"]],
                "box_px": [x, y, x + width, y + height],
                "diameter_nm": each.get("diameter_nm"),
                "length_nm": each.get("length_nm"),
                "runs": runs if isinstance(runs, list) else None,
                "attributes": json.dumps(each.get("attributes") or {}),
            }
        )
    return objects


def make_defects(objects, instances, shape) -> list[Defect]:
    """Return the defects of objects as `read_labels` gives them, in an image of `shape` (H, W).

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
            mask = mask[box[1] : box[3], box[0] : box[2]]
        sizes = each.get("diameter_nm"), each.get("length_nm")
        metadata = json.loads(each.get("attributes") or "{}")
        defects.append(Defect(each["kind"], box, mask, *sizes, metadata))
    return defects
