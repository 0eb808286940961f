"""Tell masks and label maps from micrographs by their pixels."""

import re
from pathlib import PurePath

import numpy as np

from em_data.spikes import iterate_slabs

MAX_LEVELS = 16  # grey levels of a map of classes
MIN_FLAT, MIN_FLAT_NAMED = 0.6, 0.9  # shares of pixels that equal their neighbours
WORDS = re.compile(
    r"(?<![a-z])(masks?|labels?|segs?|segm|segmented|segmentations?|semantics?|instances?|gt|truth"
    r"|annot(ations?|ated)?|json|classes|panoptic|trimaps?)(?![a-z])",
    re.IGNORECASE,
)

FIRST = re.compile(rf"^{WORDS.pattern}[-_ .]*", re.IGNORECASE)
FROM_THERE = re.compile(rf"[-_ .]*{WORDS.pattern}.*$", re.IGNORECASE)


def is_label_image(image: np.ndarray, name: str) -> bool:
    """Return True if an image [H, W] has two grey levels, or large regions of the same level.

    Up to 16 levels in flat regions are labels. Instances can have more levels: then the name must
    also have a word such as mask, seg or instances.
    """
    rows = image[:: max(1, len(image) // 64)]
    if np.mean(rows[:, 1:] == rows[:, :-1]) < MIN_FLAT:  # true of nearly all micrographs
        return count_levels(image) <= 2
    here = image[:-1, :-1]
    flat = np.mean((here == image[1:, :-1]) & (here == image[:-1, 1:]))
    num_levels = count_levels(image)
    if num_levels <= 2 or (num_levels <= MAX_LEVELS and flat >= MIN_FLAT):
        return True
    path = PurePath(name)
    return bool(flat >= MIN_FLAT_NAMED and WORDS.search(f"{path.parent.name} {path.stem}"))


def count_levels(image: np.ndarray) -> int:
    """Return the number of distinct grey levels of a uint8 or uint16 image."""
    counts = np.zeros(np.iinfo(image.dtype).max + 1, np.int64)
    for rows in iterate_slabs(image):
        counts += np.bincount(image[rows].ravel(), minlength=len(counts))
    return int(np.count_nonzero(counts))


def list_stems(path: PurePath) -> set[str]:
    """Return the names without a suffix that the micrograph of a label image may have."""
    stems = {_drop_word(path.stem)}
    if WORDS.search(path.parent.name):
        stems |= {path.stem, _drop_word(path.parent.name)}
    return stems - {""}


def _drop_word(name):
    without = FIRST.sub("", name)
    return without if without != name else FROM_THERE.sub("", name)
