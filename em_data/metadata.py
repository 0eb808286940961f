"""What a file says of its image: the pixel size first."""

import struct
import xml.etree.ElementTree as ElementTree

# Coarser than this is the resolution of a printer or a screen (72 dpi is 352,778 nm), not of an electron microscope.
MAX_PIXEL_SIZE_NM = 10_000.0
UNITS_NM = {
    "m": 1e9, "cm": 1e7, "mm": 1e6, "um": 1e3, "µm": 1e3, "μm": 1e3, "\\u00b5m": 1e3, "micron": 1e3, "microns": 1e3,
    "micrometer": 1e3, "nm": 1.0, "nanometer": 1.0, "a": 0.1, "å": 0.1, "angstrom": 0.1, "pm": 1e-3,
    "inch": 2.54e7, "in": 2.54e7,
}  # fmt: skip


def unit_to_nm(unit):
    """Return the nanometres of one unit of length ("um", "µm", "nm", "m", ...), or None for one that is unknown."""
    return UNITS_NM.get(str(unit).strip().lower())


def square_pixel_size(sizes, notices):
    """Return the one pixel size in nm of (x, y) sizes from a file, or None; say in `notices` why one is not used.

    sizes: None, or (x_nm, y_nm, where) with `where` naming the field that holds them.
    """
    if sizes is None:
        return None
    x, y, where = sizes
    if not (0 < x < float("inf") and 0 < y < float("inf")):
        return None
    if max(x, y) > MAX_PIXEL_SIZE_NM:
        notices.append(
            f"{where} of {2.54e7 / x:.4g} dpi is a printer's, not a microscope's: pixel size unknown"
        )
        return None
    if abs(x - y) > 0.01 * max(x, y):
        notices.append(f"pixels of {x:.4g} x {y:.4g} nm are not square: pixel size unknown")
        return None
    return float(x)


def read_png_metadata(data):
    """Return (bit depth, metadata, sizes) of a PNG file's bytes; sizes as in `square_pixel_size`."""
    depth, metadata, sizes, position = data[24], {"format": "PNG"}, None, 8
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body = data[position + 8 : position + 8 + length]
        if kind == b"pHYs" and len(body) == 9:
            x, y, unit = struct.unpack(">IIB", body)
            if unit == 1 and x and y and sizes is None:
                sizes = 1e9 / x, 1e9 / y, "pHYs"
        elif kind == b"tEXt" and b"\0" in body:
            key, _, text = body.partition(b"\0")
            metadata[key.decode("latin-1")] = text.decode("latin-1")
        elif kind == b"IEND":
            break
        position += 12 + length
    if "pixel_size_nm" in metadata:  # exact, where pHYs holds whole pixels per metre only
        size = _to_float(metadata["pixel_size_nm"])
        sizes = (size, size, "pixel_size_nm") if size else sizes
    return depth, metadata, sizes


def read_tiff_metadata(tif, page):
    """Return (metadata, sizes) of an open tifffile.TiffFile; the microscope's own header is asked first."""
    metadata = {"format": "TIFF"}
    readers = (
        _read_shaped,
        _read_fei,
        _read_zeiss,
        _read_sis,
        _read_gatan,
        _read_ome,
        _read_imagej,
        _read_resolution,
    )
    for read in readers:
        try:
            sizes = read(tif, page, metadata)
        except (
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            ElementTree.ParseError,
        ) as error:
            metadata[f"unreadable{read.__name__}"] = str(error)[:80]
            continue
        if sizes is not None:
            return metadata, sizes
    return metadata, None


def _to_float(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _read_shaped(tif, page, metadata):
    """Our own files: JSON in the description, written by `em_data.write_image`."""
    for description in tif.shaped_metadata or ():
        size = _to_float(description.get("pixel_size_nm"))
        if size:
            return size, size, "pixel_size_nm"
    return None


def _read_fei(tif, page, metadata):
    """FEI and Thermo Fisher: metres, and the rows that were scanned (below them lies the label bar)."""
    header = tif.fei_metadata
    if not header:
        return None
    metadata["instrument"] = "FEI"
    for section, keys in {"Beam": ("HV",), "System": ("Type",), "Detectors": ("Name",)}.items():
        for key in keys:
            if key in header.get(section, {}):
                metadata[key] = header[section][key]
    rows = header.get("Image", {}).get("ResolutionY")
    if isinstance(rows, int):
        metadata["scanned_rows"] = rows
    for section in ("Scan", "EScan", "IScan"):
        if "PixelWidth" in header.get(section, {}):
            scan = header[section]
            return (
                scan["PixelWidth"] * 1e9,
                scan.get("PixelHeight", scan["PixelWidth"]) * 1e9,
                "FEI header",
            )
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
    """DigitalMicrograph's export: unit in tags 65003 and 65004, scale in 65009 and 65010."""
    if 65009 not in page.tags or 65003 not in page.tags:
        return None
    metadata["instrument"] = "Gatan"
    unit = page.tags[65003].value
    factor = unit_to_nm(
        bytes(unit).decode("latin-1").strip("\0") if isinstance(unit, bytes | tuple) else unit
    )
    x = float(page.tags[65009].value)
    y = float(page.tags[65010].value) if 65010 in page.tags else x
    return (x * factor, y * factor, "Gatan tags") if factor else None


def _read_ome(tif, page, metadata):
    if not tif.is_ome:
        return None
    metadata["instrument"] = "OME"
    for element in ElementTree.fromstring(tif.ome_metadata).iter():
        if element.tag.endswith("}Pixels") and "PhysicalSizeX" in element.attrib:
            attributes = element.attrib
            x = float(attributes["PhysicalSizeX"]) * unit_to_nm(
                attributes.get("PhysicalSizeXUnit", "µm")
            )
            y = attributes.get("PhysicalSizeY")
            y = x if y is None else float(y) * unit_to_nm(attributes.get("PhysicalSizeYUnit", "µm"))
            return x, y, "OME header"
    return None


def _read_imagej(tif, page, metadata):
    header = tif.imagej_metadata
    if not header:
        return None
    metadata["instrument"] = "ImageJ"
    factor = unit_to_nm(header.get("unit", ""))
    return _from_resolution(page, factor, "ImageJ header") if factor else None


def _read_resolution(tif, page, metadata):
    if tif.imagej_metadata or "ResolutionUnit" not in page.tags:
        return None
    factor = {2: 2.54e7, 3: 1e7}.get(int(page.tags["ResolutionUnit"].value))
    return _from_resolution(page, factor, "resolution tag") if factor else None


def _from_resolution(page, factor, where):
    (x, x_over), (y, y_over) = page.tags["XResolution"].value, page.tags["YResolution"].value
    if not (x and y):
        return None
    return factor * x_over / x, factor * y_over / y, where
