"""What every format gives: images as they are stored in a file, one after the other."""

from dataclasses import dataclass

import numpy as np

from em_data.refusal import Refusal as Refusal

MAX_PIXELS = 2**29  # of one image: 1 GiB with 16 bits
MAX_PAGES = 20_000  # of one file


class Coloured(Refusal):
    """An image in true colours."""


@dataclass
class Stored:
    """One image as its file stores it.

    Args:
        array: [H, W] or [H, W, 1..4], of any type; or why this image of several cannot be used.
        metadata: What the file says about the image; "format", and "notices" for the user.
        pixel_size_nm: Side of a pixel in nm; None if unknown.
        frame: Number of the image in a stack, from 0; None if the file holds one micrograph.
        name: Title of the image in a file of several images, such as "HAADF"; else None.
        orientation: How to turn the array for display, 1 to 8 as in TIFF and EXIF.
        is_lossy: True if compression may have changed the channels of a grey image.
        overlay: Bool [H, W], pixels of a palette's few colours; None if there are none.
    """

    array: np.ndarray | Refusal
    metadata: dict
    pixel_size_nm: float | None = None
    frame: int | None = None
    name: str | None = None
    orientation: int = 1
    is_lossy: bool = False
    overlay: np.ndarray | None = None


def check_size(height: int, width: int) -> None:
    """Refuse an image of more than `MAX_PIXELS`, before memory is taken for it."""
    if height * width > MAX_PIXELS:
        raise Refusal(
            f"{height:,} x {width:,} pixels, but at most {MAX_PIXELS / 1e6:.0f} million are read "
            "at a time. Save it in parts."
        )


def explain_failure(error: Exception) -> Refusal:
    """Return the refusal for an error of a decoder, which may raise anything on a damaged file."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, MemoryError):
        return Refusal("needs more memory than there is. Save it in parts.")
    first = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
    return Refusal(f"unreadable or truncated ({first}). Copy it again.")


def orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and flip an array [H, W, ...] as stored into the one to display.

    Args:
        orientation: 1 to 8, as in TIFF and EXIF: 2 to 4 flip or turn by half, 5 to 8 swap the axes.
    """
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)
