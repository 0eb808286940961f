"""Decode PNG, JPEG and BMP files."""

import io
import warnings
from collections.abc import Iterator

import imagecodecs
import numpy as np
import PIL.Image

from em_data.formats.base import Refusal, Stored
from em_data.metadata import read_png_metadata, square_pixel_size


def decode_jpeg(data: bytes) -> Iterator[Stored]:
    yield Stored(_decode_with_pil(data), {"format": "JPEG", "notices": []})


def decode_bmp(data: bytes) -> Iterator[Stored]:
    yield Stored(_decode_with_pil(data), {"format": "BMP", "notices": []})


def decode_png(data: bytes) -> Iterator[Stored]:
    depth, metadata, sizes = read_png_metadata(data)
    # PIL cuts 16-bit colour and 16-bit grey with alpha to 8 bits
    array = imagecodecs.png_decode(data) if depth == 16 else _decode_with_pil(data)
    metadata["notices"] = []
    yield Stored(array, metadata, square_pixel_size(sizes, metadata["notices"]))


def _decode_with_pil(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        try:
            image = PIL.Image.open(io.BytesIO(data))
        except PIL.Image.DecompressionBombError:
            most = 2 * PIL.Image.MAX_IMAGE_PIXELS // 10**6
            raise Refusal(
                f"more than {most} million pixels; save it as TIFF or in parts."
            ) from None
    with image:
        if image.mode == "CMYK":
            raise Refusal("a CMYK image, made for printing. Export the micrograph in grey.")
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        return np.array(image)
