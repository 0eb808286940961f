"""Write labelled micrographs: images, COCO labels, instance masks and a contact sheet."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from em_data.files import write_atomically
from em_data.images import encode_png, write_image
from em_data.intensity import from_uint
from em_data.labels.annotations import make_annotation
from em_data.labels.colours import choose_colours
from em_data.labels.masks import draw_instance_mask
from em_data.micrograph import DEFECT_KINDS


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

    A segmentation is COCO's uncompressed run lengths, and empty where only a box is labelled.
    Beyond COCO, images have pixel_size_nm, specimen and class_name; annotations have diameter_nm,
    length_nm and, as attributes, the defect's metadata.
    """
    found = {each.kind for micrograph in micrographs for each in micrograph.defects or ()}
    kinds = [*DEFECT_KINDS, *sorted(found - set(DEFECT_KINDS))]
    categories = [{"id": i + 1, "name": kind} for i, kind in enumerate(kinds)]
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
                "class_name": micrograph.class_name,
            }
        )
        for defect in micrograph.defects:
            ids = {
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": kinds.index(defect.kind) + 1,
            }
            shape = (height, width)
            coco["annotations"].append(make_annotation(defect, shape, with_polygons=False, **ids))
    return coco


def draw_contact_sheet(micrographs, max_side=2400) -> PIL.Image.Image:
    """Draw micrographs with boxes in the colours of the kinds, at most `max_side` pixels a side."""
    num_columns = int(np.ceil(np.sqrt(len(micrographs))))
    num_rows = -(-len(micrographs) // num_columns)
    height, width = np.max([micrograph.image.shape for micrograph in micrographs], axis=0).tolist()
    colours = choose_colours(each.kind for m in micrographs for each in m.defects)
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
            draw.rectangle(box, outline=colours[defect.kind])
        sheet.paste(picture, (i % num_columns * width, i // num_columns * height))
    return sheet
