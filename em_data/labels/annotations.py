"""The labels of one image in the forms that tools read: COCO annotations, YOLO lines, masks."""

import json
from collections.abc import Sequence

import numpy as np

from em_data.labels.masks import crop_mask, draw_whole_mask
from em_data.labels.outlines import join_outlines, trace_outlines
from em_data.labels.runs import encode_runs
from em_data.micrograph import Defect

Shape = tuple[int, int]  # (H, W) of the image


def make_annotation(
    defect: Defect, shape: Shape, *, with_polygons: bool = True, **ids: int
) -> dict:
    """Return a defect as a COCO annotation; ids are `id`, `image_id` and `category_id`.

    The segmentation is a polygon along the edges of pixels if the mask is one piece without a hole,
    else uncompressed run lengths, else (only a box is labelled) empty. Without `with_polygons`, all
    masks are run lengths.
    """
    x0, y0, x1, y1 = defect.box_px
    mask = crop_mask(defect, shape)
    area = (x1 - x0) * (y1 - y0)
    segmentation: list | dict = []
    if mask is not None:
        area = int(mask.sum())
        outlines = trace_outlines(mask, (x0, y0)) if with_polygons else []
        if len(outlines) == 1:
            segmentation = [[number for point in outlines[0] for number in point]]
        else:
            runs = encode_runs(draw_whole_mask(defect, shape))
            segmentation = {"size": list(shape), "counts": runs}
    return {
        **ids,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": area,
        "iscrowd": 0,
        "segmentation": segmentation,
        "diameter_nm": defect.diameter_nm,
        "length_nm": defect.length_nm,
        "attributes": defect.metadata,
    }


def make_yolo_lines(defects: Sequence[Defect], kinds: Sequence[str], shape: Shape) -> str:
    """Return the text file of an image in YOLO's segment format; empty without a defect.

    A line is the number of the kind and a polygon in fractions of width and height. Bridges without
    width join the pieces of a mask. Boxes are lines of centre and size, or rectangles in a file
    that has polygons, too: readers take a file's lines for one or the other.
    """
    height, width = shape
    has_masks = any(defect.mask is not None for defect in defects)
    lines = []
    for defect in defects:
        x0, y0, x1, y1 = defect.box_px
        mask = crop_mask(defect, shape)
        points: Sequence[tuple[float, float]]
        if mask is not None:
            points = join_outlines(trace_outlines(mask, (x0, y0)))
        elif has_masks:
            points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        else:
            points = [((x0 + x1) / 2, (y0 + y1) / 2), (x1 - x0, y1 - y0)]
        numbers = (f"{x / width:.7g} {y / height:.7g}" for x, y in points)
        lines.append(f"{kinds.index(defect.kind)} {' '.join(numbers)}\n")
    return "".join(lines)


def make_yolo_index(kinds: Sequence[str], pixel_size_nm: float | None) -> str:
    """Return the data.yaml beside images/ and labels/. A kind's name may be any text."""
    names = "".join(f"  {i}: {json.dumps(k, ensure_ascii=False)}\n" for i, k in enumerate(kinds))
    size = "" if pixel_size_nm is None else f"pixel_size_nm: {pixel_size_nm}\n"
    return f"train: images\nval: images\n{size}names:\n{names}"


def draw_semantic_mask(defects: Sequence[Defect], kinds: Sequence[str], shape: Shape) -> np.ndarray:
    """Return [H, W]: 0 for the matrix, 1 + number of the kind for its defects.

    uint8, or uint16 for more than 255 kinds. Later defects lie on top.
    """
    semantic = np.zeros(shape, np.uint8 if len(kinds) < 2**8 else np.uint16)
    for defect in defects:
        semantic[draw_whole_mask(defect, shape)] = kinds.index(defect.kind) + 1
    return semantic
