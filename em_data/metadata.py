"""What an image file says about itself, above all the pixel size."""

import io
import re
import unicodedata

import tifffile
from PIL.PngImagePlugin import PngImageFile

from em_data.refusal import Refusal

# a coarser resolution comes from a printer or a screen: 72 dpi is 352,778 nm
MAX_PIXEL_SIZE_NM = 10_000.0
_METRES = {"": 1e9, "c": 1e7, "m": 1e6, "u": 1e3, "μ": 1e3, "n": 1.0, "p": 1e-3, "f": 1e-6}
_LONG = {"": 1e9, "centi": 1e7, "milli": 1e6, "micro": 1e3, "nano": 1.0, "pico": 1e-3}
UNITS_NM = {
    **{f"{prefix}m": factor for prefix, factor in _METRES.items()},
    **{f"{prefix}met{er}": factor for prefix, factor in _LONG.items() for er in ("er", "re")},
    "micron": 1e3, "inch": 2.54e7, "in": 2.54e7,
    "a": 0.1, "å": 0.1, "ang": 0.1, "angstrom": 0.1, "angstroem": 0.1, "ångström": 0.1,
}  # fmt: skip
ANGLES = ("rad", "mrad", "urad", "μrad", "radian", "milliradian", "degree", "deg", "°")


def unit_to_nm(unit) -> float | None:
    """Return one unit of length in nanometres, or None if it is unknown.

    Args:
        unit: Such as "nm", "µm", "Å", "nanometers", "micron"; in upper or lower case.
    """
    return UNITS_NM.get(_normalise(unit)) or UNITS_NM.get(_normalise(unit).removesuffix("s"))


def refuse_diffraction(unit) -> None:
    """Refuse an image whose axes have no unit of length, but one of reciprocal space or of angle.

    Args:
        unit: Such as "1/nm", "nm^-1", "1/Å" or "mrad". Anything else passes.

    Raises:
        Refusal: The image is a diffraction pattern or a Fourier transform.
    """
    text = _normalise(unit)
    inverse = re.fullmatch(r"(?:1 ?/|/|per ) ?(.+)|(.+?) ?\^? ?\(?[-−]1\)?", text)
    base = inverse and (inverse[1] or inverse[2]).strip("() ")
    is_inverse = base is not None and (unit_to_nm(base) or base in ("px", "pixel", "pixels"))
    if is_inverse or text in ANGLES or text.removesuffix("s") in ANGLES:
        raise Refusal(
            f"a diffraction pattern or Fourier transform: its scale is in {str(unit).strip()}, "
            "which is no length. Remove it from the micrographs."
        )


def _normalise(unit):
    """Return a unit as text in one spelling: lower case, one kind of micro sign."""
    text = str(unit).replace("\\u00b5", "µ").replace("\\u00B5", "µ").replace("Âµ", "µ")
    return " ".join(unicodedata.normalize("NFKC", text).replace("\0", "").lower().split())


def square_pixel_size(sizes, notices, limits_nm=None) -> float | None:
    """Return the pixel size in nm of sizes from a file; None, with a notice, if they are no use.

    sizes: None, or (x_nm, y_nm, field), where `field` names where the sizes were found.
    limits_nm: Least and largest size of a microscope's header, which no printer writes.
    """
    if sizes is None:
        return None
    x, y, field = sizes
    if not (0 < x < float("inf") and 0 < y < float("inf")):
        return None
    if limits_nm and not limits_nm[0] <= min(x, y) <= max(x, y) <= limits_nm[1]:
        notices.append(f"{field}: pixels of {x:.4g} nm are not plausible: pixel size unknown")
        return None
    if not limits_nm and max(x, y) > MAX_PIXEL_SIZE_NM:
        notices.append(
            f"{field} of {2.54e7 / x:.4g} dpi is a printer's, not a microscope's: "
            "pixel size unknown"
        )
        return None
    if abs(x - y) > 0.01 * max(x, y):
        notices.append(f"pixels of {x:.4g} x {y:.4g} nm are not square: pixel size unknown")
        return None
    return float(x)


def read_png_metadata(data):
    """Return (bit depth, metadata, sizes as in `square_pixel_size`) of the bytes of a PNG file.

    Raises an error if the file is cut short or damaged: decoders fill what is missing with zeros.
    """
    try:
        PngImageFile(io.BytesIO(data)).verify()
    except (SyntaxError, OSError) as error:
        raise ValueError(f"damaged PNG chunk: {error}") from error
    info = PngImageFile(io.BytesIO(data)).info
    metadata = {"format": "PNG"} | {k: str(v) for k, v in info.items() if isinstance(v, str)}
    # our own text is exact; the pHYs chunk, PIL's dpi, holds whole pixels per metre
    sizes, dpi = _exact_size(metadata), info.get("dpi", (0, 0))
    if sizes is None and 0 not in dpi:
        x, y = (1e9 / round(each / 0.0254) for each in dpi)
        sizes = x, y, "pHYs"
    return data[24], metadata, sizes


def read_tiff_metadata(tif, page):
    """Return (metadata, sizes as in `square_pixel_size`) of an open `tifffile.TiffFile`.

    A microscope's own header comes before the general resolution tag.
    """
    metadata = {"format": "TIFF"}
    for read in READERS:
        try:
            sizes = read(tif, page, metadata)
        except (LookupError, TypeError, ValueError, AttributeError, SyntaxError) as error:
            metadata[f"unreadable{read.__name__}"] = str(error)[:80]
            continue
        if sizes is not None:
            return metadata, sizes
    return metadata, None


def _exact_size(header):
    """Return the sizes that `em_data.write_image` wrote as text, or None."""
    try:
        size = float((header or {}).get("pixel_size_nm"))
    except (TypeError, ValueError):
        return None
    return (size, size, "pixel_size_nm") if size else None


def _read_ours(tif, page, metadata):
    """Files of `em_data.write_image`: ImageJ's header; older files have JSON."""
    shaped = tif.shaped_metadata if len(tif.pages) == 1 else ()  # a walk through all pages
    headers = [tif.imagej_metadata, *(shaped or ())]
    return next((size for size in map(_exact_size, headers) if size), None)


def _read_fei(tif, page, metadata):
    """FEI and Thermo Fisher: metres, and the number of scanned rows above the label bar."""
    header = tif.fei_metadata
    if not header:
        return None
    metadata["instrument"] = "FEI"
    for section, key in (("Beam", "HV"), ("System", "Type"), ("Detectors", "Name")):
        if key in header.get(section, {}):
            metadata[key] = header[section][key]
    rows = header.get("Image", {}).get("ResolutionY")
    if isinstance(rows, int):
        metadata["scanned_rows"] = rows
    for section in ("Scan", "EScan", "IScan"):
        scan = header.get(section, {})
        if "PixelWidth" in scan:
            width, height = scan["PixelWidth"], scan.get("PixelHeight", scan["PixelWidth"])
            return width * 1e9, height * 1e9, "FEI header"
    return None


def _read_zeiss(tif, page, metadata):
    header = tif.sem_metadata
    if not header:
        return None
    metadata["instrument"] = "Zeiss"
    for key in ("ap_image_pixel_size", "ap_pixel_size"):
        if key in header:
            _, value, unit = header[key]
            size = float(value) * unit_to_nm(unit)
            return size, size, "Zeiss header"
    return None


def _read_sis(tif, page, metadata):
    header = tif.sis_metadata
    if not header or "pixelsizex" not in header:
        return None
    metadata["instrument"] = "Olympus SIS"
    return header["pixelsizex"] * 1e9, header["pixelsizey"] * 1e9, "SIS header"


def _read_gatan(tif, page, metadata):
    """DigitalMicrograph's export: the unit in tag 65003, the scale in tags 65009 and 65010."""
    if 65009 not in page.tags or 65003 not in page.tags:
        return None
    metadata["instrument"] = "Gatan"
    unit = page.tags[65003].value
    if isinstance(unit, bytes | tuple):
        unit = bytes(unit).decode("latin-1").strip("\0")
    factor = unit_to_nm(unit)
    x = float(page.tags[65009].value)
    y = float(page.tags[65010].value) if 65010 in page.tags else x
    return (x * factor, y * factor, "Gatan tags") if factor else None


def _read_ome(tif, page, metadata):
    if not tif.is_ome:
        return None
    metadata["instrument"] = "OME"
    images = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]
    parts = [each["Pixels"] for each in (images if isinstance(images, list) else [images])]
    shape = {"SizeX": page.imagewidth, "SizeY": page.imagelength}
    same = (each for each in parts if all(each.get(key) == shape[key] for key in shape))
    header = next(same, parts[0])
    sizes = [
        header[f"PhysicalSize{axis}"] * unit_to_nm(header.get(f"PhysicalSize{axis}Unit", "µm"))
        for axis in "XY"
        if f"PhysicalSize{axis}" in header
    ]
    return (sizes[0], sizes[-1], "OME header") if sizes else None


def _read_resolution(tif, page, metadata):
    """The resolution tags, whose unit of length stands in ImageJ's header or in a tag."""
    if tif.imagej_metadata:
        metadata["instrument"] = "ImageJ"
        factor, field = unit_to_nm(tif.imagej_metadata.get("unit", "")), "ImageJ header"
    elif "ResolutionUnit" in page.tags:
        unit = int(page.tags["ResolutionUnit"].value)
        factor, field = {2: UNITS_NM["inch"], 3: UNITS_NM["cm"]}.get(unit), "resolution tag"
    else:
        return None
    (x, x_over), (y, y_over) = page.tags["XResolution"].value, page.tags["YResolution"].value
    if not (factor and x and y):
        return None
    return factor * x_over / x, factor * y_over / y, field


READERS = (
    _read_ours,
    _read_fei,
    _read_zeiss,
    _read_sis,
    _read_gatan,
    _read_ome,
    _read_resolution,
)
