"""Columns of a data set: which one holds the images, and images that are stored as arrays."""

import math

import numpy as np

from em_data.label_images import WORDS
from em_data.refusal import Refusal

IMAGE_NAMES = ("image", "images", "img", "micrograph", "picture")


def list_image_columns(features) -> list[str]:
    """Return the columns that can hold images, the likeliest first.

    The likeliest is called image, and one called mask or annotation is the last. Of equal names,
    encoded images come before arrays and arrays before lists of numbers.
    """
    ranks = {}
    for name, feature in features.items():
        kind = _rank_kind(feature)
        if kind is not None:
            sense = 0 if name.lower() in IMAGE_NAMES else 2 if WORDS.search(name) else 1
            ranks[name] = (sense, kind)
    return sorted(ranks, key=ranks.__getitem__)


def _rank_kind(feature):
    import datasets

    for kind, form in enumerate((datasets.Image, datasets.Array2D, datasets.Array3D)):
        if isinstance(feature, form):
            return kind
    depth, leaf = 0, feature
    while (inner := getattr(leaf, "feature", None)) is not None or isinstance(leaf, list):
        depth, leaf = depth + 1, leaf[0] if isinstance(leaf, list) else inner
    is_number = np.dtype(leaf.dtype).kind in "iuf" if _has_dtype(leaf) else False
    return 3 if depth in (2, 3) and is_number else None


def _has_dtype(leaf):
    try:
        return np.dtype(leaf.dtype) is not None
    except (AttributeError, TypeError):
        return False


def find_dtype(feature) -> np.dtype | None:
    """Return the type of the pixels of a column of arrays or lists; None of encoded images."""
    import datasets

    if isinstance(feature, datasets.Image):
        return None
    while not _has_dtype(feature) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return np.dtype(feature.dtype)


def to_plane(value, dtype) -> np.ndarray:
    """Return an array or nested lists of numbers as one grey image [H, W].

    Accepted are [H, W], and one or three equal channels before or behind.

    Raises:
        Refusal: The value is not an image.
    """
    try:
        array = np.asarray(value, dtype)
    except (TypeError, ValueError) as error:
        raise Refusal(
            "rows of different lengths, or numbers missing. Store each image as [H, W]."
        ) from error
    if array.ndim == 3:
        if array.shape[-1] not in (1, 3) and array.shape[0] in (1, 3):
            array = np.moveaxis(array, 0, -1)
        if array.shape[-1] not in (1, 3):
            raise Refusal(
                f"shape {list(array.shape)}, which is no image. Store each frame in a row of its "
                "own, as [H, W]."
            )
        if (array != array[..., :1]).any():
            raise Refusal("a coloured image: its channels differ. Store it in grey, as [H, W].")
        array = array[..., 0]
    if array.ndim != 2:
        raise Refusal(f"shape {list(array.shape)}, but a micrograph is grey [H, W].")
    return np.ascontiguousarray(array)


def read_size(value) -> float | None:
    """Return a pixel size of a column; None if it is null, NaN or not positive."""
    try:
        size = float(value)
    except (TypeError, ValueError):
        return None
    return size if math.isfinite(size) and size > 0 else None
