"""Labelled micrographs -> files: images, instance masks, COCO labels, and a picture of all with boxes drawn."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from em_data.images import write_image
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
    """Write labelled micrographs below a folder that load_data can read back.

    images/SPECIMEN/NAME.png: the pixels, with the pixel size. masks/SPECIMEN/NAME.png: uint16, 0 the matrix, k the k-th
    defect of the micrograph, later ones above earlier ones. labels/coco.json: every defect whole, as `make_coco` says.
    labels/contact_sheet.png: the micrographs with the boxes drawn. ValueError for a micrograph without labels.
    """
    folder = Path(folder)
    coco = make_coco(micrographs)
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    for micrograph, entry in zip(micrographs, coco["images"]):
        for part in ("images", "masks"):
            (folder / part / entry["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        image = from_uint(micrograph.image).numpy()
        bits = 8 * micrograph.image.itemsize
        write_image(
            image,
            folder / "images" / entry["file_name"],
            bits=bits,
            pixel_size_nm=micrograph.pixel_size_nm,
        )
        PIL.Image.fromarray(draw_instance_mask(micrograph)).save(
            folder / "masks" / entry["file_name"]
        )
    (folder / "labels" / "coco.json").write_text(json.dumps(coco) + "\n")
    draw_contact_sheet(micrographs).save(folder / "labels" / "contact_sheet.png")


def make_coco(micrographs):
    """COCO dictionary of labelled micrographs: images, annotations and categories.

    A segmentation is COCO's uncompressed run lengths, column by column, so that defects that overlap stay whole. Images
    also have pixel_size_nm and specimen; annotations diameter_nm or length_nm, and the defect's metadata as attributes.
    """
    coco = {"images": [], "annotations": [], "categories": []}
    coco["categories"] = [{"id": i + 1, "name": kind} for i, kind in enumerate(DEFECT_KINDS)]
    for image_id, micrograph in enumerate(micrographs, start=1):
        if micrograph.defects is None:
            raise ValueError(
                f"{micrograph.name} has no labels; write its pixels alone with em_data.write_image"
            )
        height, width = micrograph.image.shape
        coco["images"].append(
            {
                "id": image_id,
                "file_name": "/".join(
                    filter(None, (micrograph.specimen, Path(micrograph.name).stem + ".png"))
                ),
                "width": width,
                "height": height,
                "pixel_size_nm": micrograph.pixel_size_nm,
                "specimen": micrograph.specimen,
            }
        )
        for defect in micrograph.defects:
            x0, y0, x1, y1 = defect.box_px
            mask = _whole_mask(defect, micrograph.image.shape)
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


def encode_runs(mask):
    """Lengths of the runs of a bool mask [H, W], column by column, the first run being of False (it may be 0)."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return ([0] if flat[0] else []) + counts.tolist()


def decode_runs(counts, shape):
    """The bool mask [H, W] of run lengths as `encode_runs` makes them; `ValueError` if they do not cover it."""
    if sum(counts) != shape[0] * shape[1]:
        raise ValueError(
            f"run lengths of {sum(counts)} pixels, but an image of {shape[0]} x {shape[1]}"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(shape, order="F")


def make_defects(objects, instances, shape):
    """Return the Defects of a data set's row for its image of `shape` (H, W).

    objects: dicts with kind, box_px (x0, y0, x1, y1; the last two exclusive) and, where known, diameter_nm, length_nm, runs (as
    `encode_runs`, of the whole image) and attributes (JSON). instances: uint [H, W], k where the k-th object is uppermost, or None.
    A mask is that of the runs; without them, what `instances` shows of the object. What lies below the image, where a label
    bar was cropped, is cut off.
    """
    height, width = shape
    defects = []
    for k, each in enumerate(objects, start=1):
        x0, y0, x1, y1 = each["box_px"]
        box = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
        if box[0] >= box[2] or box[1] >= box[3]:
            continue
        whole = None
        if each.get("runs"):
            whole = decode_runs(each["runs"], (sum(each["runs"]) // width, width))
        elif instances is not None:
            whole = instances == k
        mask = None if whole is None else whole[box[1] : box[3], box[0] : box[2]]
        metadata = json.loads(each.get("attributes") or "{}")
        defects.append(
            Defect(
                each["kind"], box, mask, each.get("diameter_nm"), each.get("length_nm"), metadata
            )
        )
    return defects


def draw_instance_mask(micrograph):
    """uint16 [H, W]: 0 the matrix, k the k-th defect; later defects lie above earlier ones."""
    if len(micrograph.defects) >= 2**16:
        raise ValueError(
            f"{micrograph.name} has {len(micrograph.defects)} defects; an instance mask holds 65,535"
        )
    instances = np.zeros(micrograph.image.shape, dtype=np.uint16)
    for k, defect in enumerate(micrograph.defects, start=1):
        instances[_whole_mask(defect, instances.shape)] = k
    return instances


def draw_contact_sheet(micrographs, max_side=2400):
    """RGB picture of the micrographs side by side, each defect in a box of its kind's colour; no side above `max_side`."""
    num_columns = int(np.ceil(np.sqrt(len(micrographs))))
    num_rows = -(-len(micrographs) // num_columns)
    height, width = np.max([micrograph.image.shape for micrograph in micrographs], axis=0).tolist()
    scale = min(1.0, max_side / (num_columns * width), max_side / (num_rows * height))
    height, width = max(1, int(height * scale)), max(1, int(width * scale))
    sheet = PIL.Image.new("RGB", (num_columns * width, num_rows * height), "white")
    for i, micrograph in enumerate(micrographs):
        pixels = (
            micrograph.image
            if micrograph.image.dtype == np.uint8
            else (micrograph.image >> 8).astype(np.uint8)
        )
        size = [max(1, int(side * scale)) for side in pixels.shape[::-1]]
        picture = PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BOX).convert("RGB")
        draw = PIL.ImageDraw.Draw(picture)
        for defect in micrograph.defects:
            x0, y0, x1, y1 = (edge * scale for edge in defect.box_px)
            draw.rectangle(
                (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=KIND_COLOURS[defect.kind]
            )
        sheet.paste(picture, (i % num_columns * width, i // num_columns * height))
    return sheet


def _whole_mask(defect, shape):
    """The defect's mask as bool [H, W] of the micrograph; its box where it has no mask."""
    x0, y0, x1, y1 = defect.box_px
    if defect.mask is not None and defect.mask.shape == shape and (y1 - y0, x1 - x0) != shape:
        return defect.mask
    whole = np.zeros(shape, dtype=bool)
    whole[y0:y1, x0:x1] = True if defect.mask is None else defect.mask
    return whole
