"""Images that cannot be used, found before training and not in the middle of it."""

import hashlib

import numpy as np

from em_data.views import ELEMENTS, apply_symmetry


class SourceLost(ValueError):
    """The source cannot be read on: no fault of one image, which would be named and left out."""


def find_problem(micrograph, min_side_px):
    """Return a sentence on why a micrograph that was read cannot be used, or None: too small, or constant."""
    image = micrograph.image
    height, width = image.shape
    if min(height, width) < min_side_px:
        return (
            f"{micrograph.name}: {height} x {width} pixels, smaller than one tile of {min_side_px}"
        )
    if image.min() == image.max():
        return f"{micrograph.name}: constant: every pixel is {int(image.min())}"
    return None


def hash_pixels(image):
    """Return a hash of an image [H, W] that its turned and flipped copies share, and no other image.

    It is the hash of the view whose sums over rows and columns come first in order; of several, the least hash. The sums of
    every view are those of the image, reversed or exchanged, so that mostly one view is hashed and not eight.
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
        digest.update(view)
        digests.append(digest.hexdigest())
    return min(digests)


def read_all(entries, min_side_px, problems):
    """Yield (entry, micrograph) of each usable entry; append a sentence to `problems` for each other one."""
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


def summarise_problems(problems, num_images, on_bad_image, ignored=()):
    """Return the one summary of all images that cannot be used; ValueError with it if that is fatal.

    It is fatal if on_bad_image is "fail", or if nothing is left; `ignored` says what was not even looked at, perhaps the better part.
    """
    if not problems:
        return None
    text = f"{len(problems)} of {num_images} images cannot be used:\n" + "\n".join(
        f"  {each}" for each in problems
    )
    if len(problems) == num_images:
        others = "".join(f"\n  not looked at: {each}" for each in ignored)
        raise ValueError(f"{text}{others}\nNothing is left; see each reason above")
    if on_bad_image == "fail":
        raise ValueError(f"{text}\nMend or remove them, or use --tiles.on-bad-image skip")
    return text
