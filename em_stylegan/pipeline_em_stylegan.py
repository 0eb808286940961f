"""StyleGAN for grey electron micrographs, in one file that is saved with every pipeline.

It needs only torch, numpy, diffusers and the standard library.
"""

import os
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor

from em_training.em_grey_images import check_batch, check_choice, count_images, from_pixels
from em_training.em_saved_pipeline import (
    HUB_OPTIONS,
    NamesClasses,
    SavedWithCode,
    check_class_names,
    find_kept_options,
    import_own_component,
    keep_options,
    load_component,
    read_source,
    refuse_pickles,
    wake,
)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
NOISE_MODES = ("random", "const", "none")


class EMStyleGANPipeline(SavedWithCode, NamesClasses, DiffusionPipeline):
    """Generates 1-channel micrographs in one pass: z -> w (mapping) -> image (synthesis).

    Args:
        generator: A `StyleGAN2Generator`, `StyleGAN3Generator` or `StyleGAN1Generator` (2019).
        pixel_size_nm: Side of a pixel of the generated images in nanometres, or None if unknown.
            Default: that of the last pipeline that had this generator, so that
            `type(pipe)(**pipe.components)` is the same pipeline again; unknown for a new generator.
        id2label: {number of a class: its name}, or None for classes without names. Default: as of
            `pixel_size_nm`.
    """

    _package = "em_stylegan"
    model_cpu_offload_seq = "generator"

    def __init__(
        self,
        generator: ModelMixin,
        pixel_size_nm: float | str | None = "kept",
        id2label: dict[int, str] | dict[str, str] | str | None = "kept",
    ):
        super().__init__()
        read_source(type(getattr(generator, "_orig_mod", generator)))
        self.register_modules(generator=generator)
        kept = find_kept_options(generator)
        size = kept.get("pixel_size_nm") if pixel_size_nm == "kept" else pixel_size_nm
        self.register_to_config(pixel_size_nm=None if size is None else float(size))
        names = kept.get("id2label") if id2label == "kept" else id2label
        self.register_to_config(id2label=check_class_names(names, self.num_classes))
        keep_options(self, generator)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str | None = None,
        class_labels: torch.Tensor | list[int | str] | int | str | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate `batch_size` images. There are no steps, and so there is no progress bar.

        Args:
            batch_size: Number of images. Default: as many as `class_labels` has, or 1.
            generator: One `torch.Generator` for the batch, or a list of `batch_size`. With a list,
                image i depends on generator i alone.
            truncation_psi: 1 draws from the whole distribution. Smaller values move w towards its
                mean in the first `truncation_cutoff` layers (by default in all).
            noise_mode: "random" (drawn from `generator` after z), "const" (the stored noise maps,
                the same in every image) or "none". Default: "random", as in training, and "const"
                for given `latents`, where fresh noise would flicker from one image to the next.
            class_labels: For a generator with classes: a number or name of a class for each image,
                one for all, or rows of weights [B, num_classes]. Default: drawn from `generator`
                after z, all classes alike, since such a generator has no images without a class.
            latents: w [B, num_ws, w_dim] or [B, w_dim], as output_type "latent" returns them, in
                place of a random z. `batch_size`, classes and truncation then have no effect.
            output_type: "pil" (mode "L"), "np" (float32 [B, H, W, 1] in [0, 1]), "pt" (float32
                [B, 1, H, W] in [0, 1]) or "latent" (w of every layer after truncation, float32
                [B, num_ws, w_dim]).
            return_dict: Return an `ImagePipelineOutput`; if False, a tuple with the images.
            height, width: Pixels of the images. Only StyleGAN3 draws larger ones than its tile, on
                a larger canvas. Default: those of a tile.

        Raises:
            ValueError: For an impossible argument, such as an unknown class, or if the output is
                not finite: then the training has diverged, or half precision has overflowed.
        """
        batch_size = count_images(batch_size, class_labels)
        noise_mode = noise_mode or ("random" if latents is None else "const")
        rngs = generator if latents is None else None
        self._check_inputs(batch_size, rngs, noise_mode, output_type)
        options = self.find_canvas(height, width)
        wake(self.generator)
        styles = self._check_classes(class_labels, batch_size), truncation_psi, truncation_cutoff
        if latents is None:
            ws = self._draw_styles(batch_size, generator, *styles)
        else:
            ws = self._prepare_latents(latents, generator)  # [B, num_ws, w_dim]
        if output_type == "latent":
            images = self.check_finite(ws.float())
        else:
            images = self.generator.synthesis(ws, noise_mode, generator, **options)
            images = from_pixels(self.check_finite(images), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def components(self) -> dict[str, Any]:
        """The generator by its name; a new pipeline of it has the same options."""
        keep_options(self, self.generator)
        return super().components

    def find_canvas(self, height: int | None = None, width: int | None = None) -> dict[str, Any]:
        """Return arguments of the generator's `synthesis` for images of (height, width).

        Raises:
            ValueError: The generator cannot draw that size.
        """
        tile = self.generator.config.resolution
        size = (height or tile, width or tile)
        if size == (tile, tile):
            return {}
        model: Any = getattr(self.generator, "_orig_mod", self.generator)
        if not hasattr(model, "find_extra"):
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels cannot be drawn: a {type(model).__name__} "
                f"has one size, {tile} x {tile}. Use a StyleGAN3 or a latent diffusion model."
            )
        model.find_extra(size)
        return {"size": size}

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a generator without classes."""
        return self.generator.config.get("num_classes", 0)

    def _check_classes(self, class_labels, batch_size):
        """Return class labels with names as numbers; raise `ValueError` for impossible ones."""
        if class_labels is None:
            return None
        if not self.num_classes:
            raise ValueError("This model has no classes. Leave `class_labels` out.")
        if isinstance(class_labels, str):
            class_labels = self.get_label_ids(class_labels)[0]
        elif isinstance(class_labels, list | tuple):
            class_labels = [
                self.get_label_ids(each)[0] if isinstance(each, str) else each
                for each in class_labels
            ]
        labels = torch.as_tensor(class_labels).cpu()
        shapes, last = ((), (batch_size,)), self.num_classes - 1
        is_number = tuple(labels.shape) in shapes and not labels.is_floating_point()
        if is_number and 0 <= labels.min() <= labels.max() <= last:
            return labels
        if tuple(labels.shape) == (batch_size, self.num_classes):
            return labels
        raise ValueError(
            f"`class_labels` is {class_labels}; give numbers from 0 to {last} or names of classes: "
            f"one for all images, or one for each of {batch_size}."
        )

    def _draw_classes(self, batch_size, generator):
        """Draw a class for each image, all classes alike."""
        rngs = list(generator) if isinstance(generator, list | tuple) else [generator]
        shape = (batch_size // len(rngs),)
        draws = [
            torch.randint(self.num_classes, shape, generator=rng, device=rng and rng.device).cpu()
            for rng in rngs
        ]
        return torch.cat(draws)

    def _check_inputs(self, batch_size, generator, noise_mode, output_type):
        check_batch(batch_size, generator)
        check_choice("noise_mode", noise_mode, NOISE_MODES)
        check_choice("output_type", output_type, OUTPUT_TYPES)

    def check_finite(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values`, or raise `ValueError` if a NaN or infinity is among them."""
        if not torch.isfinite(values).all():
            raise ValueError(
                "The generator's output is not finite (NaN or infinity). Its training diverged, or "
                f"{self.generator.dtype} overflowed. Load an earlier checkpoint, or use float32."
            )
        return values

    def _draw_styles(self, batch_size, generator, class_labels, psi, cutoff):
        """Draw z and return w of every layer [B, num_ws, w_dim], truncated."""
        shape, device = (batch_size, self.generator.config.z_dim), self._execution_device
        z = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if class_labels is None and self.num_classes:
            class_labels = self._draw_classes(batch_size, generator)
        return self.generator.mapping(z.to(self.generator.dtype), class_labels, psi, cutoff)

    def _prepare_latents(self, latents, generator):
        num_ws, w_dim = self.generator.num_ws, self.generator.config.w_dim
        if latents.ndim == 2:
            latents = latents.unsqueeze(1).expand(-1, num_ws, -1)
        if tuple(latents.shape[1:]) != (num_ws, w_dim):
            raise ValueError(
                f"`latents` has the shape {tuple(latents.shape)}; give [B, {num_ws}, {w_dim}] or "
                f"[B, {w_dim}]."
            )
        if isinstance(generator, list | tuple) and len(generator) != len(latents):
            raise ValueError(
                f"{len(generator)} generators for {len(latents)} latents; give one for each, or a "
                "single one."
            )
        return latents.to(self._execution_device, self.generator.dtype)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "EMStyleGANPipeline":
        """Load a folder or Hub repository; see `DiffusionPipeline.from_pretrained` for the options.

        The installed class loads the generator with installed code. It runs no code from the
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
        if isinstance(dtype, dict):  # of each component
            dtype = dtype.get("generator", dtype.get("default"))
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        index = DiffusionPipeline.load_config(source, **options)
        if "generator" not in kwargs:
            names = index.get("generator") or (None, None)
            component = import_own_component(cls._package, source, "generator", *names)
            if isinstance(dtype, torch.dtype):
                options["torch_dtype"] = dtype
            options |= {"subfolder": "generator", "use_safetensors": True}
            kwargs["generator"] = load_component(component, source, kwargs.get("variant"), options)
        return super().from_pretrained(source, dtype=dtype, **kwargs)


read_source(EMStyleGANPipeline)
