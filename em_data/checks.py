"""Find micrographs that cannot be used, before training starts."""

import hashlib

import numpy as np

from em_data.sources.base import SourceLost
from em_data.views import ELEMENTS, apply_symmetry


def find_problem(micrograph, min_side_px) -> str | None:
    """Return why a micrograph cannot be used (it is too small or constant), or None."""
    image = micrograph.image
    height, width = image.shape
    if min(height, width) < min_side_px:
        return (
            f"{micrograph.name}: {height} x {width} pixels, smaller than one tile of {min_side_px}"
        )
    if image.min() == image.max():
        return f"{micrograph.name}: constant: every pixel is {int(image.min())}"
    return None


def hash_pixels(image) -> str:
    """Return a hash of an image [H, W] that its rotated and flipped copies share.

    It is the hash of one view in a normal position: the view whose sums over rows and columns come
    first in order or, of several such views, the one with the least hash.
    """
    rows, columns = image.sum(axis=1, dtype=np.int64), image.sum(axis=0, dtype=np.int64)
    profiles = {}
    for name, (transpose, flip_rows, flip_columns) in ELEMENTS.items():
        down, across = (columns, rows) if transpose else (rows, columns)
        down, across = down[::-1] if flip_rows else down, across[::-1] if flip_columns else across
        profiles[name] = (len(down), down.tolist(), across.tolist())
    first = min(profiles.values())
    digests = []
    for name in (name for name, profile in profiles.items() if profile == first):
        view = np.ascontiguousarray(apply_symmetry(image, name))
        digest = hashlib.blake2b(repr((view.shape, view.dtype.str)).encode(), digest_size=16)
        digest.update(view.data)
        digests.append(digest.hexdigest())
    return min(digests)


def read_all(entries, min_side_px, problems):
    """Yield (entry, micrograph) of usable entries; append a sentence per other one to problems."""
    for entry in entries:
        try:
            micrograph = entry.read()
        except SourceLost:
            raise
        except ValueError as error:
            problems.append(str(error))
            continue
        problem = find_problem(micrograph, min_side_px)
        if problem:
            problems.append(problem)
        else:
            yield entry, micrograph


def summarise_problems(problems, num_images, on_bad_image, ignored=()) -> str | None:
    """Return a summary of the images that cannot be used, or None if there are none.

    Args:
        problems: One sentence per image.
        num_images: Number of images in the source.
        on_bad_image: "skip" or "fail".
        ignored: Sentences on what was not looked at.

    Raises:
        ValueError: No image is left, or `on_bad_image` is "fail". The message is the summary.
    """
    if not problems:
        return None
    text = "\n  ".join([f"{len(problems)} of {num_images} images cannot be used:", *problems])
    if len(problems) == num_images:
        others = "".join(f"\n  not looked at: {each}" for each in ignored)
        raise ValueError(f"{text}{others}\nNothing is left. The reasons are listed above.")
    if on_bad_image == "fail":
        raise ValueError(f"{text}\nRepair or remove them, or use --tiles.on-bad-image skip.")
    return text
