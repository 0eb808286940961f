"""Files that hold fewer pixels than they say: decoders fill what is missing, readers must not."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import tifffile

from em_data import read_micrograph
from support.mutations import encode_tiff as tiff
from support.mutations import encode_with_pil as pil

RNG = np.random.default_rng(6)
NOISE = RNG.integers(0, 256, (96, 112), dtype=np.uint8)
SMOOTH = np.clip(np.add.outer(np.arange(96), np.arange(112)) + RNG.normal(0, 9, (96, 112)), 0, 255)
SMOOTH = SMOOTH.astype(np.uint8)
COMPRESSIONS = [None, "lzw", "zlib", "packbits", "zstd", "lzma", "jpeg"]
LAYOUTS = {"one strip": {}, "strips": {"rowsperstrip": 16}, "tiles": {"tile": (32, 32)}}


def refuse(data):
    with pytest.raises(ValueError, match=r"x: .*(truncated|corrupted)"):
        read_micrograph(data, name="x")


def spoil_tag(data, codes, change):
    """Return a TIFF with another value in the middle of the first of these tags that it has."""
    data = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        tag = next(tif.pages[0].tags[code] for code in codes if code in tif.pages[0].tags)
    size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
    position = tag.valueoffset + tag.count // 2 * size
    value = change(int.from_bytes(data[position : position + size], "little"))
    data[position : position + size] = value.to_bytes(size, "little")
    return bytes(data)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_tiff_with_missing_strips_or_tiles_is_refused(compression, layout):
    data = tiff(NOISE, compression=compression, **LAYOUTS[layout])
    assert read_micrograph(data, name="x").image.shape == NOISE.shape
    offsets, counts = (273, 324), (279, 325)
    refuse(spoil_tag(data, offsets, lambda old: 0))
    refuse(spoil_tag(data, counts, lambda old: 0))
    refuse(spoil_tag(data, offsets, lambda old: len(data) - 5))
    refuse(spoil_tag(data, counts, lambda old: old // 2))
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        for code in set(offsets + counts) & set(tif.pages[0].tags.keys()):
            tag = tif.pages[0].tags[code]
            if tag.count > 1:  # fewer entries than strips or tiles
                fewer = struct.pack("<I", tag.count - 1)
                refuse(data[: tag.offset + 4] + fewer + data[tag.offset + 8 :])


def test_jpeg_in_a_tiff_that_is_cut_and_closed_is_refused():
    data = tiff(NOISE, compression="jpeg")
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        start, num = tif.pages[0].dataoffsets[0], tif.pages[0].databytecounts[0]
    for cut in (num // 2, num - 50):
        refuse(data[: start + cut] + b"\xff\xd9" + data[start + cut + 2 :])


@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 7}, {"optimize": True}])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("colours", [1, 3])
def test_jpeg_that_is_cut_and_closed_is_refused(options, progressive, colours):
    image = SMOOTH if colours == 1 else np.stack([SMOOTH] * 3, axis=-1)
    data = pil(image, "JPEG", progressive=progressive, **options)
    whole = read_micrograph(data, name="x").image
    if colours == 1:
        assert np.array_equal(whole, np.array(PIL.Image.open(io.BytesIO(data))))
    for cut in np.linspace(len(data) // 4, len(data) - 4, 25).astype(int):
        refuse(data[:cut] + b"\xff\xd9")


def png(height, width, num_rows, depth, *, interlaced=False, colour=0):
    """A PNG of zeros whose stream holds fewer rows than its header says."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    rows = bytes(num_rows * (1 + width * depth // 8))
    palette = chunk(b"PLTE", bytes(3 * 2)) if colour == 3 else b""
    parts = (
        chunk(b"IHDR", header),
        palette,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_png_with_fewer_rows_than_its_header_says_is_refused(depth):
    assert read_micrograph(png(64, 80, 64, depth), name="x").image.shape == (64, 80)
    for num_rows in (0, 32, 63):
        with pytest.raises(ValueError, match=r"x: .*(truncated|unreadable)"):
            read_micrograph(png(64, 80, num_rows, depth), name="x")
    if depth <= 8:
        with pytest.raises(ValueError, match=r"x: .*truncated"):
            read_micrograph(png(64, 80, 40, depth, colour=3), name="x")


def test_bmp_with_fewer_rows_than_its_header_says_is_refused():
    data = pil(NOISE, "BMP")
    refuse(data[: len(data) - 200])
    refuse(data[:22] + struct.pack("<i", 400) + data[26:])


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_size_is_bounded_before_memory_is_taken(kind):
    data = png(30_000, 30_000, 3, 8)
    if kind == "tiff":
        data = tiff(NOISE, compression="zlib")
        for codes in ((256,), (257,)):
            data = spoil_tag(data, codes, lambda old: 30_000)
    with pytest.raises(ValueError, match="30,000 x 30,000 pixels, but at most 537 million"):
        read_micrograph(data, name="x")


def test_number_of_pages_is_bounded(monkeypatch):
    monkeypatch.setattr("em_data.formats.tiff.MAX_PAGES", 3)
    stack = np.stack([NOISE] * 4)
    with pytest.raises(ValueError, match="x: 4 pages, but at most 3 are read"):
        read_micrograph(tiff(stack, photometric="minisblack"), name="x")


def test_image_that_needs_more_memory_than_there_is_is_refused_by_name(monkeypatch):
    def fail(page, stored):
        raise MemoryError

    monkeypatch.setattr("em_data.formats.tiff.read_page", fail)
    with pytest.raises(ValueError, match="x: needs more memory than there is"):
        read_micrograph(tiff(NOISE), name="x")
