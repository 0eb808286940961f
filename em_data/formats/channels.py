"""Which images of a TIFF are channels, such as detectors, and which are frames of a stack."""

import json
import math
import re
from contextlib import suppress

import numpy as np
import tifffile

from em_data.formats.base import MAX_PAGES

MOST_UNNAMED = 4  # channels without any other axis that need no further sign to be channels


def find_planes(tif, numbers: list[int], notices: list[str]) -> list[tuple[int | None, int]]:
    """Return (channel from 1, frame from 0) of each image; the channel is None without channels.

    ImageJ, OME and tifffile's own header tell the axes of a file.

    Args:
        tif: An open `tifffile.TiffFile`.
        numbers: Of the images' pages; or 0, 1, 2, ... of images that lie in one page.
        notices: List of sentences, appended to.
    """
    frames: list[tuple[int | None, int]] = [(None, i) for i in range(len(numbers))]
    with suppress(Exception):  # a damaged header tells nothing
        axes, shape, pages, is_sure = _read_axes(tif)
        channels = shape[axes.index("C")]
        if channels < 2 or len(set(numbers)) < len(numbers) or math.prod(shape) > MAX_PAGES:
            return frames
        if not is_sure and math.prod(shape) == channels > MOST_UNNAMED:
            notices.append(
                f"the header tells {channels} channels and no frames, as programs do that do not "
                "know the axes: read as frames"
            )
            return frames
        order = {page: i for i, page in enumerate(pages or range(math.prod(shape)))}
        index = np.unravel_index([order[each] for each in numbers], shape)
        others = [axis for axis, name in enumerate(axes) if name != "C"]
        frame = np.zeros(len(numbers), int)
        for axis in others:
            frame = frame * shape[axis] + index[axis]
        frames = list(zip((index[axes.index("C")] + 1).tolist(), frame.tolist()))
        notices.append(
            f"{channels} channels, named #C1 to #C{channels}: each is a micrograph; to train on "
            "one of them, save it as a file of its own"
        )
    return frames


def _read_axes(tif):
    """Return (axes, lengths, pages in this order or None, if channels are sure) without Y, X and S.

    An empty tuple if no header tells of channels.
    """
    if tif.is_imagej:
        header = tif.imagej_metadata or {}
        order = str(header.get("order", "czt")).upper()
        axes = order[::-1] if sorted(order) == ["C", "T", "Z"] else "TZC"
        lengths = {"C": "channels", "Z": "slices", "T": "frames"}
        shape = [max(1, int(header.get(lengths[axis], 1))) for axis in axes]
        return axes, shape, None, header.get("mode") in ("composite", "color")
    if tif.is_ome:
        return _read_ome_axes(tif.ome_metadata)
    header = json.loads(tif.pages.first.shaped_description or "{}")
    axes, shape = header.get("axes", ""), header.get("shape", [])
    kept = [i for i, axis in enumerate(axes) if axis not in "YXS"]
    if "C" not in axes or len(axes) != len(shape):
        return ()
    return "".join(axes[i] for i in kept), [int(shape[i]) for i in kept], None, True


def _read_ome_axes(text):
    """Return the same of a header of OME: order of the axes, and page of each plane."""
    root = tifffile.xml2dict(text)["OME"]
    files = re.findall(r"<UUID[^>]*>([^<]*)</UUID>", text)
    pixels = root["Image"]["Pixels"]  # of one image
    channels = _as_list(pixels.get("Channel", []))
    if any(each != root.get("UUID") for each in files) or any(
        each.get("SamplesPerPixel", 1) > 1 for each in channels
    ):
        return ()  # planes in other files, or colours
    axes = pixels["DimensionOrder"][:1:-1]  # XYCZT: the channel changes first
    shape = [int(pixels[f"Size{axis}"]) for axis in axes]
    pages = [-1] * min(math.prod(shape), MAX_PAGES)
    for each in _as_list(pixels["TiffData"]):
        each = each or {}
        first = [int(each.get(f"First{axis}", 0)) for axis in axes]
        start, page = int(np.ravel_multi_index(first, shape)), int(each.get("IFD", 0))
        num = int(each.get("PlaneCount", 1 if "IFD" in each else len(pages)))
        num = min(num, len(pages) - start)
        pages[start : start + num] = range(page, page + num)
    return axes, shape, pages, any("Name" in each for each in channels)


def _as_list(value):
    return value if isinstance(value, list) else [value]
