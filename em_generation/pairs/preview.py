"""The first images of a labelled folder, beside themselves with the outlines of their defects."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from em_data import to_uint8
from em_data.figures import make_scale_bar
from em_data.files import write_atomically
from em_data.image_folders import read_image_folder
from em_data.labels import decode_runs
from em_data.labels.colours import choose_colours
from em_data.labels.outlines import trace_outlines

NUM_PAIRS, COLUMNS = 8, 2
PICTURE_PX = 320  # an image is enlarged or reduced to about this side
GAP, LEGEND_PX, FONT_PX = 12, 56, 16

Outline = tuple[str, list[Any]]  # kind, and the corners (x, y) of a polygon


def write_pairs_preview(out: Path) -> Path:
    """Write the first pairs of a folder as OUT-preview.png, beside the folder.

    Each image stands beside itself with the outlines of its defects in the colours of their kinds.
    Below them are the colours' names, and a scale bar if the pixel size is known.
    """
    out = Path(out).resolve()
    pairs, pixel_size_nm = read_pairs(out)
    colours = choose_colours(kind for _, outlines in pairs for kind, _ in outlines)
    height, width = pairs[0][0].shape
    scale = PICTURE_PX / max(height, width)
    scale = max(1, int(scale)) if scale >= 1 else scale
    size = (round(width * scale), round(height * scale))
    columns = min(COLUMNS, len(pairs))
    rows, step = math.ceil(len(pairs) / columns), 2 * size[0] + 4 + GAP
    bottom = rows * (size[1] + GAP)
    page = PIL.Image.new("RGB", (columns * step - GAP, bottom + LEGEND_PX), "white")
    for i, (pixels, outlines) in enumerate(pairs):
        left, top = i % columns * step, i // columns * (size[1] + GAP)
        method = PIL.Image.Resampling.NEAREST if scale >= 1 else PIL.Image.Resampling.BOX
        picture = PIL.Image.fromarray(pixels).resize(size, method)
        page.paste(picture, (left, top))
        page.paste(draw_outlines(picture, outlines, scale, colours), (left + size[0] + 4, top))
    _draw_legend(page, colours, bottom, pixel_size_nm, width, size[0])
    path, buffer = out.with_name(f"{out.name}-preview.png"), io.BytesIO()
    page.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
    return path


def draw_outlines(image: PIL.Image.Image, outlines, scale: float, colours) -> PIL.Image.Image:
    """Return an enlarged image in colour, with outlines given in pixels of the original."""
    picture = image.convert("RGB")
    pen = PIL.ImageDraw.Draw(picture)
    for kind, outline in outlines:
        points = [(x * scale, y * scale) for x, y in [*outline, outline[0]]]
        pen.line(points, fill=colours[kind], width=max(1, round(scale / 2.5)), joint="curve")
    return picture


def read_pairs(out: Path) -> tuple[list[tuple[np.ndarray, list[Outline]]], float | None]:
    """Return (uint8 [H, W], outlines) of the first images of a folder, and their pixel size."""
    if (out / "images").is_dir():
        images = read_image_folder(out / "images")
        kinds = json.loads((out / "generation.json").read_text())["settings"]["kinds"]
        records = [out / "records" / f"{Path(name).stem}.json" for name in images.names[:NUM_PAIRS]]
        found = [json.loads(path.read_text())["annotations"] for path in records]
        outlines = [
            [o for each in annotations for o in _list_outlines(each, kinds)]
            for annotations in found
        ]
    else:
        import datasets

        images = read_image_folder(out)
        rows = datasets.load_from_disk(str(out)).select(range(min(NUM_PAIRS, len(images))))
        objects = rows["objects"] if "objects" in rows.column_names else [[]] * len(rows)
        outlines = [[o for each in row for o in _trace(each, images.shape)] for row in objects]
    shown = to_uint8(images.batch(range(len(outlines))))[:, 0]
    return list(zip(shown, outlines)), images.pixel_size_nm


def _list_outlines(annotation, kinds) -> list[Outline]:
    """Return the outlines of a COCO annotation, see `make_annotation`."""
    kind, segmentation = kinds[annotation["category_id"] - 1], annotation["segmentation"]
    if isinstance(segmentation, dict):
        mask = decode_runs(segmentation["counts"], segmentation["size"])
        return [(kind, outline) for outline in trace_outlines(mask)]
    if segmentation:
        return [(kind, np.reshape(each, (-1, 2)).tolist()) for each in segmentation]
    x, y, width, height = annotation["bbox"]
    return [(kind, [[x, y], [x + width, y], [x + width, y + height], [x, y + height]])]


def _trace(row, shape) -> list[Outline]:
    """Return the outlines of a row of the column `objects`."""
    if row["runs"]:
        mask = decode_runs(row["runs"], shape)
        return [(row["kind"], outline) for outline in trace_outlines(mask)]
    return _list_outlines(row | {"category_id": 1, "segmentation": []}, [row["kind"]])


def _draw_legend(page, colours, top, pixel_size_nm, width_px, shown_px) -> None:
    """Draw a scale bar and the colours of the kinds below the pairs."""
    pen, font = PIL.ImageDraw.Draw(page), PIL.ImageFont.load_default(size=FONT_PX)
    left, middle = 0, top + LEGEND_PX // 2
    bar = make_scale_bar(pixel_size_nm, width_px, width_px)
    if bar is not None:
        length = round(shown_px * bar["percent"] / 100)
        pen.rectangle((0, middle - 4, length, middle + 3), fill="black")
        pen.text((length + 10, middle), bar["label"], fill="black", font=font, anchor="lm")
        left = length + 30 + round(pen.textlength(bar["label"], font=font))
    for kind, colour in colours.items():
        pen.rectangle((left, middle - 7, left + 14, middle + 7), fill=colour)
        text = kind if len(kind) <= 24 else kind[:23] + "…"
        pen.text((left + 22, middle), text, fill="black", font=font, anchor="lm")
        left += 44 + round(pen.textlength(text, font=font))
