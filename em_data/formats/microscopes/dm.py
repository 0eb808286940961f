"""Check of a DigitalMicrograph file before RosettaSciIO reads it.

Its reader believes every number of the file: a damaged one makes it run for hours, fill the memory,
or return pixels of a wrong shape.
"""

import math
import struct

from em_data.formats.base import Refusal

TYPE_BYTES = {2: 2, 3: 4, 4: 2, 5: 4, 6: 4, 7: 8, 8: 1, 9: 1, 10: 1, 11: 8, 12: 8}
STRUCT, STRING, ARRAY = 15, 18, 20
GROUP, DATA = 20, 21
# bytes of a pixel by an image's DataType; the packed complex types 5, 27 and 28 are left out
PIXEL_BYTES = {1: 2, 2: 4, 3: 8, 6: 1, 7: 4, 8: 4, 9: 1, 10: 2, 11: 4, 12: 8, 13: 16, 14: 1, 23: 4}
MAX_DEPTH = 64
MAX_TAG_VALUES = 10_000_000  # outside of images; RosettaSciIO reads them one by one
DAMAGED = "truncated or damaged: {}. Copy it again."


def check_dm(path, size: int) -> None:
    """Walk through all tags of a file of `size` bytes; refuse one whose numbers do not fit.

    Raises:
        Refusal: A tag reaches beyond the end, or an image has not as many pixels as its size says.
    """
    with open(path, "rb") as file:
        walk = _Walk(file, size)
        walk.group((), is_root=True)
    for name, sizes in walk.dimensions.items():
        pixel_bytes = PIXEL_BYTES.get(walk.types.get(name))
        if name in walk.data and pixel_bytes:
            needed = math.prod(sizes) * pixel_bytes
            if needed != walk.data[name]:
                shape = " x ".join(map(str, sizes))
                text = f"{shape} pixels take {needed} bytes, but {walk.data[name]} are stored"
                raise Refusal(DAMAGED.format(text))


class _Walk:
    """Positions and sizes of a file's tags; nothing but numbers of images is kept."""

    def __init__(self, file, size):
        self.file, self.size, self.num_values = file, size, 0
        self.dimensions, self.types, self.data = {}, {}, {}  # by the path of the image's group
        (version,) = struct.unpack(">i", file.read(4))
        if version not in (3, 4):
            raise Refusal(f"a DigitalMicrograph file of version {version}. Export it as TIFF.")
        self.word = ">q" if version == 4 else ">i"
        self.is_4 = version == 4
        self.read(self.word)
        self.order = "little" if self.read(">i") else "big"

    def read(self, layout):
        return struct.unpack(layout, self.file.read(struct.calcsize(layout)))[0]

    def left(self):
        return self.size - self.file.tell()

    def group(self, path, is_root=False):
        if len(path) > MAX_DEPTH:
            raise Refusal(DAMAGED.format(f"groups of tags are nested {MAX_DEPTH} deep"))
        if self.is_4 and not is_root:
            self.read(">q")
        self.read(">h")
        num_tags = self.read(self.word)
        if not 0 <= num_tags <= self.left():
            raise Refusal(DAMAGED.format(f"a group of {num_tags} tags"))
        for i in range(num_tags):
            kind, length = struct.unpack(">bh", self.file.read(3))
            name = self.file.read(max(length, 0)).decode("latin-1") or f"#{i}"
            if kind == GROUP:
                self.group((*path, name))
            elif kind == DATA:
                self.value((*path, name))
            else:
                raise Refusal(DAMAGED.format(f"a tag of the unknown kind {kind}"))

    def value(self, path):
        if self.is_4:
            self.read(">q")
        if self.file.read(4) != b"%%%%":
            raise Refusal(DAMAGED.format("a tag without its mark"))
        num_info = self.read(self.word)
        if not 1 <= num_info <= self.left() // struct.calcsize(self.word):
            raise Refusal(DAMAGED.format(f"a tag described by {num_info} numbers"))
        info = [self.read(self.word) for _ in range(num_info)]
        count, item = self._measure(info)
        num_bytes = count * item
        if item < 1 or not 0 <= num_bytes <= self.left():
            raise Refusal(DAMAGED.format(f"{count} values of {item} bytes, but {self.left()} left"))
        is_image = path[-2:] == ("ImageData", "Data")
        if is_image:
            self.data[path[:-1]] = num_bytes
        else:
            self.num_values += count
            if self.num_values > MAX_TAG_VALUES:
                text = f"more than {MAX_TAG_VALUES // 10**6} million values beside its images"
                raise Refusal(f"a DigitalMicrograph file with {text}. Export the image as TIFF.")
        if num_info == 1 and path[-2:-1] == ("Dimensions",) and path[-3:-2] == ("ImageData",):
            self.dimensions.setdefault(path[:-2], []).append(self._integer(item))
        elif num_info == 1 and path[-2:] == ("ImageData", "DataType"):
            self.types[path[:-1]] = self._integer(item)
        else:
            self.file.seek(num_bytes, 1)

    def _measure(self, info):
        """Return how many values a tag has, and the bytes of one."""
        kind = info[0]
        if len(info) == 1:
            return 1, TYPE_BYTES.get(kind, 0)
        if kind == STRING:
            return info[1], 1
        if kind == STRUCT:
            return 1, self._struct_bytes(info)
        if kind == ARRAY and len(info) == 3:
            return info[2], TYPE_BYTES.get(info[1], 0)
        if kind == ARRAY and len(info) > 4 and info[1] == STRUCT:
            return info[-1], self._struct_bytes(info[1:-1])
        raise Refusal(DAMAGED.format(f"a tag of the unknown layout {info[:3]}"))

    def _struct_bytes(self, info):
        kinds = info[4::2]
        if len(info) < 3 or info[2] != len(kinds):
            return 0
        return sum(TYPE_BYTES.get(kind, 0) for kind in kinds)

    def _integer(self, num_bytes):
        return int.from_bytes(self.file.read(num_bytes), self.order)
