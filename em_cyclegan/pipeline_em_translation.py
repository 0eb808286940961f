"""Unpaired translation of grey electron micrographs: one file that is saved with every pipeline.

It needs only torch, numpy, PIL, diffusers and the standard library.
"""

import os
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from PIL import Image

from em_training.em_saved_pipeline import (
    HUB_OPTIONS,
    SavedWithCode,
    find_kept_options,
    find_own_class,
    import_own_component,
    is_own_component,
    keep_options,
    load_component,
    read_source,
    refuse_pickles,
)

OUTPUT_TYPES = ("pil", "np", "pt")
DIRECTIONS = ("a_to_b", "b_to_a")
STRIDE, MIN_SIDE = 4, 8  # of the generators: sides are multiples of 4, at least 8


class EMTranslationPipeline(SavedWithCode, DiffusionPipeline):
    """Translates 1-channel micrographs from a domain a, such as simulated ones, to a domain b.

    What an image shows stays where it is, and so do the labels of a simulated image. Each image is
    translated by itself, and the same image always gives the same result.

    Args:
        generator_a_to_b: An `EMResnetGenerator` that translates from a to b.
        generator_b_to_a: One for the other direction; None for a model without it.
        pixel_size_nm: Side of a pixel in nanometres of the images that the model was trained to
            translate, or None if unknown. Default: that of the last pipeline that had this
            generator, so that `type(pipe)(**pipe.components)` is the same pipeline again.
    """

    _package = "em_cyclegan"
    model_cpu_offload_seq = "generator_a_to_b->generator_b_to_a"
    _optional_components: ClassVar[list[str]] = ["generator_b_to_a"]

    def __init__(
        self,
        generator_a_to_b: ModelMixin,
        generator_b_to_a: ModelMixin | None = None,
        pixel_size_nm: float | str | None = "kept",
    ):
        super().__init__()
        for component in (generator_a_to_b, generator_b_to_a):
            if cls := find_own_class(component):
                read_source(cls)
        self.register_modules(generator_a_to_b=generator_a_to_b, generator_b_to_a=generator_b_to_a)
        kept = find_kept_options(generator_a_to_b)
        size = kept.get("pixel_size_nm") if pixel_size_nm == "kept" else pixel_size_nm
        self.register_to_config(pixel_size_nm=None if size is None else float(size))
        keep_options(self, generator_a_to_b)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        direction: str = "a_to_b",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Translate one image or several of one size. There is no noise, and so no generator.

        Args:
            image: A grey image or a list of them: PIL images (8 or 16 bits), arrays [H, W],
                [B, H, W] or [B, H, W, 1], or tensors [H, W], [B, H, W] or [B, 1, H, W]. Floats are
                in [0, 1]; uint8 and uint16 are divided by 255 and 65535. H and W are multiples of
                4, at least 8.
            direction: "a_to_b" or "b_to_a".
            output_type: "pil" (mode "L"), "np" (float32 [B, H, W, 1] in [0, 1]) or "pt" (float32
                [B, 1, H, W] in [0, 1]).
            return_dict: Return an `ImagePipelineOutput`; if False, a tuple with the images.

        Raises:
            ValueError: For an impossible argument, or if the output is not finite.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f'`output_type` is "{output_type}"; choose one of {", ".join(OUTPUT_TYPES)}.'
            )
        images = self._convert(self.translate(prepare_images(image), direction), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def translate(self, images: torch.Tensor, direction: str = "a_to_b") -> torch.Tensor:
        """Translate images float32 [B, 1, H, W] in [-1, 1]; the result is of the same kind.

        Raises:
            ValueError: For sides that the generator cannot translate, a direction that the model
                does not have, or an output that is not finite.
        """
        if direction not in DIRECTIONS:
            raise ValueError(
                f'`direction` is "{direction}"; choose one of {", ".join(DIRECTIONS)}.'
            )
        generator = self.generator_a_to_b if direction == "a_to_b" else self.generator_b_to_a
        if generator is None:
            raise ValueError(
                '`direction` is "b_to_a", but this model translates from a to b only: it was '
                "trained by the contrastive method."
            )
        height, width = images.shape[-2:]
        if height % STRIDE or width % STRIDE or min(height, width) < MIN_SIDE:
            raise ValueError(
                f"The image has {height} x {width} pixels, but both sides must be multiples of "
                f"{STRIDE} and at least {MIN_SIDE}. Crop it, or pad it by reflection."
            )
        images = generator(images.to(self._execution_device, generator.dtype)).float()
        if not torch.isfinite(images).all():
            raise ValueError(
                "The generator's output is not finite (NaN or infinity). Its training diverged, or "
                f"{generator.dtype} overflowed. Load an earlier checkpoint, or use float32."
            )
        return images.clamp(-1, 1)

    @property
    def components(self) -> dict[str, Any]:
        """The generators by their names; a new pipeline of them has the same options."""
        keep_options(self, self.generator_a_to_b)
        return super().components

    # Copied from em_stylegan.pipeline_em_stylegan.EMStyleGANPipeline._convert
    def _convert(self, images, output_type):
        images = (images.float() / 2 + 0.5).clamp(0, 1)  # [B, 1, H, W]
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 1]
        return images if output_type == "np" else self.numpy_to_pil(images)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "EMTranslationPipeline":
        """Load a folder or Hub repository; see `DiffusionPipeline.from_pretrained` for the options.

        The installed class loads the generators with installed code. It runs no code from the
        repository and needs no `trust_remote_code`. Weights are read from safetensors only.

        Raises:
            ValueError: For a generator that this version does not know, or pickled weights.
        """
        refuse_pickles(kwargs)
        source = pretrained_model_name_or_path
        if not cls._is_installed():
            return super().from_pretrained(source, **kwargs)
        for name in ("trust_remote_code", "output_loading_info"):
            kwargs.pop(name, None)
        dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
        dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        index = DiffusionPipeline.load_config(source, **hub_options)
        for name, value in index.items():
            if is_own_component(name, value) and name not in kwargs:
                component = import_own_component(cls._package, source, name, *value)
                options = hub_options | {"subfolder": name, "use_safetensors": True}
                found = dtypes.get(name, dtypes.get("default"))
                if isinstance(found, torch.dtype):
                    options["torch_dtype"] = found
                kwargs[name] = load_component(component, source, kwargs.get("variant"), options)
        return super().from_pretrained(source, dtype=dtype, **kwargs)


def prepare_images(image: Any) -> torch.Tensor:
    """Return images as float32 [B, 1, H, W] in [-1, 1]; see `EMTranslationPipeline.__call__`.

    Raises:
        ValueError: No image, colours, values outside of [0, 1], or images of different sizes.
    """
    if isinstance(image, list | tuple):
        if not image:
            raise ValueError("`image` is an empty list. Give at least one image.")
        images = [prepare_images(each) for each in image]
        sizes = sorted({tuple(each.shape[-2:]) for each in images})
        if len(sizes) > 1:
            raise ValueError(
                f"The images have different sizes ({', '.join(f'{h} x {w}' for h, w in sizes)}). "
                "Translate those of each size by a call of their own."
            )
        return torch.cat(images)
    if isinstance(image, Image.Image):
        image = _read_grey(image)
    if isinstance(image, torch.Tensor):
        channel, image = 1, image.detach().cpu()
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
    elif isinstance(image, np.ndarray):
        channel = -1
    else:
        raise ValueError(
            f"`image` is a {type(image).__name__}; give a PIL image, an array, a tensor, or a list "
            "of them."
        )
    shape = image.shape
    if image.ndim == 4 and shape[channel] == 1:
        image = image.squeeze(channel)
    if image.ndim not in (2, 3) or 0 in shape:
        raise ValueError(
            f"`image` has the shape {list(shape)}; give [H, W], [B, H, W], or four dimensions of "
            "which one is the single channel. Colours are not translated."
        )
    image = image if image.ndim == 3 else image[None]
    return torch.from_numpy(_scale(image)).unsqueeze(1) * 2 - 1


def _read_grey(image):
    """Return a PIL image as an array [H, W] of its own levels; refuse colours."""
    if image.mode in ("L", "I;16", "I;16L", "I;16B", "I;16N"):
        pixels = np.asarray(image)
        return pixels if image.mode == "L" else pixels.astype(np.uint16)
    if image.mode in ("RGB", "RGBA", "P", "LA"):
        colours = np.asarray(image.convert("RGB"))
        if (colours == colours[..., :1]).all():
            return colours[..., 0]
        raise ValueError(
            'The image has colours, and this model translates grey images. Use image.convert("L").'
        )
    raise ValueError(
        f"The image has the mode {image.mode}, whose range of grey levels is unknown. Give 8 or 16 "
        "bits, or an array of floats in [0, 1]."
    )


def _scale(image):
    """Return an array as float32 in [0, 1]."""
    if image.dtype in (np.uint8, np.uint16):
        return image.astype(np.float32) / np.iinfo(image.dtype).max
    if image.dtype.kind != "f":
        raise ValueError(f"`image` holds {image.dtype}; give uint8, uint16, or floats in [0, 1].")
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"`image` holds floats from {image.min():g} to {image.max():g}, but they must be in "
            "[0, 1]. Scale them first, as the tiles of the training were scaled."
        )
    return image.astype(np.float32)


read_source(EMTranslationPipeline)
