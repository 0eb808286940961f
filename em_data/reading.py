"""Files -> micrographs: TIFF, PNG, JPEG and BMP, 8 and 16 bits, grey."""

import io
import logging
import re
import struct
import warnings
import zlib
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
BAR_REFUSED = "a label bar of {} rows at the bottom; use --tiles.label-bar crop"
GREY_TOLERANCE = (
    2  # levels of 255 by which the channels of a grey image may differ after JPEG compression
)


def read_micrograph(path, *, label_bar="crop", name=None, specimen=None):
    """Read one micrograph.

    path: a TIFF, PNG, JPEG or BMP file, told by its content and not by its suffix; or the bytes of one, with a `name`.
    Grey, or three equal channels; 8 or 16 bits are kept as they are, floats and wider integers are scaled to 16 bits by
    their least and largest value. label_bar: "crop" a label bar at the bottom, "keep" it, or "refuse" the file.
    What was done to the image is listed in metadata["notices"].
    Raises ValueError with the file's name, what is wrong and the way out.
    """
    if isinstance(path, bytes):
        data, name = path, name or "image"
    else:
        name = name or str(path)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{name}: cannot be read: {error.strerror or error}") from error
    notices = []
    array, metadata, pixel_size_nm = _decode(data, name, notices)
    image = _to_grey(array, name, notices, lossy=metadata.get("format") == "JPEG")
    image = _crop_by_header(image, metadata, label_bar, name, notices)
    image = _treat_label_bar(_to_uint(image, name, notices, metadata), label_bar, name, notices)
    metadata["notices"] = notices
    return Micrograph(image, name, pixel_size_nm, specimen, metadata)


def _decode(data, name, notices):
    """Return (array as stored, metadata, pixel size in nm or None)."""
    if not data:
        raise ValueError(f"{name}: empty file (0 bytes); copy it again from the microscope")
    head = data[:8]
    try:
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _decode_tiff(data, name, notices)
        if head == b"\x89PNG\r\n\x1a\n":
            return _decode_png(data, notices)
        if head[:2] in (b"\xff\xd8", b"BM"):
            return (
                _decode_with_pil(data),
                {"format": "JPEG" if head[:2] == b"\xff\xd8" else "BMP"},
                None,
            )
    except _Refusal as refusal:
        raise ValueError(f"{name}: {refusal}") from None
    except Exception as error:  # a decoder may raise anything at all on a broken file
        raise ValueError(
            f"{name}: unreadable or truncated ({_first_line(error)}); copy it again"
        ) from error
    if not data.strip(b"\0"):
        raise ValueError(f"{name}: unreadable: nothing but zero bytes; copy it again")
    raise ValueError(f"{name}: not a TIFF, PNG, JPEG or BMP file by its content; export it as TIFF")


class _Refusal(Exception):
    """A file that can be decoded and that we do not take."""


def _first_line(error):
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def _decode_tiff(data, name, notices):
    with (
        _collect_warnings(notices),
        tifffile.TiffFile(io.BytesIO(data), name=Path(name).name) as tif,
    ):
        if not tif.pages:
            raise _Refusal("a TIFF without an image; copy it again")
        series, page = tif.series[0], tif.series[0].keyframe
        for each in series.pages:
            if each is not None and any(
                o + n > len(data) for o, n in zip(each.dataoffsets, each.databytecounts)
            ):
                raise _Refusal("truncated: its pixels end before the image does; copy it again")
        array = np.squeeze(series.asarray())
        axes = series.get_axes(squeeze=True)
        if len(tif.series) > 1:
            notices.append(f"{len(tif.series)} images in one file: the first is used")
        if array.ndim == 3 and page.samplesperpixel == 1:
            raise _Refusal(
                f"a stack of {array.shape[0]} frames (axes {axes}); save each frame to a file of its own"
            )
        if array.ndim == 3 and "S" in axes:
            array = np.moveaxis(array, axes.index("S"), -1)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            array = page.asrgb()
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            array = ~array if array.dtype.kind in "bu" else -array
            notices.append("white was stored as 0: inverted")
        metadata, sizes = read_tiff_metadata(tif, page)
    return array, metadata, square_pixel_size(sizes, notices)


@contextmanager
def _collect_warnings(notices):
    """Put what tifffile logs of a doubtful file into its notices, rather than on the screen without its name."""
    logger, handler = logging.getLogger("tifffile"), logging.Handler()
    handler.emit = lambda record: notices.append(f"tifffile: {record.getMessage()}")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _decode_png(data, notices):
    depth, metadata, sizes = read_png_metadata(data)
    _verify_png(data)
    if depth == 16:  # PIL cuts 16-bit colour and grey-with-alpha to 8 bits
        array = imagecodecs.png_decode(data)
    else:
        array = _decode_with_pil(data)
    return array, metadata, square_pixel_size(sizes, notices)


def _verify_png(data):
    """Raise on a PNG that is cut short or has a damaged chunk: decoders fill what is missing with zeros."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(data[position + 4 : end]) != struct.unpack(">I", data[end : end + 4])[0]:
            raise ValueError(f"damaged PNG chunk {data[position + 4 : position + 8]!r}")
        if data[position + 4 : position + 8] == b"IEND":
            return
        position = end + 4
    raise ValueError("image file is truncated")


def _decode_with_pil(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        try:
            image = PIL.Image.open(io.BytesIO(data))
        except PIL.Image.DecompressionBombError:
            most = 2 * PIL.Image.MAX_IMAGE_PIXELS // 10**6
            raise _Refusal(
                f"more than {most} million pixels; save it as TIFF or in parts"
            ) from None
    with image:
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        elif image.mode == "CMYK":
            raise _Refusal("a CMYK image, made for printing; export the micrograph in grey")
        return np.array(image)


def _to_grey(array, name, notices, *, lossy):
    """Return the grey image [H, W] of an array [H, W] or [H, W, 1..4]; refuse what is truly coloured."""
    if array.ndim == 3 and array.shape[-1] in (2, 4):
        alpha = array[..., -1]
        if alpha.min() != alpha.max():
            raise ValueError(
                f"{name}: partly transparent; a micrograph is not: export it without an alpha channel"
            )
        array = array[..., :-1]
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        return array
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(
            f"{name}: an image of shape {list(array.shape)}; a micrograph is [height, width], grey"
        )
    if np.array_equal(array[..., 0], array[..., 1]) and np.array_equal(
        array[..., 0], array[..., 2]
    ):
        return np.ascontiguousarray(array[..., 0])
    difference = array.max(axis=-1).astype(np.float64) - array.min(axis=-1)
    largest = difference.max()
    if array.dtype == np.uint8 and lossy and largest <= GREY_TOLERANCE:
        notices.append(
            f"channels differ by up to {largest:.0f} grey levels (JPEG): their median is used"
        )
        return np.median(array, axis=-1).astype(array.dtype)
    share = 100 * float((difference > 0).mean())
    raise ValueError(
        f"{name}: a coloured image (its channels differ on {share:.3g} % of the pixels, by up to {largest:.5g}); "
        "a micrograph is grey: export it in grey, without overlays"
    )


def _to_uint(image, name, notices, metadata):
    if 0 in image.shape:
        raise ValueError(
            f"{name}: an image without pixels ({image.shape[0]} x {image.shape[1]}); copy it again"
        )
    metadata["stored_as"] = str(image.dtype)
    if image.dtype in (np.uint8, np.uint16):
        return image.astype(image.dtype.newbyteorder("="), copy=False)
    if image.dtype == np.bool_:
        notices.append("one bit per pixel: written as 0 and 255")
        return image.astype(np.uint8) * np.uint8(255)
    if image.dtype.kind not in "iuf":
        raise ValueError(
            f"{name}: pixels of type {image.dtype}; export real, not complex, values as TIFF"
        )
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        num_bad = int((~np.isfinite(image)).sum())
        raise ValueError(f"{name}: {num_bad} pixels are NaN or infinite; mend them before use")
    image, low, high = float_to_uint16(image)
    if (low, high) != (0.0, 65535.0):
        notices.append(
            f"{metadata['stored_as']} scaled to 16 bits: {low:.6g} to 0, {high:.6g} to 65535"
        )
        metadata["scaled_from"] = [low, high]
    return image


def _crop_by_header(image, metadata, label_bar, name, notices):
    """Cut rows below the scanned image where the microscope's own header says how many were scanned."""
    rows = metadata.pop("scanned_rows", None)
    if rows is None or label_bar == "keep" or not 0 < rows < image.shape[0]:
        return image
    if label_bar == "refuse":
        raise ValueError(f"{name}: {BAR_REFUSED.format(image.shape[0] - rows)}")
    notices.append(f"label bar of {image.shape[0] - rows} rows cropped, as the file's header says")
    return image[:rows]


def _treat_label_bar(image, label_bar, name, notices):
    if label_bar == "keep":
        return image
    num_rows = find_label_bar(image)
    if num_rows and label_bar == "refuse":
        raise ValueError(f"{name}: {BAR_REFUSED.format(num_rows)}")
    if num_rows:
        notices.append(f"label bar of {num_rows} rows at the bottom cropped")
        image = image[: image.shape[0] - num_rows]
    return image


def natural_key(name):
    """Sort key that puts frame 2 before frame 10."""
    return [
        int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", str(name))
    ], str(name)
