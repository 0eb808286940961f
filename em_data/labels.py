"""Labels of defects: written beside images, read back, and drawn."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from em_data.files import write_atomically
from em_data.images import encode_png, write_image
from em_data.intensity import from_uint
from em_data.micrograph import DEFECT_KINDS, Defect

KIND_COLOURS = {
    "loop_111": "#4cc9f0",
    "loop_100": "#ffb703",
    "dot": "#80ed99",
    "line": "#ff5d8f",
    "loop": "#b197fc",
}


def write_labelled(micrographs, folder):
    """Write labelled micrographs into a folder that `load_data` can read.

    - images/SPECIMEN/NAME.png: the pixels, with the pixel size.
    - masks/SPECIMEN/NAME.png: the instance mask, see `draw_instance_mask`.
    - labels/coco.json: all defects, see `make_coco`.
    - labels/contact_sheet.png: the micrographs with boxes.

    Raises:
        ValueError: A micrograph has no labels.
    """
    folder = Path(folder)
    coco = make_coco(micrographs)
    for micrograph, entry in zip(micrographs, coco["images"]):
        write_image(
            from_uint(micrograph.image),
            folder / "images" / entry["file_name"],
            bits=8 * micrograph.image.itemsize,
            pixel_size_nm=micrograph.pixel_size_nm,
        )
        mask = encode_png(draw_instance_mask(micrograph))
        write_atomically(folder / "masks" / entry["file_name"], mask)
    write_atomically(folder / "labels" / "coco.json", json.dumps(coco) + "\n")
    draw_contact_sheet(micrographs).save(folder / "labels" / "contact_sheet.png")


def make_coco(micrographs) -> dict:
    """Return labelled micrographs as a COCO dictionary: images, annotations and categories.

    A segmentation is COCO's uncompressed run lengths, so that overlapping defects stay whole.
    Beyond COCO, images have pixel_size_nm and specimen; annotations have diameter_nm, length_nm
    and, as attributes, the defect's metadata.
    """
    categories = [{"id": i + 1, "name": kind} for i, kind in enumerate(DEFECT_KINDS)]
    coco = {"images": [], "annotations": [], "categories": categories}
    for image_id, micrograph in enumerate(micrographs, start=1):
        if micrograph.defects is None:
            raise ValueError(
                f"{micrograph.name} has no labels. Write only its pixels, with em_data.write_image."
            )
        height, width = micrograph.image.shape
        file_name = Path(micrograph.specimen or "") / f"{Path(micrograph.name).stem}.png"
        coco["images"].append(
            {
                "id": image_id,
                "file_name": file_name.as_posix(),
                "width": width,
                "height": height,
                "pixel_size_nm": micrograph.pixel_size_nm,
                "specimen": micrograph.specimen,
            }
        )
        for defect in micrograph.defects:
            x0, y0, x1, y1 = defect.box_px
            mask = _whole_mask(defect, (height, width))
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": DEFECT_KINDS.index(defect.kind) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": encode_runs(mask)},
                    "diameter_nm": defect.diameter_nm,
                    "length_nm": defect.length_nm,
                    "attributes": defect.metadata,
                }
            )
    return coco


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


def encode_runs(mask) -> list[int]:
    """Return the run lengths of a bool mask [H, W], column by column, starting with False."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return ([0] if flat[0] else []) + counts.tolist()


def decode_runs(counts, shape) -> np.ndarray:
    """Return the bool mask [H, W] of run lengths; the inverse of `encode_runs`."""
    if sum(counts) != shape[0] * shape[1]:
        raise ValueError(
            f"run lengths of {sum(counts)} pixels, but the image has {shape[0]} x {shape[1]}"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(shape, order="F")


def draw_instance_mask(micrograph) -> np.ndarray:
    """Return uint16 [H, W]: 0 for the matrix, k for the k-th defect. Later defects lie on top."""
    if len(micrograph.defects) >= 2**16:
        raise ValueError(
            f"{micrograph.name} has {len(micrograph.defects)} defects, but an instance mask holds "
            "at most 65,535."
        )
    instances = np.zeros(micrograph.image.shape, dtype=np.uint16)
    for k, defect in enumerate(micrograph.defects, start=1):
        instances[_whole_mask(defect, instances.shape)] = k
    return instances


def draw_contact_sheet(micrographs, max_side=2400) -> PIL.Image.Image:
    """Draw micrographs with boxes in the colours of the kinds, at most `max_side` pixels a side."""
    num_columns = int(np.ceil(np.sqrt(len(micrographs))))
    num_rows = -(-len(micrographs) // num_columns)
    height, width = np.max([micrograph.image.shape for micrograph in micrographs], axis=0).tolist()
    scale = min(1.0, max_side / (num_columns * width), max_side / (num_rows * height))
    height, width = max(1, int(height * scale)), max(1, int(width * scale))
    sheet = PIL.Image.new("RGB", (num_columns * width, num_rows * height), "white")
    for i, micrograph in enumerate(micrographs):
        pixels = micrograph.image
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        size = [max(1, int(side * scale)) for side in pixels.shape[::-1]]
        picture = PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BOX).convert("RGB")
        draw = PIL.ImageDraw.Draw(picture)
        for defect in micrograph.defects:
            x0, y0, x1, y1 = (edge * scale for edge in defect.box_px)
            box = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
            draw.rectangle(box, outline=KIND_COLOURS[defect.kind])
        sheet.paste(picture, (i % num_columns * width, i // num_columns * height))
    return sheet


def _whole_mask(defect, shape):
    """Return the mask of a defect as bool [H, W] of the micrograph; its box if it has no mask."""
    x0, y0, x1, y1 = defect.box_px
    if defect.mask is not None and defect.mask.shape == shape and (y1 - y0, x1 - x0) != shape:
        return defect.mask
    whole = np.zeros(shape, dtype=bool)
    whole[y0:y1, x0:x1] = True if defect.mask is None else defect.mask
    return whole
