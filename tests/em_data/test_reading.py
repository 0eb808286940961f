import io
import struct
import zlib

import imagecodecs
import numpy as np
import PIL.Image
import pytest
import tifffile

from em_data import read_micrograph
from support.mutations import encode_tiff as tiff
from support.mutations import encode_with_pil as pil

RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (40, 56), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (40, 56), dtype=np.uint16)


def three(array):
    return np.stack([array] * 3, axis=-1)


def tiff_with_thumbnail():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(GREY16)
        writer.write(GREY8[::4, ::4], subfiletype=1)
    return buffer.getvalue()


EIGHT_BITS = {
    "tiff": tiff(GREY8),
    "tiff packbits": tiff(GREY8, compression="packbits"),
    "tiff planes": tiff(np.stack([GREY8] * 3), photometric="rgb", planarconfig="separate"),
    "png": pil(GREY8, "PNG"),
    "png three equal channels": pil(three(GREY8), "PNG"),
    "png opaque": pil(np.dstack([three(GREY8), np.full_like(GREY8, 255)]), "PNG"),
    "png grey palette": pil(PIL.Image.fromarray(GREY8).convert("P"), "PNG"),
    "bmp": pil(GREY8, "BMP"),
    "bmp three equal channels": pil(three(GREY8), "BMP"),
}
OPAQUE_16 = np.dstack([GREY16, np.full_like(GREY16, 65535)])
SIXTEEN_BITS = {
    "tiff": tiff(GREY16),
    "tiff big-endian": tiff(GREY16, byteorder=">"),
    "tiff LZW": tiff(GREY16, compression="lzw", predictor=True),
    "tiff deflate in tiles": tiff(GREY16, compression="zlib", tile=(16, 16)),
    "bigtiff": tiff(GREY16, bigtiff=True),
    "tiff three equal channels": tiff(three(GREY16), photometric="rgb"),
    "tiff white is zero": tiff(65535 - GREY16, photometric="miniswhite"),
    "tiff with a thumbnail": tiff_with_thumbnail(),
    "tiff float of whole numbers": tiff(GREY16.astype(np.float32)),
    "tiff one frame of a stack": tiff(GREY16[None], photometric="minisblack"),
    "png": pil(GREY16, "PNG"),
    "png three equal channels": imagecodecs.png_encode(three(GREY16)),
    "png opaque": imagecodecs.png_encode(OPAQUE_16),
}
ONE_BIT = (GREY8 > 99).astype(np.uint8) * np.uint8(255)
EXACT = {f"8 bits, {kind}": (data, GREY8) for kind, data in EIGHT_BITS.items()}
EXACT |= {f"16 bits, {kind}": (data, GREY16) for kind, data in SIXTEEN_BITS.items()}
EXACT |= {
    "tiff int16 of positive values": (tiff((GREY16 // 2).astype(np.int16)), GREY16 // 2),
    "tiff one bit, white is zero": (tiff(GREY8 > 99, photometric="miniswhite"), 255 - ONE_BIT),
    "png one bit": (pil(PIL.Image.fromarray(GREY8 > 99), "PNG"), ONE_BIT),
}


@pytest.mark.parametrize("kind", EXACT)
def test_grey_levels_are_read_exactly(kind, tmp_path):
    data, expected = EXACT[kind]
    path = tmp_path / "image.dat"  # told by content, not by suffix
    path.write_bytes(data)
    image = read_micrograph(path).image
    assert image.dtype == expected.dtype
    assert np.array_equal(image, expected)


def test_jpeg_of_a_grey_image_is_read_as_pil_reads_it():
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    data = pil(three(smooth), "JPEG", quality=95)
    image = read_micrograph(data, name="a.jpg").image
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - smooth).max() <= 3
    grey = PIL.Image.open(io.BytesIO(pil(smooth, "JPEG", quality=95)))
    assert np.array_equal(image, np.array(grey))


COLOUR = three(GREY8).copy()
COLOUR[3:9, 5:9, 0] = 255 - COLOUR[3:9, 5:9, 0]
STACK = tiff(np.stack([GREY16, GREY16 // 2]), photometric="minisblack")
HALF_ALPHA = pil(np.dstack([three(GREY8), GREY8]), "PNG")
NAN = GREY16.astype(np.float32)
NAN[:, ::2] = np.nan
INF = GREY16.astype(np.float32)
INF[2:9, 3:9] = np.inf
CMYK = pil(PIL.Image.fromarray(COLOUR).convert("CMYK"), "JPEG")
REFUSED = {
    "coloured png": (pil(COLOUR, "PNG"), "coloured"),
    "coloured tiff": (tiff(COLOUR, photometric="rgb"), "coloured"),
    "coloured png 16": (imagecodecs.png_encode(COLOUR.astype(np.uint16) * 257), "coloured"),
    "coloured jpeg": (pil(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8)), "JPEG"), "coloured"),
    "coloured bmp": (pil(COLOUR, "BMP"), "coloured"),
    "cmyk": (CMYK, "CMYK"),
    "stack": (STACK, "a stack of frames, where one image is needed"),
    "half transparent": (HALF_ALPHA, "transparent"),
    "nan": (tiff(NAN), "1120 pixels are NaN: the largest rectangle without them is 1.79 %"),
    "infinite": (tiff(INF), "42 pixels are infinite"),
    "complex": (tiff(GREY8.astype(np.complex64)), "complex"),
    "empty": (b"", "empty file"),
    "zeros": (bytes(500), "zero bytes"),
    "text": (b"not an image at all", "not a TIFF, PNG, JPEG or BMP"),
    "cut tiff": (tiff(GREY16)[:-100], "truncated"),
    "cut tiff, compressed": (tiff(GREY16, compression="zlib")[:3000], "truncated"),
    "cut png 8": (pil(GREY8, "PNG")[:1500], "truncated"),
    "cut png 16": (pil(GREY16, "PNG")[:3000], "truncated"),
    "cut jpeg": (pil(GREY8, "JPEG")[:1200], "truncated"),
    "cut bmp": (pil(GREY8, "BMP")[:1500], "truncated"),
    "head of a tiff": (tiff(GREY16)[:6], "unreadable or truncated|without an image"),
    "head of a png": (pil(GREY8, "PNG")[:20], "unreadable or truncated"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_image_is_refused_by_name_with_the_reason(kind, tmp_path):
    data, reason = REFUSED[kind]
    path = tmp_path / "bad_one.tif"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad_one\.tif: .*({reason})"):
        read_micrograph(path)


def test_every_cut_of_a_file_is_refused_and_never_half_read():
    pngs = [pil(GREY8, "PNG"), pil(GREY16, "PNG")]
    for data in [tiff(GREY16, compression="lzw"), *pngs, pil(GREY8, "BMP")]:
        for length in np.linspace(1, len(data) - 20, 23).astype(int):
            with pytest.raises(ValueError, match=r"^x: "):
                read_micrograph(data[:length], name="x")


def test_damaged_16_bit_png_is_refused():
    data = bytearray(pil(GREY16, "PNG"))
    data[len(data) // 2] ^= 255
    with pytest.raises(ValueError, match="damaged"):
        read_micrograph(bytes(data), name="x")


def test_nothing_is_printed_of_a_bad_tiff(capfd):
    with pytest.raises(ValueError, match="without an image"):
        read_micrograph(tiff(GREY16)[:8], name="x")
    assert capfd.readouterr() == ("", "")


def test_image_too_large_for_its_format_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1500)  # PIL refuses twice as many
    assert read_micrograph(pil(GREY8, "PNG"), name="x").image.shape == (40, 56)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="save it as TIFF"):
        read_micrograph(pil(GREY8, "PNG"), name="x")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.tif: cannot be read"):
        read_micrograph(tmp_path / "nothing.tif")


def test_float_image_is_scaled_to_16_bits_and_says_so():
    values = np.linspace(-3, 5, GREY8.size, dtype=np.float32).reshape(GREY8.shape)
    micrograph = read_micrograph(tiff(values), name="x")
    assert micrograph.image.dtype == np.uint16
    assert (micrograph.image.min(), micrograph.image.max()) == (0, 65535)
    assert micrograph.metadata["scaled_from"] == [-3.0, 5.0]
    assert any("scaled to 16 bits" in notice for notice in micrograph.metadata["notices"])


def test_one_outlier_of_a_float_image_is_clipped_and_said():
    values = GREY8 / np.float32(3)
    kept = values.copy()
    values[7, 9], kept[7, 9] = np.inf, kept.max()
    micrograph = read_micrograph(tiff(values), name="x")
    np.testing.assert_allclose(micrograph.image, kept / 85 * 65535, atol=1)
    assert any(notice.startswith("1 spike") for notice in micrograph.metadata["notices"])


def png_with(chunk):
    data, length = pil(GREY8, "PNG"), struct.pack(">I", len(chunk) - 4)
    return data[:33] + length + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def png_with_size(*values):
    return png_with(b"pHYs" + struct.pack(">IIB", *values))


def tiff_of_gatan(unit, size):
    return tiff(GREY8, extratags=[(65003, 2, 3, unit, True), (65009, 12, 1, size, True)])


def tiff_with_resolution(x, y, unit):
    return tiff(GREY8, resolution=(x, y), resolutionunit=unit)


def tiff_of_imagej(resolution, unit):
    return tiff(GREY8, imagej=True, resolution=(resolution,) * 2, metadata={"unit": unit})


OME = {"PhysicalSizeX": 0.00125, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 1.25}
OME |= {"PhysicalSizeYUnit": "nm", "axes": "YX"}
STATED = {  # 1.25 nm
    "png pHYs": png_with_size(800_000_000, 800_000_000, 1),
    "tiff per centimetre": tiff_with_resolution(8e6, 8e6, "CENTIMETER"),
    "tiff per inch": tiff_with_resolution(2.54e7 / 1.25, 2.54e7 / 1.25, "INCH"),
    "imagej": tiff_of_imagej(0.8, "nm"),
    "imagej um": tiff_of_imagej(800, "um"),
    "ome": tiff(GREY8, ome=True, metadata=OME),
    "gatan": tiff_of_gatan("nm", 1.25),
    "gatan um": tiff_of_gatan("um", 0.00125),
}
UNKNOWN = {
    "png of a screen": png_with_size(2835, 2835, 1),
    "png ratio only": png_with_size(1, 1, 0),
    "png without": pil(GREY8, "PNG"),
    "tiff of a printer": tiff_with_resolution(300, 300, "INCH"),
    "tiff not square": tiff_with_resolution(8e6, 4e6, "CENTIMETER"),
    "imagej in pixels": tiff_of_imagej(1, "pixel"),
}


@pytest.mark.parametrize("kind", STATED)
def test_pixel_size_is_read_where_the_file_states_one(kind):
    assert read_micrograph(STATED[kind], name="x").pixel_size_nm == pytest.approx(1.25, rel=1e-6)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_pixel_size_is_unknown_where_the_file_states_none(kind):
    assert read_micrograph(UNKNOWN[kind], name="x").pixel_size_nm is None


def test_printers_resolution_is_said_to_be_none():
    notices = read_micrograph(UNKNOWN["tiff of a printer"], name="x").metadata["notices"]
    assert any("300 dpi" in notice for notice in notices)


def test_fei_header_gives_pixel_size_and_cuts_the_label_bar():
    header = (
        "[User]\r\nDate=01/01/2020\r\n[Scan]\r\nPixelWidth=1.25e-009\r\nPixelHeight=1.25e-009\r\n"
    )
    header += "[Image]\r\nResolutionX=56\r\nResolutionY=36\r\n"
    data = tiff(GREY16, extratags=[(34682, 2, len(header) + 1, header, True)])
    micrograph = read_micrograph(data, name="x")
    assert micrograph.pixel_size_nm == pytest.approx(1.25)
    assert np.array_equal(micrograph.image, GREY16[:36])
    assert any("4 rows cropped" in notice for notice in micrograph.metadata["notices"])
    assert read_micrograph(data, name="x", label_bar="keep").image.shape == (40, 56)
    with pytest.raises(ValueError, match="x: a label bar of 4 rows"):
        read_micrograph(data, name="x", label_bar="refuse")


def test_zeiss_header_gives_the_pixel_size():
    header = "\r\n" * 3 + "AP_IMAGE_PIXEL_SIZE\r\nImage Pixel Size = 1.25 nm\r\n"
    data = tiff(GREY8, extratags=[(34118, 2, len(header) + 1, header, True)])
    assert read_micrograph(data, name="x").pixel_size_nm == pytest.approx(1.25)
