"""Read image files as micrographs: grey, 8 or 16 bits."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from em_data.formats import Refusal, decode, microscopes
from em_data.intensity import describe_spikes, float_to_uint16
from em_data.label_bar import find_label_bar
from em_data.micrograph import Micrograph

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", *microscopes.SUFFIXES)
JPEG_TOLERANCE = 2  # grey levels by which JPEG compression makes the channels of grey differ


def read_micrograph(
    path: str | Path | bytes,
    *,
    label_bar: str = "crop",
    name: str | None = None,
    specimen: str | None = None,
) -> Micrograph:
    """Read the one micrograph of a file; see `read_micrographs`.

    Raises:
        ValueError: The file cannot be used, or holds several frames.
    """
    frames = read_micrographs(path, label_bar=label_bar, name=name, specimen=specimen)
    micrograph = next(frames)
    if next(frames, None) is not None:
        raise ValueError(f"{micrograph.name}: a stack of frames. Save each frame to a file.")
    return micrograph


def read_micrographs(
    path: str | Path | bytes,
    *,
    label_bar: str = "crop",
    name: str | None = None,
    specimen: str | None = None,
) -> Iterator[Micrograph]:
    """Yield the micrographs of a file: one, or one per frame of a stack.

    The format is found by the content of the file, not by its suffix. The image is grey or has
    three equal channels. 8 and 16 bits are kept as they are; floats and wider integers are scaled
    to 16 bits by their least and largest value, spikes apart. What was done is listed in
    metadata["notices"].

    Args:
        path: A TIFF, PNG, JPEG or BMP file, a file of a microscope, or the bytes of one.
        label_bar: What to do with a label bar at the bottom: "crop", "keep" or "refuse".
        name: Name in messages. Default: the path.
        specimen: Name of the specimen.

    Raises:
        ValueError: The file cannot be used. The message names the file, the reason and a remedy.
    """
    if isinstance(path, bytes):
        source: bytes | Path = path
        name = name or "image"
    else:
        source, name = Path(path), name or str(path)
    try:
        for stored in decode(source):
            yield _finish(stored, label_bar, name, specimen)
    except Refusal as refusal:
        raise ValueError(f"{name}: {refusal}") from refusal.__cause__
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror or error}") from error


def _finish(stored, label_bar, name, specimen):
    """Return the micrograph of an image as it is stored."""
    metadata = stored.metadata
    image = _to_grey(stored.array, metadata)
    num_rows = len(image) - metadata.get("scanned_rows", len(image))
    image = _crop(image, num_rows, metadata, label_bar, ", as the file's header says")
    image = to_uint(image, metadata)
    num_rows = 0 if label_bar == "keep" else find_label_bar(image)
    image = _crop(image, num_rows, metadata, label_bar)
    if stored.name is not None:
        name = f"{name}#{stored.name}"
    if stored.frame is not None:
        metadata["frame"] = stored.frame
        name = f"{name}#{stored.frame:04d}"
    return Micrograph(image, name, stored.pixel_size_nm, specimen, metadata)


def _to_grey(array, metadata):
    """Return the grey image [H, W] of an array [H, W] or [H, W, 1..4]."""
    if array.ndim == 3 and array.shape[-1] in (2, 4):
        alpha = array[..., -1]
        if alpha.min() != alpha.max():
            raise Refusal("partly transparent. Export it without an alpha channel.")
        array = array[..., :-1]
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        return array
    if array.ndim != 3 or array.shape[-1] != 3:
        raise Refusal(f"shape {list(array.shape)}, but a micrograph is grey [height, width].")
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
    raise Refusal(
        f"a coloured image: its channels differ on {share:.3g} % of the pixels, by up to "
        f"{largest:.5g}. Export it in grey, without overlays."
    )


def to_uint(image, metadata):
    """Return a real image [H, W] as uint8 or uint16, and note in `metadata` how it was scaled.

    Raises:
        ValueError: The image is empty or complex, or holds NaN or infinite values.
    """
    if 0 in image.shape:
        raise Refusal(f"no pixels ({image.shape[0]} x {image.shape[1]}). Copy it again.")
    stored = metadata["stored_as"] = image.dtype.name
    if image.dtype in (np.uint8, np.uint16):
        return image.astype(image.dtype.newbyteorder("="), copy=False)
    if image.dtype == np.bool_:
        metadata["notices"].append("one bit per pixel: written as 0 and 255")
        return image.astype(np.uint8) * np.uint8(255)
    if image.dtype.kind not in "iuf":
        raise Refusal(f"pixels of type {stored}. Export real, not complex, values as TIFF.")
    if image.dtype.kind == "f" and np.isnan(image).any():
        raise Refusal(f"{np.isnan(image).sum()} pixels are NaN. Replace them before use.")
    try:
        scaled, low, high, spikes = float_to_uint16(image)
    except ValueError:
        num_bad = np.isinf(image).sum()
        raise Refusal(f"{num_bad} pixels are infinite. Replace them before use.") from None
    if len(spikes):
        metadata["num_spikes"] = len(spikes)
        most = np.abs(image[np.unravel_index(spikes, image.shape)].astype(np.float64)).max()
        metadata["notices"].append(
            f"{describe_spikes(len(spikes), image.size)}, of up to {most:.6g}: clipped"
        )
    if (low, high) != (0.0, 65535.0):
        metadata["scaled_from"] = [low, high]
        metadata["notices"].append(
            f"{stored} scaled to 16 bits: {low:.6g} to 0, {high:.6g} to 65535"
        )
    return scaled


def _crop(image, num_rows, metadata, label_bar, reason=""):
    """Remove a label bar of `num_rows` at the bottom, if there is one."""
    if label_bar == "keep" or not 0 < num_rows < len(image):
        return image
    if label_bar == "refuse":
        raise Refusal(f"a label bar of {num_rows} rows at the bottom. Use --tiles.label-bar crop.")
    metadata["notices"].append(f"label bar of {num_rows} rows cropped{reason}")
    return image[:-num_rows]


def natural_key(name):
    """Return a sort key that puts frame 2 before frame 10."""
    parts = re.split(r"(\d+)", str(name))
    return [int(part) if part.isdigit() else part.lower() for part in parts], str(name)
