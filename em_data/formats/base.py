"""What every format gives: images as they are stored in a file, one after the other."""

from dataclasses import dataclass

import numpy as np

from em_data.refusal import Refusal as Refusal


@dataclass
class Stored:
    """One image as its file stores it.

    Args:
        array: [H, W] or [H, W, 1..4], of any type.
        metadata: What the file says about the image; "format", and "notices" for the user.
        pixel_size_nm: Side of a pixel in nm; None if unknown.
        frame: Number of the image in a stack, from 0; None if the file holds one micrograph.
        name: Title of the image in a file of several images, such as "HAADF"; else None.
    """

    array: np.ndarray
    metadata: dict
    pixel_size_nm: float | None = None
    frame: int | None = None
    name: str | None = None
