"""Unpaired translation of grey electron micrographs: one file that is saved with every pipeline.

It needs only torch, numpy, PIL, diffusers and the standard library.
"""

import os
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin

from em_training.em_grey_images import OUTPUT_TYPES, check_choice, from_pixels, to_pixels
from em_training.em_saved_pipeline import (
    SavedWithCode,
    find_kept_options,
    find_own_class,
    keep_options,
    read_source,
    refuse_pickles,
)

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
            image: A grey image or a list of them, see `em_training.em_grey_images.to_pixels`. H and
                W are multiples of 4, at least 8.
            direction: "a_to_b" or "b_to_a".
            output_type: "pil" (mode "L"), "np" (float32 [B, H, W, 1] in [0, 1]) or "pt" (float32
                [B, 1, H, W] in [0, 1]).
            return_dict: Return an `ImagePipelineOutput`; if False, a tuple with the images.

        Raises:
            ValueError: For an impossible argument, or if the output is not finite.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        images = from_pixels(self.translate(to_pixels(image), direction), output_type)
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
        return super().from_pretrained(source, **cls._load_own_components(source, kwargs))


read_source(EMTranslationPipeline)
