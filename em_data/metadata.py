"""What an image file says about itself, above all the pixel size."""

import io
import math
import re
import unicodedata
from xml.etree import ElementTree

import tifffile
from PIL.PngImagePlugin import PngImageFile

from em_data.refusal import Refusal

PIXEL_SIZES_NM = 1e-3, 1e5  # what a microscope's header can state
# a resolution without a microscope's header: 1000 nm are 25,400 dpi, finer than any scanner
MAX_RESOLUTION_NM = 1000.0
RESOLUTIONS = ("resolution tag", "pHYs chunk")  # fields that scanners and printers set, too
_METRES = {"": 1e9, "c": 1e7, "m": 1e6, "u": 1e3, "μ": 1e3, "n": 1.0, "p": 1e-3, "f": 1e-6}
_LONG = {"": 1e9, "centi": 1e7, "milli": 1e6, "micro": 1e3, "nano": 1.0, "pico": 1e-3}
UNITS_NM = {
    **{f"{prefix}m": factor for prefix, factor in _METRES.items()},
    **{f"{prefix}met{er}": factor for prefix, factor in _LONG.items() for er in ("er", "re")},
    "micron": 1e3, "inch": 2.54e7, "inche": 2.54e7, "in": 2.54e7,
    "a": 0.1, "å": 0.1, "ang": 0.1, "angstrom": 0.1, "angstroem": 0.1, "ångström": 0.1,
}  # fmt: skip
ANGLES = ("rad", "mrad", "urad", "μrad", "radian", "milliradian", "degree", "deg", "°")


def unit_to_nm(unit) -> float | None:
    """Return one unit of length in nanometres, or None if it is unknown.

    Args:
        unit: Such as "nm", "µm", "Å", "nanometers", "micron"; in upper or lower case.
    """
    text = _normalise(unit)
    if len(text) > 4:  # "ms" is no length
        text = text.removesuffix("s")
    return UNITS_NM.get(text)


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
        raise _make_refusal(f"its scale is in {str(unit).strip()}, which is no length")


def _make_refusal(reason):
    return Refusal(
        f"a diffraction pattern or Fourier transform: {reason}. Remove it from the micrographs."
    )


def _normalise(unit):
    """Return a unit as text in one spelling: lower case, one kind of micro sign."""
    text = str(unit).replace("\\u00b5", "µ").replace("\\u00B5", "µ").replace("Âµ", "µ")
    return " ".join(unicodedata.normalize("NFKC", text).replace("\0", "").lower().split())


def square_pixel_size(sizes, notices) -> float | None:
    """Return the pixel size in nm of sizes from a file; None, with a notice, if they are no use.

    Args:
        sizes: None, or (x_nm, y_nm, field), where `field` names where the sizes were found.
        notices: List of sentences, appended to.
    """
    if sizes is None:
        return None
    x, y, field = sizes
    if not (0 < x < math.inf and 0 < y < math.inf):
        return None
    least, most = PIXEL_SIZES_NM
    if field in RESOLUTIONS and max(x, y) > MAX_RESOLUTION_NM:
        notices.append(
            f"{field} of {2.54e7 / x:.4g} dpi is that of a scanner, a printer or a screen: "
            "pixel size unknown"
        )
    elif min(x, y) < least or max(x, y) > most:
        notices.append(f"{field}: pixels of {x:.4g} nm are not plausible: pixel size unknown")
    elif abs(x - y) > 0.01 * max(x, y):
        notices.append(f"pixels of {x:.4g} x {y:.4g} nm are not square: pixel size unknown")
    else:
        return float(x)
    return None


def pixel_size_from_path(path, pattern, width_px) -> float | None:
    """Return the pixel size in nm that a file's path states, or None if it states none.

    Args:
        path: Path of the file.
        pattern: Regular expression with a group `fov`, the width of the field of view, or `pixel`,
            the pixel size. A group `unit` holds its unit; without one it is in nm.
        width_px: Width of the image in pixels.
    """
    match = re.search(pattern, str(path))
    groups = match.groupdict() if match else {}
    factor = unit_to_nm(groups.get("unit") or "nm")
    try:
        number = float((groups.get("pixel") or groups.get("fov") or "").replace(",", "."))
    except ValueError:
        return None
    if not factor or not number > 0:
        return None
    return number * factor / (1 if groups.get("pixel") else width_px)


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
        sizes = x, y, "pHYs chunk"
    return data[24], metadata, sizes


def read_tiff_metadata(tif, page):
    """Return (metadata, sizes as in `square_pixel_size`) of an open `tifffile.TiffFile`.

    A microscope's own header comes before the general resolution tag.

    Raises:
        Refusal: The image is a diffraction pattern.
    """
    metadata = {"format": "TIFF"}
    for read in READERS:
        try:
            sizes = read(tif, page, metadata)
        except Refusal:
            raise
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
    beam, image = header.get(header.get("Beam", {}).get("Beam"), {}), header.get("Image", {})
    if "HFW" in beam and "ResolutionX" in image:
        size = beam["HFW"] * 1e9 / image["ResolutionX"]
        return size, size, "FEI header"
    return None


def _read_fei_xml(tif, page, metadata):
    """Thermo Fisher, FEI Titan and Phenom: XML that names a pixel size and its unit."""
    text = next((text for text in _iterate_texts(tif, page, (34683, 34682)) if text[0] == "<"), "")
    if not text:
        return None
    metadata["instrument"] = "FEI"
    root = ElementTree.fromstring(text)
    sides = [(root.find(f".//PixelSize/{axis}"), "m") for axis in "XY"]
    if sides[0][0] is None:
        sides = [(root.find(f".//pixel{side}"), None) for side in ("Width", "Height")]
    found = [(each.text, each.get("unit", unit)) for each, unit in sides if each is not None]
    if not found:
        items = {data.findtext("Label", ""): data for data in root.iter("Data")}
        labels = sorted(label for label in items if re.search(r"pixel ?size", label, re.I))
        found = [(items[x].findtext("Value"), items[x].findtext("Unit")) for x in labels]
    return _convert_sizes(found, "FEI header")


def _iterate_texts(tif, page, codes):
    """Yield the texts of tags as they are stored, not as tifffile understands them."""
    for tag in (page.tags[code] for code in codes if code in page.tags):
        tif.filehandle.seek(tag.valueoffset)
        text = _decode(tif.filehandle.read(tag.valuebytecount))
        if text:
            yield text


def _convert_sizes(found, field):
    """Return sizes of one or two pairs (number, unit) of a header; refuse reciprocal units."""
    for _, unit in found:
        refuse_diffraction(unit)
    sizes = [float(value) * unit_to_nm(unit) for value, unit in found if unit_to_nm(unit)]
    return (sizes[0], sizes[-1], field) if sizes else None


def _decode(value):
    """Return the text of a tag, which may be bytes or numbers."""
    if isinstance(value, bytes | tuple | list):
        value = bytes(value).decode("utf-8", "replace")
    return str(value).strip("\0\1 \r\n\t\ufeff")


def _read_jeol(tif, page, metadata):
    """JEOL's cameras: XML in the description; the resolution is that of the camera itself."""
    if not _decode(page.tags.valueof("Make", "")).startswith("JEOL"):
        return None
    metadata["instrument"] = "JEOL"
    root = ElementTree.fromstring(_decode(page.description))
    mode = root.findtext(".//ImageFormingSystem/ModeString")
    if root.findtext(".//EosMode") != "eosTEM":
        return None
    if mode == "DIFF":
        raise _make_refusal("JEOL's header says DIFF")
    x, y = _read_resolution_tags(page)
    magnification = float(root.findtext(".//ImageFormingSystem/SelectorValue"))
    return (x / magnification, y / magnification, "JEOL header") if mode == "MAG" else None


def _read_tescan(tif, page, metadata):
    """TESCAN: lines "name=value" in metres, among other bytes."""
    text = _decode(page.tags.valueof(50431, ""))
    sizes = dict(re.findall(r"(PixelSize[XY]) *= *([-+.\deE]+)", text))
    if "PixelSizeX" not in sizes:
        return None
    metadata["instrument"] = "TESCAN"
    x = float(sizes["PixelSizeX"]) * 1e9
    return x, float(sizes.get("PixelSizeY", sizes["PixelSizeX"])) * 1e9, "TESCAN header"


def _read_tvips(tif, page, metadata):
    """TVIPS: nanometres."""
    header = tif.tvips_metadata
    if not header or "PixelSizeX" not in header:
        return None
    metadata["instrument"] = "TVIPS"
    return float(header["PixelSizeX"]), float(header["PixelSizeY"]), "TVIPS header"


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
    codes = (65009, 65010 if 65010 in page.tags else 65009)
    return _convert_sizes([(page.tags[code].value, unit) for code in codes], "Gatan tags")


def _read_ome(tif, page, metadata):
    if not tif.is_ome:
        return None
    metadata["instrument"] = "OME"
    images = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]
    parts = [each["Pixels"] for each in (images if isinstance(images, list) else [images])]
    shape = {"SizeX": page.imagewidth, "SizeY": page.imagelength}
    same = (each for each in parts if all(each.get(key) == shape[key] for key in shape))
    header = next(same, parts[0])
    found = [
        (header[f"PhysicalSize{axis}"], header.get(f"PhysicalSize{axis}Unit", "µm"))
        for axis in "XY"
        if f"PhysicalSize{axis}" in header
    ]
    return _convert_sizes(found, "OME header")


def _read_imagej(tif, page, metadata):
    """ImageJ: pixels per unit in the resolution tags, the unit in its own header."""
    if not tif.imagej_metadata:
        return None
    metadata["instrument"] = "ImageJ"
    unit = tif.imagej_metadata.get("unit", "")
    (x, x_over), (y, y_over) = page.tags["XResolution"].value, page.tags["YResolution"].value
    if not (x and y):
        return None
    sizes = _convert_sizes([(x_over / x, unit), (y_over / y, unit)], "ImageJ header")
    # ImageJ takes these two over from the resolution tag of the file that it opened
    is_tag = unit_to_nm(unit) in (UNITS_NM["inch"], UNITS_NM["cm"])
    return (*sizes[:2], RESOLUTIONS[0]) if sizes and is_tag else sizes


def _read_resolution(tif, page, metadata):
    if tif.imagej_metadata or "ResolutionUnit" not in page.tags:
        return None
    return *_read_resolution_tags(page), RESOLUTIONS[0]


def _read_resolution_tags(page):
    """Return the sides of a pixel in nm by the resolution tags, 0 if they state none."""
    unit = int(page.tags["ResolutionUnit"].value)
    factor = {2: UNITS_NM["inch"], 3: UNITS_NM["cm"]}.get(unit, 0.0)
    sides = (page.tags[name].value for name in ("XResolution", "YResolution"))
    return tuple(factor * over / pixels if pixels else 0.0 for pixels, over in sides)


READERS = (
    _read_ours,
    _read_fei,
    _read_fei_xml,
    _read_zeiss,
    _read_sis,
    _read_gatan,
    _read_jeol,
    _read_tescan,
    _read_tvips,
    _read_ome,
    _read_imagej,
    _read_resolution,
)
