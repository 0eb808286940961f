"""Images that cannot be used, found before training and not in the middle of it."""

import hashlib

import numpy as np

from em_data.views import ELEMENTS, apply_symmetry


def find_problem(micrograph, min_side_px):
    """Return a sentence on why a micrograph that was read cannot be used, or None: too small, or constant."""
    image = micrograph.image
    height, width = image.shape
    if min(height, width) < min_side_px:
        return f"{micrograph.name}: {height} x {width} pixels, smaller than one tile of {min_side_px}"
    if image.min() == image.max():
        return f"{micrograph.name}: constant: every pixel is {int(image.min())}"
    return None


def hash_pixels(image):
    """Return a hash of an image [H, W] that its turned and flipped copies share, and no other image."""
    digests = []
    for symmetry in ELEMENTS:
        view = np.ascontiguousarray(apply_symmetry(image, symmetry))
        digest = hashlib.blake2b(repr((view.shape, view.dtype.str)).encode(), digest_size=16)
        digest.update(view)
        digests.append(digest.hexdigest())
    return min(digests)


def read_all(entries, min_side_px, problems):
    """Yield (entry, micrograph) of each usable entry; append a sentence to `problems` for each other one."""
    for entry in entries:
        try:
            micrograph = entry.read()
        except ValueError as error:
            problems.append(str(error))
            continue
        problem = find_problem(micrograph, min_side_px)
        if problem:
            problems.append(problem)
        else:
            yield entry, micrograph


def summarise_problems(problems, num_images, on_bad_image):
    """Return the one summary of all images that cannot be used; ValueError with it if that is fatal.

    It is fatal if on_bad_image is "fail", or if nothing is left.
    """
    if not problems:
        return None
    text = f"{len(problems)} of {num_images} images cannot be used:\n" + "\n".join(f"  {each}" for each in problems)
    if len(problems) == num_images:
        raise ValueError(f"{text}\nNothing is left; see each reason above")
    if on_bad_image == "fail":
        raise ValueError(f"{text}\nMend or remove them, or use --tiles.on-bad-image skip")
    return text
