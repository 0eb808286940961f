"""Grey electron micrographs by a text-to-image model with adapters: saved with every pipeline.

It needs only torch, numpy, PIL, diffusers, transformers and the standard library.
"""

import copy
import errno
import inspect
import os
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin

from em_stable_diffusion.em_base_models import BASE_MODELS, draw_grey
from em_training.em_grey_images import (
    OUTPUT_TYPES,
    check_batch,
    check_choice,
    count_images,
    from_pixels,
)
from em_training.em_saved_pipeline import (
    NamesClasses,
    SavedWithCode,
    check_class_names,
    find_kept_options,
    find_own_class,
    keep_options,
    read_source,
    refuse_pickles,
)

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # of a repository; a saved model names no path
BASE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
DEFAULTS = {
    "resolution": 512,
    "pixel_size_nm": None,
    "default_num_inference_steps": 50,
    "guidance_scale": 1.0,
    "id2label": None,
}


class EMLoRAPipeline(SavedWithCode, NamesClasses, DiffusionPipeline):
    """Draws 1-channel micrographs by a text-to-image model that was tuned by adapters (LoRA).

    The prompts were encoded when the model was trained: there is no text encoder. An image is the
    mean of the three channels that the model draws.

    A model whose base is in a repository is saved without it. Denoiser and autoencoder are then
    loaded from that repository, at the commit of the training. The adapters are merged into the
    denoiser or, in 16 bits, put beside its weights. `from_pretrained` downloads the base with its
    own `cache_dir`, `force_download`, `local_files_only`, `proxies` and `token`.

    Args:
        adapters: An `EMAdapters`.
        prompts: An `EMPrompts`.
        scheduler: That of the base. Other schedulers of diffusers can take its place.
        denoiser: The base's denoiser, with the adapters in it. Default: loaded.
        vae: The base's autoencoder. Default: loaded.
        resolution: Side of an image in pixels.
        pixel_size_nm: Side of a pixel in nanometres, or None if unknown.
        default_num_inference_steps: Denoising steps of a call that does not say.
        guidance_scale: Guidance of a call that does not say; 1 is none.
        id2label: {number: name} of the classes, one for each prompt; None for a model without
            classes, which has one prompt.

    The options default to those of the last pipeline that had these adapters, so that
    `type(pipe)(**pipe.components)` is the same pipeline again.
    """

    _package = "em_stable_diffusion"
    model_cpu_offload_seq = "denoiser->vae"
    _optional_components: ClassVar[list[str]] = ["denoiser", "vae"]

    def __init__(
        self,
        adapters: ModelMixin,
        prompts: ModelMixin,
        scheduler: SchedulerMixin,
        denoiser: ModelMixin | None = None,
        vae: ModelMixin | None = None,
        resolution: int | str = "kept",
        pixel_size_nm: float | str | None = "kept",
        default_num_inference_steps: int | str = "kept",
        guidance_scale: float | str = "kept",
        id2label: dict | str | None = "kept",
    ):
        super().__init__()
        for component in (adapters, prompts):
            if cls := find_own_class(component):
                read_source(cls)
        if denoiser is None or vae is None:
            denoiser, vae = load_base(adapters, denoiser, vae)
        self.register_modules(
            adapters=adapters, prompts=prompts, scheduler=scheduler, denoiser=denoiser, vae=vae
        )
        given = {
            "resolution": resolution,
            "pixel_size_nm": pixel_size_nm,
            "default_num_inference_steps": default_num_inference_steps,
            "guidance_scale": guidance_scale,
            "id2label": id2label,
        }
        kept = DEFAULTS | find_kept_options(adapters)
        options = {k: kept[k] if isinstance(v, str) else v for k, v in given.items()}
        num_classes = len(prompts.config.texts) if options["id2label"] else 0
        options["id2label"] = check_class_names(options["id2label"], num_classes)
        self.register_to_config(**options)
        keep_options(self, adapters)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a model with one prompt."""
        return len(self.config.id2label or ())

    @property
    def components(self) -> dict[str, Any]:
        """All parts by their names; a new pipeline of them has the same options."""
        keep_options(self, self.adapters)
        return super().components

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        class_labels: list[int | str] | int | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw `batch_size` images.

        Args:
            batch_size: Number of images. Default: as many as `class_labels` has, or 1.
            generator: One `torch.Generator` for the batch, or a list of `batch_size`. With a list,
                image i depends on generator i alone.
            num_inference_steps: Denoising steps. Default: those saved with the model.
            guidance_scale: Classifier-free guidance away from the empty prompt; 1 is none. Default:
                that saved with the model.
            class_labels: For a model with classes: the number or name of the class of each image,
                or one for all. Default: the empty prompt, which draws from all that was learnt.
            output_type: "pil" (mode "L"), "np" (float32 [B, H, W, 1] in [0, 1]) or "pt" (float32
                [B, 1, H, W] in [0, 1]).
            return_dict: Return an `ImagePipelineOutput`; if False, a tuple with the images.

        Raises:
            ValueError: For an impossible argument, or if an image is not finite.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        batch_size = count_images(batch_size, class_labels)
        images, _ = self.draw(
            batch_size, generator, num_inference_steps, guidance_scale, class_labels
        )
        images = from_pixels(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def draw(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        class_labels: list[int | str] | int | str | None = None,
        callback: Callable | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw images as a call does; return them, and how colourful they were before.

        callback: diffusers' `callback_on_step_end`.

        Returns:
            Grey images, float32 [B, 1, H, W] in [-1, 1], and float32 [B], see `draw_grey`.
        """
        check_batch(batch_size, generator)
        steps = num_inference_steps or self.config.default_num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        rows = self._find_rows(class_labels, batch_size)
        pipeline = BASE_MODELS[self.adapters.config.base].make_pipeline(
            self.denoiser, self.vae, self.scheduler
        )
        pipeline.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        embeddings = self.prompts.embeddings.to(self.denoiser.dtype)
        return draw_grey(
            pipeline,
            embeddings[rows],
            embeddings[0],
            list(generator) if isinstance(generator, tuple) else generator,
            resolution=self.config.resolution,
            num_inference_steps=steps,
            guidance_scale=scale,
            callback=callback,
        )

    def _find_rows(self, class_labels, batch_size) -> torch.Tensor:
        """Return the row of the prompt of each image, int64 [B]; raise `ValueError` if it lacks."""
        if class_labels is None:
            return torch.full((batch_size,), 0 if self.num_classes else 1)
        if not self.num_classes:
            raise ValueError("This model has no classes. Leave `class_labels` out.")
        labels = class_labels if isinstance(class_labels, list | tuple) else [class_labels]
        numbers = [self.get_label_ids(x)[0] if isinstance(x, str) else int(x) for x in labels]
        last = self.num_classes - 1
        if len(numbers) not in (1, batch_size) or not 0 <= min(numbers) <= max(numbers) <= last:
            raise ValueError(
                f"`class_labels` is {class_labels}; give numbers from 0 to {last} or names of "
                f"classes: one for all images, or one for each of {batch_size}."
            )
        return 1 + torch.tensor(numbers).expand(batch_size)

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Save the model without a base that is in a repository, and the adapters for diffusers.

        `load_lora_weights` of diffusers' pipelines loads the folder, which holds the adapters a
        second time in its form. See `SavedWithCode.save_pretrained` for the options.
        """
        saved = copy.copy(self)
        if self.adapters.config.repository is not None:
            saved.register_modules(denoiser=None, vae=None)
        if kwargs.get("variant") is None:
            self.adapters.save_lora_weights(save_directory)
        super(EMLoRAPipeline, saved).save_pretrained(save_directory, safe_serialization, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "EMLoRAPipeline":
        """Load a folder or Hub repository; see `DiffusionPipeline.from_pretrained` for the options.

        The installed class loads adapters and prompts with installed code. It runs no code from the
        repository and needs no `trust_remote_code`. Weights are read from safetensors only.

        Raises:
            ValueError: For a component that this version does not know, or pickled weights.
        """
        refuse_pickles(kwargs)
        source = pretrained_model_name_or_path
        if not cls._is_installed():
            return super().from_pretrained(source, **kwargs)
        return super().from_pretrained(source, **cls._load_own_components(source, kwargs))


def load_base(adapters, denoiser=None, vae=None):
    """Return the base's denoiser with the adapters in it, and its autoencoder.

    denoiser, vae: Kept if given.
    """
    base, config = BASE_MODELS[adapters.config.base], adapters.config
    if config.repository is None or not HUB_NAME.fullmatch(config.repository):
        raise ValueError(
            f"The base of these adapters is {config.repository}, which is no repository on the "
            "Hub. Give `denoiser` and `vae`."
        )
    variants = config.get("variants") or {}
    options = {"revision": config.revision, "torch_dtype": adapters.dtype} | find_hub_options()
    try:
        if denoiser is None:
            variant = variants.get(base.denoiser)
            denoiser = base.load_denoiser(config.repository, variant=variant, **options)
            is_exact = denoiser.dtype == torch.float32
            (adapters.merge_into if is_exact else adapters.put_into)(denoiser)
        if vae is None:
            vae = base.load_vae(config.repository, variant=variants.get("vae"), **options)
        return denoiser, vae
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise
        remedy = "Check the network, give `token` if the repository is private,"
        if options.get("local_files_only"):
            remedy = "Leave `local_files_only` out to download it,"
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"The base of these adapters, {config.repository} at the commit {config.revision}, was "
            f"not loaded ({reason}). {remedy} or give `denoiser` and `vae`."
        ) from error


def find_hub_options() -> dict[str, Any]:
    """Return the `BASE_OPTIONS` that the running `DiffusionPipeline.from_pretrained` was given.

    diffusers does not hand them to a pipeline, so its call is looked up among those that run now.
    """
    code = inspect.unwrap(DiffusionPipeline.from_pretrained).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    given = {} if frame is None else frame.f_locals
    return {name: given[name] for name in BASE_OPTIONS if given.get(name) is not None}


read_source(EMLoRAPipeline)
