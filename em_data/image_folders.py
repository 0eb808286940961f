"""Any folder or data set of images, read batch by batch for evaluation."""

from pathlib import Path

import numpy as np
import torch

from em_data.config import DataConfig
from em_data.images import Ids
from em_data.intensity import from_uint
from em_data.sources.base import Entry
from em_data.sources.folder import open_folder
from em_data.sources.rows import is_dataset, open_dataset

NUM_CHECKED = 50  # images whose grey levels are looked at


class ImageFolder:
    """Images of one size, each on the full range of its type: 0 becomes -1, 255 or 65535 becomes 1.

    Attributes:
        names: One per image.
        shape: (H, W).
        pixel_size_nm: That of the first image, or None if unknown.
        ignored: Sentences on what the folder also holds and what is not used.
    """

    def __init__(self, source: str, entries: list[Entry], ignored: list[str]):
        self.source, self.entries, self.ignored = source, entries, ignored
        self.names = [entry.name for entry in entries]
        first = self._read(0)
        self.shape, self.pixel_size_nm = first.image.shape, first.pixel_size_nm

    def __len__(self) -> int:
        return len(self.entries)

    def batch(self, ids: Ids) -> torch.Tensor:
        """Return images as float32 [B, 1, H, W] in [-1, 1].

        Raises:
            ValueError: An image has another size than the first one, or no fixed range of grey
                levels. The message names it.
        """
        images = torch.empty(len(ids), 1, *self.shape)
        for out, i in zip(images, ids):
            image = self._read(int(i)).image
            if image.shape != self.shape:
                raise ValueError(
                    f"{self.source}/{self.names[i]} has {image.shape[0]} x {image.shape[1]} pixels,"
                    f" but {self.names[0]} has {self.shape[0]} x {self.shape[1]}. Images that are "
                    "judged together must have one size."
                )
            out[0] = from_uint(image)
        return images

    def check_range(self) -> None:
        """Raise a `ValueError` if images of 16 bits use less than an eighth of the grey levels.

        Cameras of 12 bits write such files. On the full range, they are nearly black. Looks at
        99.8 % of the pixels of some images.
        """
        numbers = np.unique(np.linspace(0, len(self) - 1, NUM_CHECKED).astype(int))
        images = [self._read(int(i)).image for i in numbers]
        images = [image for image in images if image.dtype == np.uint16]
        if not images:
            return
        ranges = np.array([np.percentile(image, (0.1, 99.9)) for image in images])  # no hot pixels
        low, high = int(ranges[:, 0].min()), int(ranges[:, 1].max())
        if high - low < 65536 // 8:
            raise ValueError(
                f"{self.source} holds images of 16 bits that use the grey levels {low:,} to "
                f"{high:,} only. Judged on the full range of 0 to 65,535, they show next to "
                "nothing. Save them on the full range: multiply the levels of a 12-bit camera by "
                "16."
            )

    def _read(self, i):
        micrograph = self.entries[i].read()
        stored_as = micrograph.metadata["stored_as"]
        if stored_as not in ("uint8", "uint16", "bool"):
            raise ValueError(
                f"{self.source}/{micrograph.name} holds {stored_as}, which has no fixed range of "
                "grey levels. Save the images with 8 or 16 bits."
            )
        return micrograph


def read_image_folder(path: str | Path) -> ImageFolder:
    """Open images that are judged as they are: nothing is cropped, stretched or cut into tiles.

    Args:
        path: A folder of TIFF, PNG, JPEG or BMP files (8 or 16 bits, subfolders included), a folder
            written by `Dataset.save_to_disk`, or "hub:owner/name[@revision]",
            "hub-stream:owner/name[@revision]", "datasets:NAME_OR_PATH".

    Raises:
        ValueError: There is no such folder, or it holds no image.
    """
    config = DataConfig(label_bar="keep", labels="none", classes="none")
    if is_dataset(path):
        source = open_dataset(path, config)
    elif Path(path).is_dir():
        source = open_folder(path, config)
    else:
        raise ValueError(f"There is no folder {path}.")
    return ImageFolder(str(path), source.entries, source.ignored)
