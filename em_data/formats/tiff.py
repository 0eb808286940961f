"""Decode TIFF files."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tifffile

from em_data.formats.base import Refusal, Stored
from em_data.metadata import read_tiff_metadata, square_pixel_size


def decode_tiff(data: bytes) -> Iterator[Stored]:
    """Yield the first image of a TIFF: [H, W] or [H, W, channels]."""
    notices: list[str] = []
    with _collect_warnings(notices), tifffile.TiffFile(io.BytesIO(data)) as tif:
        if not tif.pages:
            raise Refusal("a TIFF without an image. Copy it again.")
        series: Any = tif.series[0]
        page = series.keyframe
        for each in filter(None, series.pages):
            if any(o + n > len(data) for o, n in zip(each.dataoffsets, each.databytecounts)):
                raise Refusal("truncated: the pixel data is cut short. Copy it again.")
        array = np.squeeze(series.asarray())
        axes = series.get_axes(squeeze=True)
        if len(tif.series) > 1:
            notices.append(f"{len(tif.series)} images in one file: the first is used")
        if array.ndim == 3 and page.samplesperpixel == 1:
            raise Refusal(
                f"a stack of {array.shape[0]} frames (axes {axes}). Save each frame to a file."
            )
        if array.ndim == 3 and "S" in axes:
            array = np.moveaxis(array, axes.index("S"), -1)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            array = page.asrgb()
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            array = ~array if array.dtype.kind in "bu" else -array
            notices.append("white was stored as 0: inverted")
        metadata, sizes = read_tiff_metadata(tif, page)
    metadata["notices"] = notices
    yield Stored(array, metadata, square_pixel_size(sizes, notices))


@contextmanager
def _collect_warnings(notices):
    """Append what tifffile logs to `notices` instead of printing it."""

    def collect(record):
        notices.append(f"tifffile: {record.getMessage()}")
        return False  # goes to no handler

    logger = logging.getLogger("tifffile")
    logger.addFilter(collect)
    try:
        yield
    finally:
        logger.removeFilter(collect)
