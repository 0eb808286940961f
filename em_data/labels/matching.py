"""Which image a label belongs to: by its name, and by the folders around it."""

import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

from em_data.label_images import WORDS

# folders that say what files are, not which specimen they show
NEUTRAL = re.compile(
    r"images?|imgs?|micrographs?|data|raw|jpegimages|(masks?|labels?|annotations?)\d*"
    r"|(.*[-_ ])?(yolo|coco|darknet|polygons?|b?boxes)([-_ ].*)?",
    re.IGNORECASE,
)


class ImageIndex:
    """Finds images by the names in labels.

    Args:
        paths: Images, relative to the folder of the data.
    """

    def __init__(self, paths):
        self.paths = list(paths)
        self.by_stem = defaultdict(list)
        for path in self.paths:
            self.by_stem[path.stem].append(path)

    def find(self, name: str, file: Path) -> list[Path]:
        """Return the images that a name in a table or a COCO file may mean; one if it is clear.

        Of several images of the name, those nearest to the `file` that names them are meant.
        """
        name_path = file.parent / PurePosixPath(name.replace("\\", "/"))
        found = self.by_stem.get(name_path.stem, [])
        found = [each for each in found if each.name == name_path.name] or found
        return _choose_nearest(list_folders(name_path), found)

    def find_beside(self, path: Path, stem: str) -> list[Path]:
        """Return the images that a label file may belong to, by the name `stem` and its folders.

        Apart from folders such as images/ and labels/, both lie in the same folder, or one of them
        in folders below the other's.
        """
        folders = list_folders(path)
        found = [
            each
            for each in self.by_stem.get(stem, [])
            if _are_compatible(folders, list_folders(each))
        ]
        return _choose_nearest(folders, found)


def list_folders(path) -> list[str]:
    """Return the names of the folders of a file that tell more than what kind of file it is."""
    parts = path.parts[:-1]
    return [part for part in parts if not (NEUTRAL.fullmatch(part) or WORDS.search(part))]


def _are_compatible(a, b):
    short, long = sorted((a, b), key=len)
    num = len(short)
    return not num or long[:num] == short or long[-num:] == short


def _choose_nearest(folders, paths):
    """Return the paths that share the most folders, counted from the file and then from above."""

    def rank(path):
        own = list_folders(path)
        return _count_equal(folders[::-1], own[::-1]), _count_equal(folders, own)

    best = max(map(rank, paths), default=None)
    return [path for path in paths if rank(path) == best]


def _count_equal(a, b):
    num = 0
    for x, y in zip(a, b):
        if x != y:
            break
        num += 1
    return num
