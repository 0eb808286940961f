"""Grids of grey images with a scale bar, for pages that refer to nothing outside themselves."""

import base64
import math
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from em_data.files import write_atomically
from em_data.images import Array, encode_png, save_image_grid

GAP_PX = 1  # between the images of a grid
LEAST_PX = 512  # width of a grid whose label can be read


def make_figure(picture: dict, pixel_size_nm, num_columns=4) -> dict:
    """Return a picture's grid as a data URI, with a scale bar if the pixel size is known."""
    levels = picture["levels"]  # uint8 [N, H, W]
    num, height, width = levels.shape
    num_columns = min(num, num_columns)
    num_rows = math.ceil(num / num_columns)
    step_y, step_x = height + GAP_PX, width + GAP_PX
    shape = (num_rows * step_y - GAP_PX, num_columns * step_x - GAP_PX, 2)
    grid = np.zeros(shape, np.uint8)  # grey and alpha: the gaps are transparent
    for i, image in enumerate(levels):
        top, left = (i // num_columns) * step_y, (i % num_columns) * step_x
        grid[top : top + height, left : left + width, 0] = image
        grid[top : top + height, left : left + width, 1] = 255
    title, caption = picture["title"], picture["caption"]
    return {
        **{key: picture[key] for key in ("key", "title", "caption")},
        "uri": make_data_uri(grid),
        "width": grid.shape[1],
        "height": grid.shape[0],
        "alt": f"{num} images of {height} by {width} pixels: {title}, {caption}",
        "scale_bar": make_scale_bar(pixel_size_nm, width, grid.shape[1]),
    }


def make_scale_bar(pixel_size_nm, tile_px, grid_px) -> dict | None:
    """Return a round length near half a tile and its width in percent of the grid.

    None for an unknown pixel size.
    """
    if not pixel_size_nm:
        return None
    longest = pixel_size_nm * tile_px * 0.75
    power = 10.0 ** math.floor(math.log10(longest))
    length_nm = next(factor * power for factor in (5, 2, 1) if factor * power <= longest)
    label = f"{length_nm:g} nm" if length_nm < 1000 else f"{length_nm / 1000:g} µm"
    return {"label": label, "percent": round(100 * length_nm / pixel_size_nm / grid_px, 3)}


def save_grid_with_scale_bar(images: Array, path: str | Path, pixel_size_nm: float | None) -> None:
    """Write images [N, 1, H, W] in [-1, 1] side by side as one 8-bit PNG.

    Below them stands a scale bar of a round length, if the pixel size is known. Small grids are
    enlarged by a whole factor.
    """
    save_image_grid(images, path, min_width=LEAST_PX)
    num, _, _, width = images.shape
    num_columns = math.ceil(math.sqrt(num))
    bar = make_scale_bar(pixel_size_nm, width, num_columns * (width + 2) - 2)
    if bar is None:
        return
    with PIL.Image.open(path) as file:
        grid = file.convert("L")
    unit = max(4, grid.width // 80)  # thickness of the bar
    page = PIL.Image.new("L", (grid.width, grid.height + 6 * unit), 255)
    page.paste(grid)
    width, top = max(1, round(grid.width * bar["percent"] / 100)), grid.height + 2 * unit
    pen = PIL.ImageDraw.Draw(page)
    pen.rectangle((0, top, width - 1, top + 2 * unit - 1), fill=0)
    font = PIL.ImageFont.load_default(size=4 * unit)
    pen.text((width + 2 * unit, top + unit), bar["label"], fill=0, font=font, anchor="lm")
    write_atomically(path, encode_png(np.asarray(page)))


def make_data_uri(pixels: np.ndarray) -> str:
    """Return pixels, uint8 [H, W] or [H, W, channels], as a data URI with a PNG."""
    png = encode_png(pixels, optimize=True)
    return "data:image/png;base64," + base64.b64encode(png).decode()
