"""Containers of images, and images written to files."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import tifffile
import torch

from em_data.files import write_atomically
from em_data.intensity import to_uint8, to_uint16

Ids = Sequence[int] | np.ndarray  # a list, an array or a range of integers
Array = torch.Tensor | np.ndarray


@runtime_checkable
class Images(Protocol):
    """A container of grey images of one size, read batch by batch.

    Tiles, folders of images and sets in memory all follow it. Some have more: `names` (one per
    image), `shape` (H, W) and `pixel_size_nm`.
    """

    def __len__(self) -> int:
        """Return the number of images."""

    def batch(self, ids: Ids) -> torch.Tensor:
        """Return the images with these numbers as float32 [B, 1, H, W] in [-1, 1].

        Args:
            ids: Integers from 0 to len(self) - 1.
        """


@runtime_checkable
class Views(Images, Protocol):
    """Images that are views of tiles: several of them may show one tile."""

    def locate(self, view_ids: Ids) -> tuple[np.ndarray, np.ndarray]:
        """Return the tile and the symmetry of each view, two int64 arrays [B]."""


class TrainingViews(Protocol):
    """Views to train on. `Tiles` and `em_training.latents.Latents` follow it."""

    @property
    def num_views(self) -> int:
        """Number of views."""

    def batch(self, view_ids: Ids) -> torch.Tensor:
        """Return these views as float32 [B, C, H, W]: images in [-1, 1], or latents.

        Args:
            view_ids: Integers from 0 to num_views - 1.
        """


class ImageArray:
    """Images in memory: a tensor or an array of floats [N, 1, H, W] in [-1, 1]."""

    def __init__(self, images: Array):
        self.images = torch.as_tensor(images)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, ids: Ids) -> torch.Tensor:
        """Return images as float32 [B, 1, H, W] in [-1, 1]."""
        return self.images[torch.as_tensor(ids, dtype=torch.int64)].to(torch.float32)


def as_images(images: Images | Array) -> Images:
    """Return the container itself, or an `ImageArray` of a tensor or array."""
    return images if isinstance(images, Images) else ImageArray(images)


def write_image(
    image: Array, path: str | Path, *, bits: int = 8, pixel_size_nm: float | None = None
) -> None:
    """Write one grey image as PNG or TIFF.

    -1 becomes grey level 0, and 1 becomes 255 or 65535. A TIFF has ImageJ's header: Fiji shows the
    pixel size in nm, and its `Info` says what the grey levels mean. A PNG has the pixel size in its
    pHYs chunk. Both also hold the exact size as text.

    Args:
        image: Float [H, W] or [1, H, W] in [-1, 1].
        path: The suffix, .png or .tif, decides the format.
        bits: 8 or 16.
        pixel_size_nm: Side of a pixel in nm, or None if unknown.
    """
    path = Path(path)
    if bits not in (8, 16):
        raise ValueError(f"bits is {bits}, but images have 8 or 16 bits.")
    pixels = (to_uint8 if bits == 8 else to_uint16)(image)
    pixels = pixels[0] if pixels.ndim == 3 and len(pixels) == 1 else pixels
    if pixels.ndim != 2:
        raise ValueError(f"one grey image is [H, W] or [1, H, W], not {list(pixels.shape)}.")
    if path.suffix.lower() == ".png":
        data = encode_png(pixels, **make_png_options(pixel_size_nm))
    elif path.suffix.lower() in (".tif", ".tiff"):
        data = _encode_tiff(pixels, 2**bits - 1, pixel_size_nm)
    else:
        raise ValueError(f"{path.name}: images are written as .png or .tif.")
    write_atomically(path, data)


def encode_png(pixels: np.ndarray, **options: Any) -> bytes:
    """Return uint8 or uint16 [H, W] as a PNG of as many bits. options: those of PIL's writer."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def _encode_tiff(pixels, full, pixel_size_nm):
    metadata = {
        "min": 0.0,
        "max": float(full),
        "Info": f"Grey levels 0 to {full} are the range [-1, 1] of the model. They are not counts: "
        "the training data were scaled to this range, 16-bit micrographs each by its own least and "
        "largest count without spikes, or by percentiles if the run says so.",
    }
    per_nm = None
    if pixel_size_nm is not None:
        metadata |= {"unit": "nm", "pixel_size_nm": float(pixel_size_nm)}
        per_nm = 1 / float(pixel_size_nm)
    buffer = io.BytesIO()
    resolution = per_nm and (per_nm, per_nm)
    tifffile.imwrite(buffer, pixels, imagej=True, resolution=resolution, metadata=metadata)
    return buffer.getvalue()


def make_png_options(pixel_size_nm: float | None) -> dict[str, Any]:
    """Return options of `encode_png` that put the pixel size into the file, if it is known."""
    if pixel_size_nm is None:
        return {}
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("pixel_size_nm", str(float(pixel_size_nm)))
    pixels_per_metre = 1e9 / pixel_size_nm
    if pixels_per_metre >= 2**31:  # more than the pHYs chunk holds
        return {"pnginfo": info}
    return {"pnginfo": info, "dpi": (pixels_per_metre * 0.0254,) * 2}


def save_image_grid(
    images: Array, path: str | Path, num_columns: int | None = None, *, min_width: int = 1
) -> None:
    """Write images [N, 1, H, W] in [-1, 1] as one 8-bit PNG, with two white pixels between them.

    A grid narrower than `min_width` pixels is enlarged by a whole factor: each pixel is repeated.
    """
    pixels = to_uint8(images)
    if pixels.ndim != 4 or pixels.shape[1] != 1 or not len(pixels):
        raise ValueError(f"a grid is made of images [N, 1, H, W], not {list(pixels.shape)}.")
    num, _, height, width = pixels.shape
    num_columns = min(num, num_columns or math.ceil(math.sqrt(num)))
    num_rows = math.ceil(num / num_columns)
    grid = np.full((num_rows * (height + 2) - 2, num_columns * (width + 2) - 2), 255, np.uint8)
    for i, image in enumerate(pixels[:, 0]):
        top, left = (i // num_columns) * (height + 2), (i % num_columns) * (width + 2)
        grid[top : top + height, left : left + width] = image
    factor = math.ceil(min_width / grid.shape[1])
    write_atomically(path, encode_png(grid.repeat(factor, axis=0).repeat(factor, axis=1)))
