"""Notes on the sets of images that are judged together: sizes of pixels, shared micrographs."""

from collections.abc import Sequence

import numpy as np

from em_data.tiles import Tiles
from em_evaluation.evaluator import RealImages
from em_generation.candidates import Candidate


def find_pixel_size(images) -> float | None:
    """Return the pixel size of a folder or of tiles in nm; None if unknown or not the same."""
    if not isinstance(images, Tiles):
        return images.pixel_size_nm
    sizes = [images.cut.micrographs[i]["pixel_size_nm"] for i in images.micrograph_ids]
    if not all(sizes) or not _agree(min(sizes), max(sizes)):
        return None
    return float(np.median(sizes))


def describe_sets(real: RealImages, candidates: Sequence[Candidate]) -> list[str]:
    """Return a sentence per set whose pixel size differs, and per training that saw the reference.

    Args:
        real: The reference, and the training tiles if they are known.
        candidates: What is judged, cut into tiles where it is.
    """
    sets = [
        (each.name, find_pixel_size(each.images)) for each in candidates if each.images is not None
    ]
    if real.train is not None:
        sets.append(("the training data", find_pixel_size(real.train)))
    size = find_pixel_size(real.held_out)
    return [
        f"{name}: {other:.4g} nm per pixel, the reference: {size:.4g} nm. The distance compares "
        "magnifications, too. Give images of one pixel size."
        for name, other in sets
        if size and other and not _agree(size, other)
    ] + _describe_overlap(real)


def _describe_overlap(real: RealImages) -> list[str]:
    if not isinstance(real.train, Tiles) or not isinstance(real.held_out, Tiles):
        return []
    sides = (real.train, real.held_out)
    train, held_out = (
        [side.cut.micrographs[i] for i in side.micrograph_ids.tolist()] for side in sides
    )
    seen = {each["pixel_hash"] for each in train}
    shared = [each["name"] for each in held_out if each["pixel_hash"] in seen]
    if not shared:
        return []
    return [
        f"{len(shared)} of {len(held_out)} micrographs of the reference are also among the "
        f"training micrographs (such as {shared[0]}): scores are too good. Leave them out of the "
        "reference."
    ]


def _agree(first: float, second: float) -> bool:
    """Return whether two pixel sizes are equal within 1 %."""
    return abs(first - second) <= 0.01 * max(first, second)
