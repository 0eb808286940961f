"""Generated images to files and back, and grids of them."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import tifffile
import torch

from em_data.files import write_atomically
from em_data.intensity import from_uint, to_uint8, to_uint16
from em_data.reading import SUFFIXES, natural_key, read_micrograph


@runtime_checkable
class Images(Protocol):
    """A container of grey images of one size, read batch by batch.

    Tiles, folders of images and sets in memory all follow it. Some have more: `names` (one per image),
    `shape` (H, W) and `pixel_size_nm`.
    """

    def __len__(self) -> int:
        """Return the number of images."""

    def batch(self, ids: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return the images with these numbers as float32 [B, 1, H, W] in [-1, 1].

        Args:
            ids: Integers from 0 to len(self) - 1: a list, an array or a range.
        """


@runtime_checkable
class Views(Images, Protocol):
    """Images that are views of tiles: several of them may show one tile."""

    def locate(self, view_ids) -> tuple[np.ndarray, np.ndarray]:
        """Return the tile and the symmetry of each view, two int64 arrays [B]."""


class ImageArray:
    """Images in memory: a tensor or an array of floats [N, 1, H, W] in [-1, 1]."""

    def __init__(self, images):
        self.images = torch.as_tensor(images)

    def __len__(self):
        return len(self.images)

    def batch(self, ids):
        """Return images as float32 [B, 1, H, W] in [-1, 1]."""
        return self.images[torch.as_tensor(ids, dtype=torch.int64)].to(torch.float32)


def as_images(images) -> Images:
    """Return the container itself, or an `ImageArray` of a tensor or array."""
    return images if isinstance(images, Images) else ImageArray(images)


def write_image(image, path, *, bits=8, pixel_size_nm=None):
    """Write one grey image as PNG or TIFF, by the suffix of `path`.

    image: float [H, W] or [1, H, W] in [-1, 1], which becomes the full range of 8 or 16 bits. The pixel size is stored both
    where other programs look (pHYs, resolution tag) and exactly, as text.
    """
    path = Path(path)
    if bits not in (8, 16):
        raise ValueError(f"images have 8 or 16 bits, not {bits}")
    pixels = (to_uint8 if bits == 8 else to_uint16)(image)
    pixels = pixels[0] if pixels.ndim == 3 and len(pixels) == 1 else pixels
    if pixels.ndim != 2:
        raise ValueError(f"one grey image is [H, W] or [1, H, W], not {list(pixels.shape)}")
    buffer = io.BytesIO()
    if path.suffix.lower() == ".png":
        PIL.Image.fromarray(pixels).save(buffer, "PNG", **_make_png_options(pixel_size_nm))
    elif path.suffix.lower() in (".tif", ".tiff"):
        tags = {"metadata": {}} if pixel_size_nm is None else {
            "metadata": {"pixel_size_nm": float(pixel_size_nm)},
            "resolution": (1e7 / pixel_size_nm, 1e7 / pixel_size_nm),
            "resolutionunit": "CENTIMETER",
        }  # fmt: skip
        tifffile.imwrite(buffer, pixels, photometric="minisblack", **tags)
    else:
        raise ValueError(f"{path.name}: images are written as .png or .tif")
    write_atomically(path, buffer.getvalue())


def _make_png_options(pixel_size_nm):
    if pixel_size_nm is None:
        return {}
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("pixel_size_nm", json.dumps(float(pixel_size_nm)))
    pixels_per_metre = 1e9 / pixel_size_nm
    if pixels_per_metre >= 2**31:  # more than the pHYs chunk holds; the text holds any
        return {"pnginfo": info}
    return {"pnginfo": info, "dpi": (pixels_per_metre * 0.0254,) * 2}


def save_image_grid(images, path, num_columns=None):
    """Write images [N, 1, H, W] in [-1, 1] side by side as one 8-bit PNG, two white pixels between them."""
    pixels = to_uint8(images)
    if pixels.ndim != 4 or pixels.shape[1] != 1 or not len(pixels):
        raise ValueError(f"a grid is made of images [N, 1, H, W], not {list(pixels.shape)}")
    num, _, height, width = pixels.shape
    num_columns = min(num, num_columns or math.ceil(math.sqrt(num)))
    num_rows = math.ceil(num / num_columns)
    grid = np.full((num_rows * (height + 2) - 2, num_columns * (width + 2) - 2), 255, np.uint8)
    for i, image in enumerate(pixels[:, 0]):
        top, left = (i // num_columns) * (height + 2), (i % num_columns) * (width + 2)
        grid[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    PIL.Image.fromarray(grid).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


class ImageFolder:
    """The images of a folder in the natural order of their names, all of one size, on their type's full range."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is no folder; generate images into it first")
        paths = [
            p
            for p in self.folder.iterdir()
            if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
        ]
        self.paths = sorted(paths, key=lambda path: natural_key(path.name))
        self.names = [path.name for path in self.paths]
        if not self.paths:
            raise ValueError(
                f"{folder} holds no TIFF, PNG, JPEG or BMP image; generate images into it first"
            )
        first = self._read(0)
        self.shape, self.pixel_size_nm = first.image.shape, first.pixel_size_nm

    def __len__(self):
        return len(self.paths)

    def _read(self, i):
        return read_micrograph(self.paths[i], label_bar="keep", name=self.names[i])

    def batch(self, ids):
        """Return images as float32 [B, 1, H, W] in [-1, 1]."""
        images = []
        for i in ids:
            image = self._read(i).image
            if image.shape != self.shape:
                raise ValueError(
                    f"{self.folder / self.names[i]} has {image.shape[0]} x {image.shape[1]} pixels, {self.names[0]} "
                    f"{self.shape[0]} x {self.shape[1]}; images that are judged together have one size"
                )
            images.append(from_uint(image))
        return torch.stack(images).unsqueeze(1) if images else torch.empty(0, 1, *self.shape)


class ImageDataset:
    """The images of a folder that `datasets` has written, of its first column of 2-D arrays, on their type's full range."""

    def __init__(self, folder):
        import datasets

        self.folder = Path(folder)
        dataset = datasets.load_from_disk(str(folder))
        columns = [
            key
            for key, feature in dataset.features.items()
            if isinstance(feature, datasets.Array2D)
        ]
        if not columns or not len(dataset):
            raise ValueError(
                f"{folder} is a data set without images (a column of the type Array2D)"
            )
        feature = dataset.features[columns[0]]
        if feature.dtype not in ("uint8", "uint16"):
            raise ValueError(f"{folder} holds {feature.dtype}; grey levels are uint8 or uint16")
        self.shape, self.column = tuple(feature.shape), columns[0]
        self.levels = dataset.select_columns(columns[:1]).with_format(
            "numpy", dtype=np.dtype(feature.dtype)
        )
        self.pixel_size_nm = dataset[0].get("pixel_size_nm")

    def __len__(self):
        return len(self.levels)

    def batch(self, ids):
        """Return images as float32 [B, 1, H, W] in [-1, 1]."""
        return from_uint(np.asarray(self.levels[ids][self.column])).unsqueeze(1)


def read_image_folder(path):
    """Open a folder of images, files or a data set on disk; returns what reads them batch by batch."""
    return ImageDataset(path) if (Path(path) / "state.json").is_file() else ImageFolder(path)
