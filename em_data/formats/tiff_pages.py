"""Decode one page of a TIFF: what it lacks is told, its colours are made grey."""

from math import ceil, prod

import imagecodecs
import numpy as np
import tifffile

from em_data.formats.base import Refusal, Stored, check_size
from em_data.formats.colour import (
    invert,
    lab_to_grey,
    palette_to_grey,
    scale_to_8_bits,
    ycbcr_to_rgb,
)
from em_data.formats.jpeg_check import CUT, refuse_cut_jpeg

COLOURS = tifffile.PHOTOMETRIC
JPEG = (6, 7, 34892, 33007)  # compressions that tifffile decodes as JPEG
UNREADABLE = {  # photometric interpretations that are no micrographs
    COLOURS.SEPARATED: "a CMYK image, made for printing. Export the micrograph in grey.",
    COLOURS.CFA: "raw data of a colour camera. Export it in grey.",
    COLOURS.LOGL: "pixels of logarithmic luminance. Export it with 8 or 16 bits.",
    COLOURS.LOGLUV: "pixels of logarithmic luminance. Export it with 8 or 16 bits.",
    COLOURS.MASK: "a transparency mask, not a micrograph.",
}


def check_page(page, file_size: int) -> None:
    """Refuse a page that cannot be decoded, or whose pixels are not all in the file.

    Args:
        page: A `tifffile.TiffPage`.
        file_size: In bytes.
    """
    if page.photometric in UNREADABLE:
        raise Refusal(UNREADABLE[page.photometric])
    bits = page.bitspersample
    if page.dtype is None or not isinstance(bits, int) or bits < 1:
        raise Refusal(f"pixels of {bits} bits, which no reader knows. Export it with 8 or 16 bits.")
    if page.compression != 1 and page.compression not in tifffile.TIFF.DECOMPRESSORS:
        raise Refusal(
            f"compression {int(page.compression)}, which is not known. Save it without compression."
        )
    if page.samplesperpixel > 4:
        raise Refusal(f"{page.samplesperpixel} channels, but a micrograph is grey.")
    if 0 in page.shape:
        raise Refusal(f"no pixels ({page.imagelength} x {page.imagewidth}). Copy it again.")
    check_size(page.imagelength * page.imagedepth, page.imagewidth)
    if page.is_tiled:
        check_size(page.tilelength * page.tiledepth, page.tilewidth)
    offsets, counts = page.dataoffsets, page.databytecounts
    num = prod(page.chunked)
    if min(len(offsets), len(counts)) < num or 0 in offsets[:num] or 0 in counts[:num]:
        raise Refusal(CUT)
    if any(o + n > file_size for o, n in zip(offsets[:num], counts[:num])):
        raise Refusal(CUT)
    if page.compression == 1 and sum(counts[:num]) < _count_bytes(page):
        raise Refusal(CUT)


def _count_bytes(page):
    """Return the number of bytes of the pixels of a page without compression."""
    is_planar = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    samples, planes = page.samplesperpixel, 1
    if is_planar:
        samples, planes = 1, samples
    if page.is_subsampled:  # four pixels, say, share one pair of colours
        across, down = page.subsampling or (2, 2)
        units = ceil(page.imagewidth / across) * ceil(page.imagelength / down)
        return units * (across * down + 2) * page.bitspersample // 8
    if page.is_tiled:
        row = ceil(page.tilewidth * samples * page.bitspersample / 8)
        return prod(page.chunked) * page.tiledepth * page.tilelength * row
    row = ceil(page.imagewidth * samples * page.bitspersample / 8)
    return planes * page.imagedepth * page.imagelength * row


def read_page(page, stored: Stored) -> None:
    """Put the pixels of a page that `check_page` accepts into `stored`, with its notices.

    The array becomes [H, W], [H, W, channels], or [depth, H, W] for a volume in one page.
    """
    notices, bits = stored.metadata["notices"], page.bitspersample
    if page.is_subsampled and page.compression not in JPEG:
        raise Refusal("YCbCr with fewer colours than pixels. Export it in grey.")
    array = page.asarray()
    if page.compression in JPEG:
        _check_jpeg(page)
        stored.is_lossy = True
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1:
        array = np.moveaxis(array, 0, -1)
    colours, full = page.photometric, 2**bits - 1
    if colours == COLOURS.PALETTE:
        if page.colormap is None:
            raise Refusal("a palette is used, but missing. Copy it again.")
        stored.array, stored.overlay = palette_to_grey(array, page.colormap.T)
        return
    if colours == COLOURS.MINISWHITE:
        is_plain = array.dtype.kind == "u" and page.samplesperpixel == 1
        array = invert(array, full if is_plain else None)
        notices.append("white was stored as 0: inverted")
    if colours == COLOURS.YCBCR and page.compression not in JPEG:
        array = ycbcr_to_rgb(array, full)
    if colours in (COLOURS.CIELAB, COLOURS.ICCLAB, COLOURS.ITULAB):
        if array.dtype.kind != "u" or bits not in (8, 16):
            raise Refusal(f"Lab colours of {bits} bits. Export it in grey.")
        array = lab_to_grey(array, 0 if colours == COLOURS.CIELAB else 2 ** (bits - 1))
        notices.append("stored as Lab: its lightness is read as grey of sRGB's gamma")
    if 1 < bits < 8 and array.dtype.kind == "u":
        array = scale_to_8_bits(array, bits)
        notices.append(f"{bits} bits per pixel: scaled to 0 to 255")
    elif bits not in (1, 8, 16, 32, 64) and array.dtype == np.uint16:
        notices.append(f"{bits} bits per pixel: grey levels 0 to {full} kept in 16 bits")
    stored.array = array


def _check_jpeg(page):
    """Refuse a page with a JPEG that does not hold its whole strip or tile."""
    tables = page.jpegtables[:-2] if page.jpegtables else b"\xff\xd8"
    file, num = page.parent.filehandle, prod(page.chunked)
    for data, _ in file.read_segments(page.dataoffsets[:num], page.databytecounts[:num]):
        if not data.startswith(b"\xff\xd8"):  # an older layout, in parts
            return
        whole = tables + data[2:]
        refuse_cut_jpeg(whole, imagecodecs.jpeg_decode(whole), imagecodecs.jpeg_decode)
