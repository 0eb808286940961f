"""What files say about their pixel size, and what is no pixel size."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import tifffile

from em_data import read_micrograph
from em_data.metadata import pixel_size_from_path, refuse_diffraction, unit_to_nm
from em_data.refusal import Refusal

GREY = np.random.default_rng(0).integers(0, 256, (40, 56), dtype=np.uint8)

SPELLINGS = {
    1e9: ["m", "meter", "metre", "meters", "METRES"],
    1e7: ["cm", "centimeter"],
    1e6: ["mm", "millimetres"],
    1e3: ["um", "µm", "μm", "\\u00B5m", "Âµm", "micron", "microns", "micrometers", "Micrometre"],
    1.0: ["nm", " nm ", "nm\0", "NM", "nanometer", "nanometers", "nanometres"],
    0.1: ["A", "Å", "\u212b", "angstrom", "Angstroms", "Ångström"],
    1e-3: ["pm", "picometer"],
    2.54e7: ["inch", "inches", "in"],
}


@pytest.mark.parametrize("nanometres", SPELLINGS)
def test_a_unit_is_known_in_every_spelling(nanometres):
    for unit in SPELLINGS[nanometres]:
        assert unit_to_nm(unit) == pytest.approx(nanometres, rel=1e-12), unit


@pytest.mark.parametrize(
    "unit", ["", "pixel", "px", "1/nm", "mrad", "s", "ms", "eV", "counts", None]
)
def test_what_is_no_unit_of_length_is_unknown(unit):
    assert unit_to_nm(unit) is None


PATTERNS = [
    "1/nm",
    "1 / nm",
    "nm^-1",
    "nm-1",
    "nm⁻¹",
    "1/Å",
    "1/A",
    "A^-1",
    "1/µm",
    "1/m",
    "per nm",
]


@pytest.mark.parametrize("unit", [*PATTERNS, "mrad", "rad", "1/px", "µrad"])
def test_reciprocal_units_are_of_a_diffraction_pattern(unit):
    with pytest.raises(Refusal, match="diffraction pattern"):
        refuse_diffraction(unit)


@pytest.mark.parametrize("unit", ["nm", "µm", "", "pixel", "1/s", "counts", "m", None, "eV"])
def test_other_units_are_not(unit):
    refuse_diffraction(unit)


def tiff(*tags, **options):
    """A TIFF of GREY with tags (code, text)."""
    extra = [
        (code, 7 if isinstance(text, bytes) else 2, len(text), text, True) for code, text in tags
    ]
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, GREY, extratags=extra, **options)
    return buffer.getvalue()


def imagej(resolution, unit):
    return tiff(imagej=True, resolution=(resolution, resolution), metadata={"unit": unit})


def gatan(unit, size):
    buffer = io.BytesIO()
    extra = [(65003, 2, len(unit) + 1, unit, True), (65009, 12, 1, size, True)]
    tifffile.imwrite(buffer, GREY, extratags=extra)
    return buffer.getvalue()


def ome(size, unit):
    sizes = {f"PhysicalSize{axis}": size for axis in "XY"}
    units = {f"PhysicalSize{axis}Unit": unit for axis in "XY"}
    return tiff(ome=True, metadata={"axes": "YX"} | sizes | units)


def dpi(value, unit="INCH"):
    return tiff(resolution=(value, value), resolutionunit=unit)


def png(pixels_per_metre):
    buffer = io.BytesIO()
    PIL.Image.fromarray(GREY).save(buffer, "PNG")
    data = buffer.getvalue()
    chunk = b"pHYs" + struct.pack(">IIB", pixels_per_metre, pixels_per_metre, 1)
    crc = struct.pack(">I", zlib.crc32(chunk))
    return data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + crc + data[33:]


def jeol(mode, value="20000", eos="eosTEM"):
    """A camera of 25 um a pixel."""
    xml = (
        f"<TemReporter><Eos><EosMode>{eos}</EosMode></Eos><ImageFormingSystem><ModeString>{mode}"
        f"</ModeString><SelectorValue>{value}</SelectorValue></ImageFormingSystem></TemReporter>"
    )
    return tiff(
        (271, "JEOL Ltd."), description=xml, resolution=(400, 400), resolutionunit="CENTIMETER"
    )


THERMO = """<?xml version="1.0"?>
<Metadata xmlns:nil="http://schemas.fei.com/Metadata/v1/2013/07"><BinaryResult><PixelSize>
<X unit="m" unitPrefixPower="1">1.25E-09</X><Y unit="m" unitPrefixPower="1">1.25E-09</Y>
</PixelSize></BinaryResult></Metadata>"""
PHENOM = """<FeiImage><pixelWidth unit="nm">1.25</pixelWidth>
<pixelHeight unit="nm">1.25</pixelHeight></FeiImage>"""
TITAN = """<Root><Data><Label>High tension</Label><Value>300</Value><Unit>kV</Unit></Data>
<Data><Label>Pixel size X</Label><Value>1.25</Value><Unit>{0}</Unit></Data>
<Data><Label>Pixel size Y</Label><Value>1.25</Value><Unit>{0}</Unit></Data></Root>"""
FIELD = "[Beam]\r\nBeam=EBeam\r\n[EBeam]\r\nHFW=7e-008\r\n[Image]\r\nResolutionX=56\r\n"
TESCAN = b"\x01\x02\xff[MAIN]\r\nPixelSizeX=1.25e-09\r\nPixelSizeY=1.25e-09\r\n\0"
STATED = {  # 1.25 nm
    "imagej nanometers": imagej(0.8, "nanometers"),
    "imagej micrometers": imagej(800, "micrometers"),
    "imagej meter": imagej(800_000_000, "meter"),
    "imagej micron": imagej(800, "\\u00B5m"),
    "imagej angstroms": imagej(0.08, "angstroms"),
    "imagej cm, finer than a scanner": imagej(8_000_000, "cm"),
    "gatan Angstrom": gatan("Angstrom", 12.5),
    "ome m": ome(1.25e-9, "m"),
    "ome angstrom": ome(12.5, "Å"),
    "thermo fisher": tiff((34683, THERMO)),
    "thermo fisher in a helios tag": tiff((34682, THERMO)),
    "phenom": tiff((34683, PHENOM)),
    "titan": tiff((34683, TITAN.format("nm"))),
    "fei by the field of view": tiff((34682, FIELD)),
    "tescan": tiff((50431, TESCAN)),
    "jeol": jeol("MAG"),
    "header before a printer's resolution": tiff(
        (34683, THERMO), resolution=(300, 300), resolutionunit="INCH"
    ),
    "resolution in cm": dpi(8e6, "CENTIMETER"),
    "png": png(800_000_000),
}


@pytest.mark.parametrize("kind", STATED)
def test_pixel_size_is_read_in_nm(kind):
    micrograph = read_micrograph(STATED[kind], name="x")
    assert micrograph.pixel_size_nm == pytest.approx(1.25, rel=1e-6)
    assert not micrograph.metadata["notices"]


SCANNERS = [72, 96, 300, 600, 1200, 2400, 4000, 4800, 9600, 12_800]
UNKNOWN = {f"{value} dpi": (dpi(value), "dpi") for value in SCANNERS}
UNKNOWN |= {f"png of {n} dpi": (png(round(n / 0.0254)), "dpi") for n in SCANNERS}
UNKNOWN |= {
    "scanner in cm": (dpi(4000 / 2.54, "CENTIMETER"), "dpi"),
    "imagej from a scanner": (imagej(300, "inch"), "dpi"),
    "imagej from a scanner in cm": (imagej(118, "cm"), "dpi"),
    "imagej 1.0 without a unit": (imagej(1, ""), None),
    "imagej in pixels": (imagej(1, "pixels"), None),
    "gatan 1.0 without a unit": (gatan("", 1.0), None),
    "imagej too large": (imagej(0.001, "mm"), "not plausible"),
    "imagej too small": (imagej(1_000_000, "pm"), "not plausible"),
    "ome too large": (ome(1.0, "m"), "not plausible"),
    "gatan too small": (gatan("nm", 1e-5), "not plausible"),
    "gatan not a number": (gatan("nm", float("nan")), None),
    "broken xml": (tiff((34683, THERMO[:150])), None),
    "jeol of a scan": (jeol("MAG", eos="modeASID"), "dpi"),
    "time": (imagej(2, "ms"), None),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_pixel_size_is_unknown_with_a_word(kind):
    data, word = UNKNOWN[kind]
    micrograph = read_micrograph(data, name="x")
    assert micrograph.pixel_size_nm is None
    notices = micrograph.metadata["notices"]
    assert any(word in notice for notice in notices) if word else not notices


@pytest.mark.parametrize(
    "data",
    [
        imagej(1, "1/nm"),
        imagej(1, "nm^-1"),
        gatan("1/nm", 0.02),
        gatan("mrad", 0.02),
        ome(1.0, "rad"),
        tiff((34683, TITAN.format("1/nm"))),
        jeol("DIFF", "200"),
    ],
)
def test_diffraction_patterns_are_refused_by_name(data):
    with pytest.raises(ValueError, match=r"^x: a diffraction pattern"):
        read_micrograph(data, name="x")


PATHS = [  # path, pattern, pixel size of an image 400 pixels wide
    ("steel/fov200nm/03.png", r"fov(?P<fov>\d+)nm", 0.5),
    ("fov0.2um_a.tif", r"fov(?P<fov>[\d.]+)(?P<unit>nm|um)", 0.5),
    ("alloy_0.5nmpx_03.tif", r"_(?P<pixel>[\d.]+)(?P<unit>nm|um)px", 0.5),
    ("alloy_0,5_03.tif", r"_(?P<pixel>\d+,\d+)_", 0.5),
    ("alloy_500pm.tif", r"(?P<pixel>\d+)(?P<unit>pm|nm)?", 0.5),
    ("alloy.tif", r"fov(?P<fov>\d+)nm", None),
    ("alloy_0nm.tif", r"(?P<pixel>\d+)nm", None),
    ("alloy_2kx.tif", r"(?P<pixel>\d+)(?P<unit>kx)", None),
    ("alloy_x.tif", r"_(?P<pixel>\w)", None),
]


@pytest.mark.parametrize(("path", "pattern", "size"), PATHS)
def test_pixel_size_by_a_pattern_in_the_path(path, pattern, size):
    assert pixel_size_from_path(path, pattern, 400) == size
