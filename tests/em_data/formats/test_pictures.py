"""Orientation, palettes, colour spaces and bits of TIFF, PNG, JPEG and BMP."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tifffile

from em_data import read_micrograph
from em_data.formats.base import orient
from support.mutations import encode_tiff as tiff
from support.mutations import encode_with_pil as pil

RNG = np.random.default_rng(5)
GREY8 = RNG.integers(0, 256, (40, 56), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (40, 56), dtype=np.uint16)
NO_SUBSAMPLING = (530, 3, 2, (1, 1), True)
RAMP = np.stack([np.arange(256)] * 3).astype(np.uint16)  # [3, 256]


def retag(data, code, value):
    """Return a TIFF whose tag of one SHORT has another value."""
    data = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        tag = tif.pages[0].tags[code]
    data[tag.valueoffset : tag.valueoffset + 2] = value.to_bytes(2, "little")
    return bytes(data)


def read(data):
    return read_micrograph(data, name="x")


def notices(data):
    return " | ".join(read(data).metadata["notices"])


def exif(orientation):
    header = PIL.Image.Exif()
    header[274] = orientation
    return header.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pil_does(orientation):
    image = PIL.Image.fromarray(GREY8)
    image.getexif()[274] = orientation
    expected = np.array(PIL.ImageOps.exif_transpose(image))
    stored = tiff(GREY8, extratags=[(274, 3, 1, orientation, True)])
    png = pil(GREY8, "PNG", exif=exif(orientation))
    for data in (stored, png):
        assert np.array_equal(read(data).image, expected)
    jpeg = pil(GREY8, "JPEG", quality=95)
    turned = pil(GREY8, "JPEG", quality=95, exif=exif(orientation))
    assert np.array_equal(read(turned).image, orient(read(jpeg).image, orientation))


def test_damaged_exif_header_does_not_refuse_the_image():
    for header in (exif(6)[:-9], b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"):
        assert np.array_equal(read(pil(GREY8, "PNG", exif=header)).image, GREY8)


def with_palette(indices, palette, kind):
    """An image of palette entries; palette: 8-bit values [256, 3]."""
    if kind == "TIFF":
        return tiff(indices, photometric="palette", colormap=palette.T.astype(np.uint16) * 257)
    image = PIL.Image.fromarray(indices).convert("P")
    image = PIL.Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(palette.astype(np.uint8).tobytes())
    return pil(image, kind)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "BMP"])
def test_palette_of_greys_is_read_as_8_bits(kind):
    ramp = RAMP.T
    for data, expected in (
        (with_palette(GREY8, ramp, kind), GREY8),
        (with_palette(255 - GREY8, ramp[::-1], kind), GREY8),
        (with_palette(GREY8 // 16, np.minimum(17 * ramp, 255), kind), GREY8 // 16 * 17),
    ):
        image = read(data).image
        assert image.dtype == np.uint8
        assert np.array_equal(image, expected)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "BMP"])
def test_overlay_of_a_palette_is_read_as_grey_levels_and_said(kind):
    ramp = RAMP.T.copy()
    ramp[0], ramp[255] = (0, 0, 255), (255, 0, 0)  # as "HiLo" marks black and white
    data = with_palette(GREY8, ramp, kind)
    assert np.array_equal(read(data).image, GREY8)
    share = 100 * np.mean((GREY8 == 0) | (GREY8 == 255))
    assert f"coloured overlay on {share:.2g} % of the pixels" in notices(data)


def test_overlay_in_the_label_bar_is_cropped_with_it():
    image = RNG.integers(1, 250, (200, 300), dtype=np.uint8)
    image[180:] = 0
    image[186:194, 20:200:3] = 255
    palette = RAMP.T.copy()
    palette[255] = (255, 255, 0)
    data = with_palette(image, palette, "TIFF")
    micrograph = read(data)
    assert np.array_equal(micrograph.image, image[:180])
    assert "overlay" not in notices(data)
    with pytest.raises(ValueError, match="coloured"):
        read(with_palette(np.where(GREY8 < 30, 255, GREY8).astype(np.uint8), palette, "TIFF"))


def test_16_bit_greys_of_a_palette_that_8_bits_cannot_hold_are_kept():
    palette = RAMP * 257
    palette[:, 1] = 300
    data = tiff(GREY8, photometric="palette", colormap=palette)
    assert np.array_equal(read(data).image, palette[0][GREY8])
    shifted = tiff(GREY8, photometric="palette", colormap=RAMP << 8)
    assert np.array_equal(read(shifted).image, GREY8)


def test_palette_of_colours_is_refused():
    colours = RNG.integers(0, 256, (256, 3), dtype=np.uint16)
    for kind in ("TIFF", "PNG", "BMP"):
        with pytest.raises(ValueError, match="x: a coloured image"):
            read(with_palette(GREY8, colours, kind))


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_tiff_of_few_bits_is_scaled_to_8_bits(bits):
    values = GREY8 >> (8 - bits)
    data = tiff(values, bitspersample=bits, photometric="minisblack")
    image = read(data).image
    assert image.dtype == np.uint8
    assert np.array_equal(image, np.rint(values * (255 / (2**bits - 1))).astype(np.uint8))
    inverted = retag(data, 262, 0)
    assert np.array_equal(read(inverted).image, 255 - image)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_tiff_of_more_than_8_bits_is_kept(bits):
    values = GREY16 >> (16 - bits)
    data = tiff(values, bitspersample=bits, photometric="minisblack")
    assert np.array_equal(read(data).image, values)
    assert f"{bits} bits per pixel" in notices(data)
    inverted = retag(data, 262, 0)
    assert np.array_equal(read(inverted).image, 2**bits - 1 - values)


def test_signed_white_is_zero_does_not_overflow():
    values = GREY16.view(np.int16)
    values[0, 0], values[0, 1] = -32768, 32767
    image = read(tiff(values, photometric="miniswhite")).image
    assert (image[0, 0], image[0, 1]) == (65535, 0)
    assert np.array_equal(image, (32767 - values.astype(int)).astype(np.uint16))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_png_of_few_bits_is_scaled_to_8_bits(depth):
    values = GREY8 >> (8 - depth)
    palette = RAMP.T * 255 // (2**depth - 1)
    image = PIL.Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette(np.minimum(palette, 255).astype(np.uint8).tobytes())
    data = pil(image, "PNG", bits=depth)
    assert data[24] == depth
    assert np.array_equal(read(data).image, values * np.uint8(255 // (2**depth - 1)))


def test_colour_spaces_of_grey_content():
    three = np.stack([GREY8, np.full_like(GREY8, 128), np.full_like(GREY8, 128)], axis=-1)
    ycbcr = retag(tiff(three, photometric="rgb", extratags=[NO_SUBSAMPLING]), 262, 6)
    assert read(ycbcr).image.dtype == np.uint8
    assert np.array_equal(read(ycbcr).image, GREY8)
    lab = three.copy()
    lab[..., 1:] = 0
    data = retag(tiff(lab, photometric="rgb"), 262, 8)
    image = read(data).image
    assert (image[GREY8 == 0] == 0).all()
    assert (image[GREY8 == 255] == 255).all()
    assert np.abs(image[GREY8 == 137].astype(int) - 128).max() <= 1  # L* 53.6 is sRGB 128
    icc = retag(tiff(three, photometric="rgb"), 262, 9)
    assert np.array_equal(read(icc).image, image)


def test_true_colours_of_other_spaces_are_refused_by_name():
    three = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    for photometric in (6, 8, 9):
        with pytest.raises(ValueError, match="x: a coloured image"):
            read(
                retag(tiff(three, photometric="rgb", extratags=[NO_SUBSAMPLING]), 262, photometric)
            )
    with pytest.raises(ValueError, match="x: YCbCr with fewer colours than pixels"):
        read(retag(tiff(three, photometric="rgb"), 262, 6))  # 2 x 2 by default
    four = RNG.integers(0, 256, (40, 56, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="x: a CMYK image"):
        read(tiff(four, photometric="separated"))
    with pytest.raises(ValueError, match="x: raw data of a colour camera"):
        read(retag(tiff(GREY8), 262, 32803))


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "uint32", "float16", "float32", "float64"]
)
def test_whole_numbers_of_any_type_are_kept(dtype):
    values = (GREY8 // 2).astype(dtype)
    assert np.array_equal(read(tiff(values)).image, GREY8 // 2)


def test_compression_that_nobody_knows_is_told_right():
    with pytest.raises(ValueError, match="x: compression 999, which is not known"):
        read(retag(tiff(GREY8), 259, 999))


def test_bits_that_nobody_knows_are_told_right():
    with pytest.raises(ValueError, match="x: pixels of 255 bits, which no reader knows"):
        read(retag(tiff(GREY8), 258, 255))
