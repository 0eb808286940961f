"""Labels beside their micrographs: the same name but for a word such as mask, and the same size."""

import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import PIL.Image

from em_data.label_images import WORDS, list_stems


def find_paired_labels(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Return the images that are labels of another one.

    Such an image has a word in its name or in that of its folder, as `image_seg.png`,
    `gt_image.png`, `segs/image.png` or `image_json/label.png`. Without the word, it has the name
    of an image in the same folder, in the folder above or in one beside, and that image has the
    same size.

    Args:
        folder: What `paths` are relative to.
    """
    plain, marked = defaultdict(list), []
    for path in paths:
        if WORDS.search(path.stem) or WORDS.search(path.parent.name):
            marked.append(path)
        else:
            plain[path.stem].append(path)
    return [path for path in marked if _has_micrograph(folder, path, plain)]


def _has_micrograph(folder, path, plain):
    near = {path.parent, path.parent.parent}
    in_folder = bool(WORDS.search(path.parent.name))
    for stem in list_stems(path):
        for other in plain.get(stem, ()):
            is_beside = in_folder and other.parent.parent == path.parent.parent
            if other.parent in near or is_beside:
                size = _read_size(folder / path)
                if size is not None and size == _read_size(folder / other):
                    return True
    return False


def _read_size(path):
    """Return (width, height) from the header of an image; None if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(path) as image:
                return image.size
    except Exception:  # of a damaged file, which the reader explains
        return None
