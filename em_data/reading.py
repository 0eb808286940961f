"""Read image files as micrographs: grey, 8 or 16 bits."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from em_data.formats import decode, microscopes
from em_data.formats.base import Refusal, explain_failure, orient
from em_data.formats.colour import refuse_overlay, to_grey
from em_data.intensity import describe_spikes, float_to_uint16
from em_data.label_bar import find_label_bar
from em_data.micrograph import Micrograph
from em_data.refusal import STACK
from em_data.valid_area import mark_fill, remove_nan

SUFFIXES = (
    *(".tif", ".tiff", ".btf", ".tf8", ".tf2", ".ptif", ".png", ".jpg", ".jpeg", ".jpe", ".jfif"),
    *(".bmp", *microscopes.SUFFIXES),
)


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
        raise ValueError(f"{micrograph.name.rsplit('#', 1)[0]}: {STACK}")
    return micrograph


def read_micrographs(
    path: str | Path | bytes,
    *,
    label_bar: str = "crop",
    name: str | None = None,
    specimen: str | None = None,
    frame_step: int = 1,
) -> Iterator[Micrograph]:
    """Return an iterator over the micrographs of a file: one, or one per frame of a stack.

    The format is found by the content of the file, not by its suffix. The image is grey or has
    three equal channels. 8 and 16 bits are kept as they are; floats and wider integers are scaled
    to 16 bits by their least and largest value, spikes apart. Of several images in a file, the
    largest grey one is read. What was done is listed in metadata["notices"]. Memory holds one
    frame at a time.

    A frame that cannot be used raises a `ValueError`. The iterator then goes on with the next one.

    Args:
        path: A TIFF, PNG, JPEG or BMP file, a file of a microscope, or the bytes of one.
        label_bar: What to do with a label bar at the bottom: "crop", "keep" or "refuse".
        name: Name in messages. Default: the path.
        specimen: Name of the specimen.
        frame_step: Every how many frames of a stack are read.

    Raises:
        ValueError: The file or a frame cannot be used. The message names the file, the reason and a
            remedy.
    """
    return _Micrographs(path, label_bar, name, specimen, frame_step)


class _Micrographs:
    """Iterates over the micrographs of a file, and goes on after a frame that is refused."""

    def __init__(self, path, label_bar, name, specimen, frame_step):
        source = path if isinstance(path, bytes) else Path(path)
        self.name = name or ("image" if isinstance(path, bytes) else str(path))
        self.label_bar, self.specimen = label_bar, specimen
        self.images = decode(source, frame_step)

    def __iter__(self):
        return self

    def __next__(self):
        name = self.name
        try:
            stored = next(self.images)
            name = _name_image(name, stored)
            return finish(stored, self.label_bar, name, self.specimen)
        except OSError as error:
            raise ValueError(f"{name}: cannot be read: {error.strerror or error}") from error
        except (Refusal, MemoryError, OverflowError) as error:
            refusal = explain_failure(error)
            raise ValueError(f"{name}: {refusal}") from refusal.__cause__


def _name_image(name, stored):
    """Return the name of an image of a file: FILE, FILE#0003, FILE#HAADF or FILE#HAADF#0003."""
    name = name if stored.name is None else f"{name}#{stored.name}"
    return name if stored.frame is None else f"{name}#{stored.frame:04d}"


def finish(stored, label_bar, name, specimen) -> Micrograph:
    """Return the micrograph of an image as it is stored, a `Stored`.

    Raises:
        Refusal: The image cannot be used, or has a label bar that `label_bar` refuses.
    """
    if isinstance(stored.array, Refusal):
        raise stored.array
    metadata, notices = stored.metadata, stored.metadata["notices"]
    image, overlay = to_grey(stored.array, stored.is_lossy, notices), stored.overlay
    # the decoder keeps `stored` until the next frame
    stored.array, stored.overlay = np.empty(0), None
    num_rows = len(image) - metadata.get("scanned_rows", len(image))
    full_shape, corner = image.shape, (0, 0)
    image = _crop(image, num_rows, metadata, label_bar, ", as the file's header says")
    if stored.orientation != 1:
        image = orient(image, stored.orientation)
        full_shape = image.shape
        overlay = overlay if overlay is None else orient(overlay, stored.orientation)
        notices.append(f"turned as its orientation tag ({stored.orientation}) says")
        metadata["orientation"] = stored.orientation
    is_kept_as_it_is = image.dtype.kind == "u" and image.dtype.itemsize <= 2
    if image.dtype.kind in "iuf" and not is_kept_as_it_is and image.size:
        image = mark_fill(image, notices)
    if image.dtype.kind == "f":
        image, corner = remove_nan(image, notices)
    image = to_uint(image, metadata)
    num_rows = 0 if label_bar == "keep" else find_label_bar(image)
    image = _crop(image, num_rows, metadata, label_bar)
    if overlay is not None:
        refuse_overlay(overlay[: len(image)], notices)
    if image.shape != full_shape:  # where labels of the whole image have these pixels
        metadata |= {"full_shape": list(full_shape), "corner_px": list(corner)}
    if stored.frame is not None:
        metadata["frame"] = stored.frame
    return Micrograph(image, name, stored.pixel_size_nm, specimen, metadata)


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
        return image * np.uint8(255)
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
