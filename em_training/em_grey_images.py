"""Grey images as our pipelines take and return them; see `em_training.em_saved_pipeline`."""

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

OUTPUT_TYPES = ("pil", "np", "pt")


def to_pixels(image: Any) -> torch.Tensor:
    """Return grey images as float32 [B, 1, H, W] in [-1, 1].

    Args:
        image: An image or a list of images of one size: PIL images of 8 or 16 bits, arrays [H, W],
            [H, W, 1], [B, H, W] or [B, H, W, 1], or tensors [H, W], [B, H, W] or [B, 1, H, W].
            uint8 and uint16 are grey levels; floats are in [0, 1].

    Raises:
        ValueError: For no image, colours, or other shapes or values, with the way to mend it.
    """
    if isinstance(image, list | tuple):
        if not image:
            raise ValueError("`image` is an empty list; give at least one image.")
        parts = [to_pixels(each) for each in image]
        sizes = sorted({tuple(part.shape[2:]) for part in parts})
        if len(sizes) > 1:
            shown = ", ".join(f"{height} x {width}" for height, width in sizes)
            raise ValueError(f"`image` has images of the sizes {shown}; give one size only.")
        return torch.cat(parts)
    if isinstance(image, Image.Image):
        image = _read_grey(image)
    shape = list(getattr(image, "shape", ()))
    if isinstance(image, torch.Tensor):
        image = image.detach()
        image = image.squeeze(1) if image.ndim == 4 and image.shape[1] == 1 else image
    elif isinstance(image, np.ndarray):
        image = image.squeeze(-1) if image.ndim > 2 and image.shape[-1] == 1 else image
        image = torch.from_numpy(np.array(image, image.dtype.newbyteorder("="), order="C"))
    else:
        raise ValueError(
            f"`image` is a {type(image).__name__}; give a PIL image, an array, a tensor, or a "
            "list of them."
        )
    image = image if image.ndim == 3 else image[None]
    if image.ndim != 3 or not image.numel():
        raise ValueError(
            f"`image` has the shape {shape} and does not hold grey images; give arrays [H, W] or "
            "[B, H, W, 1], or tensors [B, 1, H, W]."
        )
    return _scale(image).unsqueeze(1) * 2 - 1


def from_pixels(images: torch.Tensor, output_type: str) -> Any:
    """Return images [B, 1, H, W] in [-1, 1] as "pt", "np" [B, H, W, 1] in [0, 1], or "pil"."""
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    return arrays if output_type == "np" else DiffusionPipeline.numpy_to_pil(arrays)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` if an argument of a pipeline is none of its choices."""
    if value not in choices:
        raise ValueError(f'`{name}` is "{value}"; choose one of {", ".join(choices)}.')


def count_images(batch_size: int | None, class_labels: Any) -> int:
    """Return the number of images to draw: by default one for each class of a list, or 1."""
    if batch_size is not None:
        return batch_size
    return len(class_labels) if isinstance(class_labels, list | tuple) else 1


def check_batch(batch_size: int, generator: Any) -> None:
    """Raise `ValueError` for no image, or a list of generators that is not one for each image."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    if isinstance(generator, list | tuple) and len(generator) != batch_size:
        raise ValueError(
            f"{len(generator)} generators for {batch_size} images; give one for each, or a single "
            "one."
        )


def _read_grey(image):
    """Return a PIL image as an array [H, W] of its own levels; refuse colours."""
    if image.mode == "L":
        return np.asarray(image)
    if image.mode.startswith("I") and 0 <= image.getextrema()[0] <= image.getextrema()[1] < 2**16:
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("RGB", "RGBA", "P", "LA"):
        colours = np.asarray(image.convert("RGB"))
        if (colours == colours[..., :1]).all():
            return colours[..., 0]
        raise ValueError(
            '`image` has colours, but the model is one of grey images. Use image.convert("L").'
        )
    raise ValueError(
        f"`image` has the mode {image.mode}, whose range of grey levels is unknown. Give 8 or 16 "
        "bits, or an array of floats in [0, 1]."
    )


def _scale(image):
    """Return levels or floats as float32 in [0, 1]."""
    if image.dtype in (torch.uint8, torch.uint16):
        return image.to(torch.float32) / torch.iinfo(image.dtype).max
    if not image.is_floating_point():
        kind = str(image.dtype).removeprefix("torch.")
        raise ValueError(f"`image` holds {kind}; give uint8, uint16, or floats in [0, 1].")
    low, high = float(image.min()), float(image.max())
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"`image` has values from {low:g} to {high:g}, but floats must be in [0, 1]; put "
            "images in [-1, 1] there by `image / 2 + 0.5`."
        )
    return image.to(torch.float32)
