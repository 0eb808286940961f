"""Read TIFF, PNG, JPEG and BMP files as micrographs: grey, 8 or 16 bits."""

import io
import logging
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import imagecodecs
import numpy as np
import PIL.Image
import tifffile

from em_data.intensity import float_to_uint16
from em_data.label_bar import find_label_bar
from em_data.metadata import read_png_metadata, read_tiff_metadata, square_pixel_size
from em_data.micrograph import Micrograph

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp")
JPEG_TOLERANCE = 2  # grey levels by which JPEG compression makes the channels of grey differ


def read_micrograph(
    path: str | Path | bytes,
    *,
    label_bar: str = "crop",
    name: str | None = None,
    specimen: str | None = None,
) -> Micrograph:
    """Read one micrograph.

    The format is found by the content of the file, not by its suffix. The image is grey or has
    three equal channels. 8 and 16 bits are kept as they are; floats and wider integers are scaled
    to 16 bits by their least and largest value. What was done is listed in metadata["notices"].

    Args:
        path: A TIFF, PNG, JPEG or BMP file, or its bytes.
        label_bar: What to do with a label bar at the bottom: "crop", "keep" or "refuse".
        name: Name in messages. Default: the path.
        specimen: Name of the specimen.

    Raises:
        ValueError: The file cannot be used. The message names the file, the reason and a remedy.
    """
    if isinstance(path, bytes):
        data, name = path, name or "image"
    else:
        name = name or str(path)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{name}: cannot be read: {error.strerror or error}") from error
    try:
        array, metadata, pixel_size_nm = _decode(data)
        image = _to_grey(array, metadata)
        num_rows = len(image) - metadata.get("scanned_rows", len(image))
        image = _crop(image, num_rows, metadata, label_bar, ", as the file's header says")
        image = to_uint(image, metadata)
        num_rows = 0 if label_bar == "keep" else find_label_bar(image)
        image = _crop(image, num_rows, metadata, label_bar)
    except _Refusal as refusal:
        raise ValueError(f"{name}: {refusal}") from refusal.__cause__
    return Micrograph(image, name, pixel_size_nm, specimen, metadata)


class _Refusal(ValueError):
    """A file that is not used, without its name."""


def _decode(data):
    """Return (array as stored, metadata, pixel size in nm or None) of the bytes of a file."""
    if not data:
        raise _Refusal("empty file (0 bytes). Copy it again from the microscope.")
    try:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _decode_tiff(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return _decode_png(data)
        if data[:2] == b"\xff\xd8":
            return _decode_with_pil(data), {"format": "JPEG", "notices": []}, None
        if data[:2] == b"BM":
            return _decode_with_pil(data), {"format": "BMP", "notices": []}, None
    except _Refusal:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        first = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        raise _Refusal(f"unreadable or truncated ({first}). Copy it again.") from error
    if not data.strip(b"\0"):
        raise _Refusal("unreadable: nothing but zero bytes. Copy it again.")
    raise _Refusal("not a TIFF, PNG, JPEG or BMP file by its content. Export it as TIFF.")


def _decode_tiff(data):
    """Return what `_decode` does, for the first image of a TIFF: [H, W] or [H, W, channels]."""
    notices = []
    with _collect_warnings(notices), tifffile.TiffFile(io.BytesIO(data)) as tif:
        if not tif.pages:
            raise _Refusal("a TIFF without an image. Copy it again.")
        series, page = tif.series[0], tif.series[0].keyframe
        for each in filter(None, series.pages):
            if any(o + n > len(data) for o, n in zip(each.dataoffsets, each.databytecounts)):
                raise _Refusal("truncated: the pixel data is cut short. Copy it again.")
        array = np.squeeze(series.asarray())
        axes = series.get_axes(squeeze=True)
        if len(tif.series) > 1:
            notices.append(f"{len(tif.series)} images in one file: the first is used")
        if array.ndim == 3 and page.samplesperpixel == 1:
            raise _Refusal(
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
    return array, metadata, square_pixel_size(sizes, notices)


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


def _decode_png(data):
    depth, metadata, sizes = read_png_metadata(data)
    # PIL cuts 16-bit colour and 16-bit grey with alpha to 8 bits
    array = imagecodecs.png_decode(data) if depth == 16 else _decode_with_pil(data)
    metadata["notices"] = []
    return array, metadata, square_pixel_size(sizes, metadata["notices"])


def _decode_with_pil(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        try:
            image = PIL.Image.open(io.BytesIO(data))
        except PIL.Image.DecompressionBombError:
            most = 2 * PIL.Image.MAX_IMAGE_PIXELS // 10**6
            raise _Refusal(
                f"more than {most} million pixels; save it as TIFF or in parts."
            ) from None
    with image:
        if image.mode == "CMYK":
            raise _Refusal("a CMYK image, made for printing. Export the micrograph in grey.")
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        return np.array(image)


def _to_grey(array, metadata):
    """Return the grey image [H, W] of an array [H, W] or [H, W, 1..4]."""
    if array.ndim == 3 and array.shape[-1] in (2, 4):
        alpha = array[..., -1]
        if alpha.min() != alpha.max():
            raise _Refusal("partly transparent. Export it without an alpha channel.")
        array = array[..., :-1]
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        return array
    if array.ndim != 3 or array.shape[-1] != 3:
        raise _Refusal(f"shape {list(array.shape)}, but a micrograph is grey [height, width].")
    if (array == array[..., :1]).all():
        return np.ascontiguousarray(array[..., 0])
    difference = array.max(axis=-1).astype(np.float64) - array.min(axis=-1)
    largest = difference.max()
    if array.dtype == np.uint8 and metadata["format"] == "JPEG" and largest <= JPEG_TOLERANCE:
        metadata["notices"].append(
            f"channels differ by up to {largest:.0f} grey levels (JPEG): their median is used"
        )
        return np.median(array, axis=-1).astype(array.dtype)
    share = 100 * float((difference > 0).mean())
    raise _Refusal(
        f"a coloured image: its channels differ on {share:.3g} % of the pixels, by up to "
        f"{largest:.5g}. Export it in grey, without overlays."
    )


def to_uint(image, metadata):
    """Return a real image [H, W] as uint8 or uint16, and note in `metadata` how it was scaled.

    Raises:
        ValueError: The image is empty or complex, or holds NaN or infinite values.
    """
    if 0 in image.shape:
        raise _Refusal(f"no pixels ({image.shape[0]} x {image.shape[1]}). Copy it again.")
    stored = metadata["stored_as"] = image.dtype.name
    if image.dtype in (np.uint8, np.uint16):
        return image.astype(image.dtype.newbyteorder("="), copy=False)
    if image.dtype == np.bool_:
        metadata["notices"].append("one bit per pixel: written as 0 and 255")
        return image.astype(np.uint8) * np.uint8(255)
    if image.dtype.kind not in "iuf":
        raise _Refusal(f"pixels of type {stored}. Export real, not complex, values as TIFF.")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        num_bad = np.count_nonzero(~np.isfinite(image))
        raise _Refusal(f"{num_bad} pixels are NaN or infinite. Replace them before use.")
    image, low, high = float_to_uint16(image)
    if (low, high) != (0.0, 65535.0):
        metadata["scaled_from"] = [low, high]
        metadata["notices"].append(
            f"{stored} scaled to 16 bits: {low:.6g} to 0, {high:.6g} to 65535"
        )
    return image


def _crop(image, num_rows, metadata, label_bar, reason=""):
    """Remove a label bar of `num_rows` at the bottom, if there is one."""
    if label_bar == "keep" or not 0 < num_rows < len(image):
        return image
    if label_bar == "refuse":
        raise _Refusal(f"a label bar of {num_rows} rows at the bottom. Use --tiles.label-bar crop.")
    metadata["notices"].append(f"label bar of {num_rows} rows cropped{reason}")
    return image[:-num_rows]


def natural_key(name):
    """Return a sort key that puts frame 2 before frame 10."""
    parts = re.split(r"(\d+)", str(name))
    return [int(part) if part.isdigit() else part.lower() for part in parts], str(name)
