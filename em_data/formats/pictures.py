"""Decode PNG, JPEG and BMP files."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator

import imagecodecs
import numpy as np
import PIL.Image

from em_data.formats.base import Refusal, Stored, check_size
from em_data.formats.colour import look_up, palette_to_grey
from em_data.formats.jpeg_check import CUT, refuse_cut_jpeg
from em_data.metadata import read_png_metadata, square_pixel_size

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
PASSES = (  # of interlaced PNG: first column, first row, steps of both
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
ORIENTATION = 274  # EXIF's tag


def decode_jpeg(data: bytes) -> Iterator[Stored]:
    stored = _decode_with_pil(data, "JPEG")
    refuse_cut_jpeg(data, stored.array, lambda each: _decode_with_pil(each, "JPEG").array)
    stored.is_lossy = True
    yield stored


def decode_bmp(data: bytes) -> Iterator[Stored]:
    yield _decode_with_pil(data, "BMP")


def decode_png(data: bytes) -> Iterator[Stored]:
    if len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        check_size(height, width)
    depth, metadata, sizes = read_png_metadata(data)
    colour = data[25]
    if depth >= 8 and colour != 3:
        with _open(data) as image:
            orientation = find_orientation(image)
            has_transparent_level = "transparency" in image.info
            num_frames = getattr(image, "n_frames", 1)
        # PIL cuts 16-bit colour and 16-bit grey with alpha to 8 bits
        array = imagecodecs.png_decode(data)
        array = array[..., :-1] if has_transparent_level else array
        stored = Stored(array, {"notices": []}, orientation=orientation)
        _note_frames(num_frames, stored)
    else:
        _check_png_rows(data)
        stored = _decode_with_pil(data, "PNG")
    stored.metadata = metadata | stored.metadata
    stored.pixel_size_nm = square_pixel_size(sizes, stored.metadata["notices"])
    yield stored


def _open(data):
    """Open an image with PIL, which refuses large ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        try:
            return PIL.Image.open(io.BytesIO(data))
        except PIL.Image.DecompressionBombError:
            most = 2 * PIL.Image.MAX_IMAGE_PIXELS // 10**6
            raise Refusal(
                f"more than {most} million pixels; save it as TIFF or in parts."
            ) from None


def _decode_with_pil(data, kind):
    with _open(data) as image:
        if image.mode == "CMYK":
            raise Refusal("a CMYK image, made for printing. Export the micrograph in grey.")
        stored = Stored(np.empty(0), {"format": kind, "notices": []})
        stored.orientation = find_orientation(image)
        _note_frames(getattr(image, "n_frames", 1), stored)
        if image.mode == "P":
            stored.array, stored.overlay = _decode_palette(image)
        else:
            stored.array = np.array(image.convert("L") if image.mode == "1" else image)
    return stored


def _decode_palette(image):
    """Return what `palette_to_grey` returns for a PIL image of mode P."""
    indices = np.array(image)
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    alpha = image.info.get("transparency")
    if alpha is not None:
        opacity = np.full(256, 255, np.uint8)
        if isinstance(alpha, bytes):
            opacity[: len(alpha)] = np.frombuffer(alpha, np.uint8)
        else:
            opacity[alpha] = 0
        opacity = look_up(opacity, indices)
        if opacity.min() != opacity.max():
            raise Refusal("partly transparent. Export it without an alpha channel.")
    # files may hold fewer colours than their bits allow
    palette = np.concatenate([palette, np.zeros((256 - len(palette), 3), np.uint8)])
    return palette_to_grey(indices, palette)


def find_orientation(image: PIL.Image.Image) -> int:
    """Return how an image is to be turned, 1 to 8, by its EXIF header; 1 if that is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ORIENTATION)
    except Exception:  # a damaged header does not matter to the pixels
        return 1
    return value if isinstance(value, int) and 1 < value < 9 else 1


def _note_frames(num, stored):
    if num > 1:
        stored.metadata["notices"].append(f"{num} images in one file: the first is used")


def _check_png_rows(data):
    """Refuse a PNG whose stream holds fewer rows than the header says: PIL leaves them black."""
    width, height, depth, colour, _, _, is_interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits = depth * CHANNELS[colour]
    passes = PASSES if is_interlaced else ((0, 0, 1, 1),)
    num_missing = 0
    for column, row, column_step, row_step in passes:
        num_columns = -(-(width - column) // column_step)
        num_rows = -(-(height - row) // row_step)
        if num_columns > 0 and num_rows > 0:
            num_missing += num_rows * (1 + -(-num_columns * bits // 8))
    stream, position = zlib.decompressobj(), 8
    while num_missing > 0 and position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        if data[position + 4 : position + 8] == b"IDAT":
            rest = data[position + 8 : position + 8 + length]
            while rest and num_missing > 0:
                num_missing -= len(stream.decompress(rest, 2**20))
                rest = stream.unconsumed_tail
        position += length + 12
    if num_missing > 0:
        raise Refusal(CUT)
