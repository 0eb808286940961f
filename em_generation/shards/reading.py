"""Read a file of images: an Arrow file or a tar archive that `generate.py --shard` wrote."""

import re
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from em_data.images import Ids
from em_data.intensity import from_uint, to_uint8


class ImageFile:
    """The images of one file, as 8-bit grey levels, in which all images are judged.

    Follows `em_data.Images`.

    Attributes:
        numbers: The number of each image [N].
        shape: (H, W).

    Raises:
        ValueError: The file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._content: Any = _ArrowRows(path) if path.suffix == ".arrow" else _TarMembers(path)
        except (OSError, ValueError, KeyError, tarfile.TarError) as error:
            raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
        self.numbers = self._content.numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the first image."""
        return self._decode(0).shape

    def batch(self, ids: Ids) -> torch.Tensor:
        """Return images float32 [B, 1, H, W] in [-1, 1], of 256 grey levels."""
        images = torch.from_numpy(np.stack([from_uint(self._decode(int(i))) for i in ids]))
        return from_uint(to_uint8(images[:, None]))

    def _decode(self, i: int) -> np.ndarray:
        return np.asarray(PIL.Image.open(BytesIO(self._content.read(i))))


class _ArrowRows:
    def __init__(self, path: Path):
        import datasets

        rows = datasets.Dataset.from_file(str(path))
        self.numbers = list(rows["number"])
        self.rows = rows.select_columns(["image"]).cast_column(
            "image", datasets.Image(decode=False)
        )

    def read(self, i: int) -> bytes:
        return self.rows[i]["image"]["bytes"]


class _TarMembers:
    def __init__(self, path: Path):
        self.path = path
        self.numbers: list[int] = []
        self.places: list[tuple[int, int]] = []
        with tarfile.open(path) as tar:
            for member in tar:
                found = re.fullmatch(r"(\d+)\.png", member.name)
                if found:
                    self.numbers.append(int(found[1]))
                    self.places.append((member.offset_data, member.size))

    def read(self, i: int) -> bytes:
        start, size = self.places[i]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(size)
