"""Latent diffusion for grey electron micrographs: one file, which every saved pipeline contains."""

import contextlib
import inspect
import logging
import math
import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor

from em_training.em_grey_images import (
    check_batch,
    check_choice,
    count_images,
    from_pixels,
    to_pixels,
)
from em_training.em_saved_pipeline import (
    HUB_OPTIONS,
    NamesClasses,
    SavedWithCode,
    check_class_names,
    find_kept_options,
    find_own_class,
    import_own_component,
    is_own_component,
    keep_options,
    load_component,
    read_source,
    refuse_pickles,
    wake,
)

from .em_schedulers import is_flow, make_exchangeable, refuse_unsuitable
from .em_windows import (
    EXACT_BATCH,
    MAX_PIXELS,
    blend_windows,
    find_nearest_size,
    place_windows,
)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_STRENGTH = 0.5  # of a call with an image
# of a pipeline whose U-Net is new
DEFAULTS = {
    "default_num_inference_steps": 50,
    "guidance_scale": 1.0,
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
}
MAX_DISTANCES = 2**24  # between latents and codes, computed at a time: 64 MiB in float32


def _is_about_other_things(record: logging.LogRecord) -> bool:
    """Drop diffusers' warning that VQModel ignores latents_mean and latents_std: we read them."""
    message = record.getMessage()
    return not ("passed to VQModel" in message and "latents_mean" in message)


logging.getLogger("diffusers.configuration_utils").addFilter(_is_about_other_things)


class EMLatentDiffusionPipeline(SavedWithCode, NamesClasses, DiffusionPipeline):
    """Generates 1-channel micrographs: noise, denoised latents, decoded images, grain.

    `from_pretrained` of the installed class runs no code of a repository. Types narrower than
    float32 halve the memory. With `pipe.to(torch.bfloat16)`, or `from_pretrained(...,
    dtype=torch.bfloat16)` of the installed class, a VQ autoencoder's codes stay in float32 for the
    search of the nearest one. `DiffusionPipeline.from_pretrained(..., dtype=torch.bfloat16)` and
    `pipe.vqvae.to(torch.bfloat16)` round them, which confuses close codes.

    The noise and the scheduler's arithmetic are float32 whatever the type of the models.

    Images larger than a tile are denoised as a whole: in each step the U-Net predicts overlapping
    windows, which are blended (MultiDiffusion, Bar-Tal et al. 2023, arXiv:2302.08113). The grid of
    windows moves by random numbers from step to step.

    With `image`, the denoising starts from it (SDEdit, Meng et al. 2022, arXiv:2108.01073): it is
    encoded, noise is added up to the step that `strength` names, and the other steps follow.

    `type(pipe)(**pipe.components)` is the same pipeline again: options that are not given are those
    of the last pipeline that had this `unet`. A new `unet` has an unknown pixel size, 50 steps and
    no guidance.

    Args:
        vqvae: A 1-channel autoencoder: `VQModel`, `AutoencoderKL`, or a component of ours with the
            interface of one of the two. Its config holds `latents_mean` and `latents_std`, one
            number per latent channel, which put the denoiser's latents into its own scale; without
            them, its `scaling_factor` and `shift_factor` do.
        unet: A `UNet2DModel` over latents [B, C, h, w], or an `EMUNet2DModel`. With
            `num_class_embeds` K + 1 it has K classes, and the last number is that of no class.
        scheduler: Solver of the denoising equation. The saved one, with
            `default_num_inference_steps`, is the model's default. Another one is made by
            `OtherScheduler.from_config(pipe.scheduler.config)`: for flow matching
            `FlowMatchEulerDiscreteScheduler` or `FlowMatchHeunDiscreteScheduler`. Schedulers that
            do not suit the model are refused.
        pixel_size_nm: Side of a pixel in nanometres; None if unknown.
        default_num_inference_steps: Denoising steps, unless the call says otherwise.
        grain: An `EMGrain`, which adds the noise that the autoencoder removes; None adds none.
        guide: A weaker U-Net of the same prediction, such as an early snapshot of `unet`, for
            autoguidance (Karras et al. 2024, arXiv:2406.02507); None cannot guide.
        guidance_scale, guidance_start, guidance_stop: The guidance of a call that does not say
            otherwise; see `denoise`.
        id2label: {number of a class: its name} for a U-Net with classes, or None for classes
            without names.
    """

    _package = "em_diffusion"
    model_cpu_offload_seq = "unet->vqvae->grain"
    _optional_components: ClassVar[list[str]] = ["grain", "guide"]
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        vqvae: ModelMixin,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        pixel_size_nm: float | str | None = "kept",
        default_num_inference_steps: int | None = None,
        grain: ModelMixin | None = None,
        guide: ModelMixin | None = None,
        guidance_scale: float | None = None,
        guidance_start: float | None = None,
        guidance_stop: float | None = None,
        id2label: dict[int, str] | dict[str, str] | str | None = "kept",
    ):
        super().__init__()
        self._kept_codes = None
        self._num_timesteps, self._interrupt = 0, False
        for component in (vqvae, unet, scheduler, grain, guide):
            if cls := find_own_class(component):
                read_source(cls)
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler, grain=grain, guide=guide)
        given: dict[str, Any] = {
            "default_num_inference_steps": default_num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_start": guidance_start,
            "guidance_stop": guidance_stop,
        }
        kept: dict[str, Any] = find_kept_options(unet)
        size = kept.get("pixel_size_nm") if pixel_size_nm == "kept" else pixel_size_nm
        names = kept.get("id2label") if id2label == "kept" else id2label
        had_guide = kept.get("guide", (None, None))[0] is not None
        if guide is None and (had_guide or not self.num_classes):
            kept = {name: each for name, each in kept.items() if not name.startswith("guidance_")}
        options: dict[str, Any] = {
            name: type(default)(kept.get(name, default) if given[name] is None else given[name])
            for name, default in DEFAULTS.items()
        }
        self.register_to_config(
            pixel_size_nm=None if size is None else float(size),
            id2label=check_class_names(names, self.num_classes),
            **options,
        )
        keep_options(self, unet)

    def __setattr__(self, name, value):
        """Set an attribute; a scheduler is made exchangeable first."""
        if isinstance(value, SchedulerMixin):
            make_exchangeable(value)
        super().__setattr__(name, value)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        add_grain: bool = True,
        guidance_scale: float | None = None,
        guidance_start: float | None = None,
        guidance_stop: float | None = None,
        height: int | None = None,
        width: int | None = None,
        window_batch_size: int = EXACT_BATCH,
        image: Any = None,
        strength: float | None = None,
        class_labels: torch.Tensor | list[int | str] | int | str | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate `batch_size` images by `denoise` and `decode`; see there for other arguments.

        Args:
            output_type: "pil" (mode "L"), "np" (float32 [B, H, W, 1] in [0, 1]), "pt" (float32
                [B, 1, H, W] in [0, 1]) or "latent" (float32 [B, C, h, w] in the autoencoder's
                scale, as `decode` takes them).

        Returns:
            `ImagePipelineOutput`, or a tuple of one element with return_dict=False.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        latents = self.denoise(
            batch_size,
            generator,
            num_inference_steps,
            eta,
            latents,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            guidance_scale,
            guidance_start,
            guidance_stop,
            height,
            width,
            window_batch_size,
            image,
            strength,
            class_labels,
        )
        images = latents
        if output_type != "latent":
            images = self.decode(latents, generator, add_grain, window_batch_size)
            images = from_pixels(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def denoise(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        guidance_scale: float | None = None,
        guidance_start: float | None = None,
        guidance_stop: float | None = None,
        height: int | None = None,
        width: int | None = None,
        window_batch_size: int = EXACT_BATCH,
        image: Any = None,
        strength: float | None = None,
        class_labels: torch.Tensor | list[int | str] | int | str | None = None,
    ) -> torch.Tensor:
        """Generate latents, float32 [B, C, h, w] in the autoencoder's scale, for `decode`.

        Args:
            batch_size: Number of images. Default: as many as `image` or `class_labels` has, or 1.
            generator: One for the batch, or a list of `batch_size`. With a list, image i depends on
                generator i alone.
            num_inference_steps: Denoising steps. Default: `default_num_inference_steps`. Heun's
                schedulers call the U-Net twice in all steps but the last.
            eta: Noise that DDIM adds back in each step, from 0 (none) to 1 (as in DDPM).
            latents: Initial noise [B, C, h, w] of unit variance, instead of the generator's.
            callback_on_step_end: Called as f(pipe, step, timestep, {"latents": ...}) after each
                step. The latents that it returns, in the denoiser's scale, replace the step's. It
                can set `pipe._interrupt = True` to skip the other steps.
            guidance_scale: The prediction is weaker + scale (unet - weaker); 1 is the U-Net's own.
                The guide is the weaker one, asked for the same classes; without a guide it is the
                U-Net for no class (classifier-free guidance, arXiv:2207.12598).
            guidance_start, guidance_stop: Fractions of the steps between which that holds.
            height, width: In pixels. Default: those of `image`, or of a tile.
            window_batch_size: Windows that the U-Net sees at a time, which bounds the memory.
            image: Images to start from, one serves all; see `em_training.em_grey_images.to_pixels`.
            strength: Fraction of the steps that change `image`: at 0 it is only reconstructed, at 1
                next to nothing is left of it. Default: 0.5.
            class_labels: Number or name of a class, for each image or for all. Default: no class.

        Raises:
            ValueError: For arguments that do not fit, or if the model diverged.
        """
        pixels = None if image is None else to_pixels(image)  # [N, 1, H, W]
        batch_size = self._check_image(pixels, strength, batch_size, height, width, class_labels)
        self._check_inputs(batch_size, generator, callback_on_step_end_tensor_inputs)
        labels = self._check_classes(class_labels, batch_size)
        guidance = self._check_guidance(guidance_scale, guidance_start, guidance_stop, class_labels)
        size = self.find_latent_size(*((height, width) if pixels is None else pixels.shape[2:]))
        latents = self._prepare_latents(batch_size, generator, latents, size)  # [B, C, h, w]
        self._prepare_scheduler(num_inference_steps, batch_size, generator)
        windows = self._draw_windows(batch_size, generator, size), window_batch_size
        step_arguments = self._find_step_arguments(generator, eta)
        latents, first = self._start(latents, pixels, strength, window_batch_size)
        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self._solve(latents, first, labels, guidance, *windows, step_arguments, *callback)
        return _refuse_non_finite(self.denormalise_latents(latents), "latents")

    def _start(self, noise, pixels, strength, window_batch_size):
        """Return noisy latents [B, C, h, w] to start from, and the index of their timestep."""
        if pixels is None:
            return noise * getattr(self.scheduler, "init_noise_sigma", 1.0), 0
        first = self._skip_steps(DEFAULT_STRENGTH if strength is None else strength)
        encoded = self.normalise_latents(self.encode(pixels, window_batch_size))
        return self._add_noise(encoded, noise, first), first

    def _solve(
        self,
        latents,
        first,
        labels,
        guidance,
        windows,
        window_batch_size,
        step_arguments,
        callback,
        names,
    ):
        """Take noisy latents [B, C, h, w] through the steps from `first` on.

        windows are those of each step, labels int64 [B] or None.
        """
        labels = None if labels is None else labels.to(latents.device)
        timesteps, (scale, start, stop) = self.scheduler.timesteps, guidance
        timesteps_on_device = timesteps.to(latents.device)
        guided_steps = range(int(start * len(timesteps)), int(stop * len(timesteps)))
        self._num_timesteps, self._interrupt = len(timesteps) - first, False

        for i, timestep in enumerate(self.progress_bar(timesteps[first:]), start=first):
            if self._interrupt:
                continue
            model_input = latents
            if hasattr(self.scheduler, "scale_model_input"):
                model_input = self.scheduler.scale_model_input(latents, timestep)
            guided = scale if i in guided_steps else 1.0
            output = self._predict(
                model_input, timesteps_on_device[i], labels, guided, windows[i], window_batch_size
            )  # [B, C, h, w]
            latents = self.scheduler.step(output, timestep, latents, **step_arguments).prev_sample
            if callback is not None:
                tensors = {name: latents for name in names}
                latents = (callback(self, i - first, timestep, tensors) or {}).get(
                    "latents", latents
                )
        return latents

    def _predict(self, latents, timestep, labels, scale, windows, window_batch_size):
        """Return the guided prediction for scaled noisy latents [B, C, h, w]; float32.

        labels: Int64 [B], or None for a U-Net without classes.
        """

        def predict(latents, *labels):
            output = _run(self.unet, latents, timestep, *labels)
            if scale == 1:
                return output
            if self.guide is not None:
                weaker = _run(self.guide, latents, timestep, *labels)
            else:
                no_class = torch.full_like(labels[0], self.num_classes)
                weaker = _run(self.unet, latents, timestep, no_class)
            return weaker + scale * (output - weaker)

        conditions = () if labels is None else (labels,)
        if windows is None:
            return predict(latents, *conditions)
        tile = self.latent_shape[1:]
        return blend_windows(predict, latents, windows, tile, window_batch_size, *conditions)

    def _draw_windows(self, batch_size, generator, size):
        """Return the windows of each step and image, as `blend_windows` takes them.

        None for each step if the images are tiles.
        """
        tile, num_steps = self.latent_shape[1:], len(self.scheduler.timesteps)
        if size == tile:
            return [None] * num_steps
        rngs = generator if isinstance(generator, list | tuple) else [generator] * batch_size
        shifts = [
            torch.rand((num_steps, 2), generator=rng, device="cpu" if rng is None else rng.device)
            for rng in rngs
        ]
        return [
            [
                [place_windows(*sides, share) for *sides, share in zip(size, tile, shift[i])]
                for shift in (each.tolist() for each in shifts)
            ]
            for i in range(num_steps)
        ]

    @property
    def components(self) -> dict[str, Any]:
        """The models and the scheduler by name; a new pipeline of them has the same options."""
        keep_options(self, self.unet)
        return super().components

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.out_channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a U-Net without classes."""
        return max(0, (self.unet.config.get("num_class_embeds") or 0) - 1)

    @torch.no_grad()
    def find_latent_size(
        self, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """Return height and width of the latents of images of `height` x `width` pixels.

        Images are at least as large as a tile, and a multiple of the autoencoder's factor.

        Args:
            height, width: In pixels. None: that of a tile.

        Raises:
            ValueError: For other sizes, with the nearest possible one.
        """
        tile = self.latent_shape[1:]
        if height is None and width is None:
            return tile
        wake(self.vqvae)
        cell = self._decode(
            torch.zeros(1, self.latent_shape[0], 1, 1, device=self._execution_device)
        )
        factors = cell.shape[-2:]
        pixels = [n * factor for n, factor in zip(tile, factors)]
        asked = [n if given is None else given for n, given in zip(pixels, (height, width))]
        nearest = find_nearest_size(asked, pixels, factors)
        if list(asked) != nearest:
            height, width = factors
            raise ValueError(
                f"an image of {asked[0]} x {asked[1]} pixels is asked for, but this model draws "
                f"multiples of {height} x {width}, from {pixels[0]} x {pixels[1]} on and up to "
                f"{MAX_PIXELS:,} pixels in all. The nearest size is {nearest[0]} x {nearest[1]}."
            )
        return tuple(n // factor for n, factor in zip(nearest, factors))

    @property
    def num_timesteps(self) -> int:
        """Number of calls of the scheduler's `step` in the last or current denoising."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt`, which skips the remaining steps."""
        return self._interrupt

    @torch.no_grad()
    def decode(
        self,
        latents: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        add_grain: bool = True,
        window_batch_size: int = EXACT_BATCH,
    ) -> torch.Tensor:
        """Decode latents [B, C, h, w] in the autoencoder's scale to images.

        A VQ autoencoder decodes the nearest codes, which are searched in float32. Latents larger
        than those of a tile are decoded in overlapping windows, which are blended smoothly.

        Args:
            generator: Of the grain: one for the batch or a list of B. With a list, image i depends
                on latent and generator i alone.
            add_grain: False adds no grain.
            window_batch_size: Windows decoded at a time, which bounds the memory.

        Returns:
            Float32 [B, 1, H, W] in [-1, 1].
        """
        _refuse_non_finite(latents, "latents")  # the nearest codes would make an image of them
        tile, size = self.latent_shape[1:], tuple(latents.shape[-2:])
        is_whole = size != tile and all(n >= side for n, side in zip(size, tile))
        add_grain = add_grain and self.grain is not None
        if add_grain:
            check_batch(len(latents), generator)
            generator = list(generator) if isinstance(generator, tuple) else generator
            pixels = self.grain.config.sample_size
            if is_whole:
                pixels = [n * px // side for n, px, side in zip(size, pixels, tile)]
            drawn = self.grain.draw(len(latents), generator, latents.device, pixels)
        wake(self.vqvae)
        codes = self._find_codes()
        if codes is not None:
            latents = self._quantise(latents, codes)
        if is_whole:
            windows = [[place_windows(*sides) for sides in zip(size, tile)]] * len(latents)
            images = blend_windows(self._decode, latents, windows, tile, window_batch_size)
        else:
            images = self._decode(latents)
        images = _refuse_non_finite(images, "decoded images").clamp(-1, 1)
        if not add_grain:
            return images
        return _refuse_non_finite(self.grain(images, drawn=drawn), "grain").clamp(-1, 1)

    def _decode(self, latents):
        """Decode latents [B, C, h, w], of a VQ autoencoder codes, to float32 [B, 1, H, W]."""
        if self.vqvae.dtype == torch.float16 and self.vqvae.config.get("force_upcast"):
            self.vqvae.to(torch.float32)  # its config says that it overflows
        options = {} if self._find_codes() is None else {"force_not_quantize": True}
        images = self.vqvae.decode(latents.to(self.vqvae.dtype), **options).sample
        if images.shape[1] != 1:
            raise ValueError(
                f"the autoencoder decodes to {images.shape[1]} channels, not to one; fold "
                "its colours into one channel first (em_diffusion.load_autoencoder does)."
            )
        return images.float()

    @torch.no_grad()
    def encode(self, images: torch.Tensor, window_batch_size: int = EXACT_BATCH) -> torch.Tensor:
        """Encode images [B, 1, H, W] in [-1, 1] to latents that `decode` takes.

        A VQ autoencoder's latents are not quantised, and a KL autoencoder's are the mean. Images
        are encoded in windows of a tile's size, which overlap in larger ones and are blended.

        Args:
            window_batch_size: Windows encoded at a time, which bounds the memory.

        Returns:
            Float32 [B, C, h, w].
        """
        tile, size = self.latent_shape[1:], self.find_latent_size(*images.shape[-2:])
        images = images.to(self._execution_device, torch.float32)
        wake(self.vqvae)
        factor = images.shape[-1] // size[-1]
        # the pixels of a latent become channels, so that windows have the places of latents
        folded = torch.nn.functional.pixel_unshuffle(images, factor)
        windows = [[place_windows(*sides) for sides in zip(size, tile)]] * len(images)
        return blend_windows(
            lambda tiles: self._encode(torch.nn.functional.pixel_shuffle(tiles, factor)),
            folded,
            windows,
            tile,
            window_batch_size,
        )

    def _encode(self, images):
        """Encode images [B, 1, H, W] of one tile each; float32."""
        if self.vqvae.dtype == torch.float16 and self.vqvae.config.get("force_upcast"):
            self.vqvae.to(torch.float32)  # its config says that it overflows
        output = self.vqvae.encode(images.to(self.vqvae.dtype))
        latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
        return _refuse_non_finite(latents.float(), "encoded images")

    def normalise_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Put encoder outputs [B, C, h, w] into the denoiser's scale: mean 0, deviation 1."""
        mean, std = self._find_latent_statistics(latents.device)
        return (latents.float() - mean) / std

    def denormalise_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Put the denoiser's latents [B, C, h, w] back into the autoencoder's scale; float32."""
        mean, std = self._find_latent_statistics(latents.device)
        return latents.float() * std + mean

    def _find_codes(self):
        """Return the codebook [K, C] in float32, if possible unrounded; None if there is none."""
        embedding = getattr(getattr(self.vqvae, "quantize", None), "embedding", None)
        if embedding is None:
            return None
        weight, kept = embedding.weight, self._kept_codes
        if kept is not None and kept[0] is weight and kept[1] == weight._version:
            return kept[2].to(weight.device)
        return weight.float()

    def _quantise(self, latents, codes):
        """Replace latents [B, C, h, w] by the nearest of codes [K, C], always in float32."""
        with torch.autocast(latents.device.type, enabled=False):
            vectors = latents.float().movedim(1, -1)  # [B, h, w, C]
            indices = nearest_codes(vectors.reshape(-1, vectors.shape[-1]), codes)
            return codes[indices].reshape(vectors.shape).movedim(-1, 1).contiguous()

    def to(self, *args: Any, **kwargs: Any) -> "EMLatentDiffusionPipeline":
        """Move or convert the models like `DiffusionPipeline.to`; a VQ's codes stay in float32."""
        with self._keep_codes():
            super().to(*args, **kwargs)
        return self

    @contextlib.contextmanager
    def _keep_codes(self):
        """Keep the float32 codes if the block leaves them in a narrower type."""
        codes = self._find_codes()
        codes = None if codes is None else codes.detach().clone()
        yield
        if codes is not None:
            weight = self.vqvae.quantize.embedding.weight
            self._kept_codes = None
            if weight.dtype != torch.float32:
                self._kept_codes = (weight, weight._version, codes.to(weight.device))

    def _find_latent_statistics(self, device):
        config = self.vqvae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return config.get("shift_factor") or 0.0, 1.0 / config.scaling_factor
        mean, std = (torch.tensor(each, device=device).view(1, -1, 1, 1) for each in (mean, std))
        return mean, std

    def _prepare_scheduler(self, num_inference_steps, batch_size, generator):
        """Set the timesteps on the CPU, and seed schedulers that draw their own noise.

        diffusers spreads n steps of flow matching from 1000 to 1, so that the last one does next to
        nothing, and applies `shift` twice. Here they go from 1000 to 1000 / n, and then to 0.
        `DPMSolverSDEScheduler` takes no generator, but a seed for each image.
        """
        scheduler, num_steps = self.scheduler, num_inference_steps
        refuse_unsuitable(scheduler)
        if num_steps is None:
            num_steps = self.config.default_num_inference_steps
        if num_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_steps}; it must be at least 1.")
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            sigmas = [1 - i / num_steps for i in range(num_steps)]
            scheduler.set_timesteps(sigmas=sigmas, device="cpu")
        elif isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / num_steps
            scheduler.set_timesteps(num_steps, device="cpu")
        else:
            scheduler.set_timesteps(num_steps, device="cpu")
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        if hasattr(scheduler, "noise_sampler_seed"):
            scheduler.noise_sampler = scheduler.noise_sampler_seed = None
            if generator is not None:
                is_list = isinstance(generator, list | tuple)
                scheduler.noise_sampler_seed = [
                    int(torch.randint(2**63 - 1, (), generator=rng, device=rng.device))
                    for rng in (generator if is_list else [generator] * batch_size)
                ]

    def _prepare_latents(self, batch_size, generator, latents, size):
        shape, device = (batch_size, self.latent_shape[0], *size), self._execution_device
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"`latents` has the shape {tuple(latents.shape)}; the pipeline starts from {shape}."
            )
        return latents.to(device, torch.float32)

    def _skip_steps(self, strength):
        """Let the scheduler begin where `strength` says; return the index of that timestep."""
        scheduler = self.scheduler
        if "PNDM" in type(scheduler).__name__:
            raise ValueError(
                f"{type(scheduler).__name__} cannot start from an image: its first steps differ "
                "from the other ones. Use DDIMScheduler or DPMSolverMultistepScheduler."
            )
        order = getattr(scheduler, "order", 1)  # calls of a step, but one in the last
        num_steps = -(-len(scheduler.timesteps) // order)
        first = min(order * int(num_steps * (1 - strength) + 1e-9), len(scheduler.timesteps))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return first

    def _add_noise(self, latents, noise, first):
        """Mix latents [N, C, h, w] and noise [B, C, h, w] as timestep number `first` needs it."""
        latents = latents.expand_as(noise)
        timesteps = self.scheduler.timesteps[first : first + 1]
        if len(timesteps) == 0:
            return latents
        timesteps = timesteps.to(noise.device).expand(len(noise))
        if is_flow(self.scheduler) and hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(latents, timesteps, noise)
        return self.scheduler.add_noise(latents, noise, timesteps)

    def _find_step_arguments(self, generator, eta):
        accepted = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in accepted:
            raise ValueError(
                f"{type(self.scheduler).__name__} takes no `eta`; leave it at 0, or use "
                "DDIMScheduler."
            )
        arguments = {"eta": eta, "generator": generator}
        return {name: value for name, value in arguments.items() if name in accepted}

    def _check_inputs(self, batch_size, generator, callback_tensor_inputs):
        check_batch(batch_size, generator)
        unknown = set(callback_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}; only latents can be "
                "given."
            )

    def _check_image(self, pixels, strength, batch_size, height, width, class_labels=None):
        """Return the number of images to draw."""
        if strength is not None and not 0 <= strength <= 1:
            raise ValueError(f"`strength` is {strength}; it must be from 0 to 1.")
        if pixels is None:
            if strength is not None:
                raise ValueError(
                    f"`strength` is {strength}, but there is no `image`; give one, or leave "
                    "`strength` out."
                )
            return count_images(batch_size, class_labels)
        if batch_size is not None and len(pixels) not in (1, batch_size):
            raise ValueError(
                f"{len(pixels)} images for a `batch_size` of {batch_size}; give one image for "
                "all, or one for each."
            )
        for name, given, side in zip(("height", "width"), (height, width), pixels.shape[2:]):
            if given not in (None, side):
                raise ValueError(
                    f"`{name}` is {given}, but the images have {side} pixels; leave it out, or "
                    "resize the images."
                )
        return len(pixels) if batch_size is None else batch_size

    def _check_classes(self, class_labels, batch_size):
        """Return numbers of classes, int64 [batch_size]; None for a U-Net without classes."""
        if not self.num_classes:
            if class_labels is not None:
                raise ValueError(
                    f"`class_labels` is {class_labels!r}, but this model has no classes; leave it "
                    "out."
                )
            return None
        if class_labels is None:
            return torch.full((batch_size,), self.num_classes)
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        is_one = isinstance(class_labels, int | str)
        given = [class_labels] * batch_size if is_one else list(class_labels)
        if len(given) != batch_size:
            raise ValueError(
                f"{len(given)} `class_labels` for {batch_size} images; give one for each, or one "
                "for all."
            )
        labels = self.labels
        numbers = [labels.get(each) if isinstance(each, str) else each for each in given]
        for each, number in zip(given, numbers):
            is_number = isinstance(number, int) and not isinstance(number, bool)
            if not (is_number and 0 <= number < self.num_classes):
                names = f", or a name: {', '.join(labels)}" if labels else ""
                raise ValueError(
                    f"`class_labels` has {each!r}, which is no class of this model; give a number "
                    f"from 0 to {self.num_classes - 1}{names}."
                )
        return torch.tensor(numbers)

    def _check_guidance(self, scale, start, stop, class_labels=None):
        """Return scale, start and stop, those of the pipeline for None.

        Images of no class are not guided if there is no guide.
        """
        config, can_guide = self.config, self.guide is not None or class_labels is not None
        if scale is None:
            scale = 1.0 if self.num_classes and not can_guide else config.guidance_scale
        start = config.guidance_start if start is None else start
        stop = config.guidance_stop if stop is None else stop
        if not math.isfinite(scale):
            raise ValueError(f"`guidance_scale` is {scale}; it must be a finite number.")
        if not 0 <= start <= stop <= 1:
            raise ValueError(
                f"`guidance_start` is {start} and `guidance_stop` {stop}; they must be rising "
                "fractions of the steps, from 0 to 1."
            )
        if scale != 1 and not can_guide:
            classes = ", give `class_labels`" if self.num_classes else ""
            raise ValueError(
                f"`guidance_scale` is {scale}, but this pipeline has no guide; leave it at 1"
                f"{classes}, or set `pipe.guide` to a weaker U-Net."
            )
        if self.guide is not None:
            num = self.guide.config.get("num_class_embeds")
            if num not in (None, self.unet.config.get("num_class_embeds")):
                raise ValueError(
                    f"the guide has {num - 1} classes, but the U-Net {self.num_classes}; set "
                    "`pipe.guide` to a U-Net of the same classes, or without classes."
                )
        return scale, start, stop

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Save the pipeline, also with a grain or guide that was set after it was created."""
        self.register_modules(grain=self.grain, guide=self.guide)
        super().save_pretrained(save_directory, safe_serialization, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "EMLatentDiffusionPipeline":
        """Load a folder or Hub repository; options are `DiffusionPipeline.from_pretrained`'s.

        The installed class loads components with installed code alone: it runs no code from the
        repository and needs no `trust_remote_code`.

        Raises:
            ValueError: For a component that this version does not have, or pickled weights.
        """
        refuse_pickles(kwargs)
        source = pretrained_model_name_or_path
        if not cls._is_installed():
            return super().from_pretrained(source, **kwargs)
        kwargs.pop("trust_remote_code", None)
        dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
        dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}

        def find_dtype(name):
            found = dtypes.get(name, dtypes.get("default"))
            return found if isinstance(found, torch.dtype) else torch.float32

        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        index = DiffusionPipeline.load_config(source, **hub_options)
        for name, value in index.items():
            if is_own_component(name, value) and name not in kwargs:
                component = import_own_component(cls._package, source, name, *value)
                options = hub_options | {"subfolder": name, "use_safetensors": True}
                if name != "vqvae" and find_dtype(name) != torch.float32:
                    options["torch_dtype"] = find_dtype(name)
                kwargs[name] = load_component(component, source, kwargs.get("variant"), options)
        narrow = find_dtype("vqvae")
        if narrow == torch.float32:
            return super().from_pretrained(source, dtype=dtype, **kwargs)
        wide = dtypes | {"vqvae": torch.float32}
        pipeline = super().from_pretrained(source, dtype=wide, **kwargs)
        with pipeline._keep_codes():
            # diffusers' own `to` warns of every narrower type
            torch.nn.Module.to(pipeline.vqvae, narrow)
        return pipeline


def _run(network, latents, timestep, labels=None):
    """Return a U-Net's prediction in float32; labels go to a U-Net that has classes."""
    options = {"class_labels": labels} if network.config.get("num_class_embeds") else {}
    return network(latents.to(network.dtype), timestep, **options).sample.float()


def _refuse_non_finite(tensor, name):
    """Return `tensor`, or raise `ValueError` if it holds nan or infinity."""
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"the model diverged: its {name} are not finite. Check its training log, use an "
            "earlier checkpoint, or another sampler or type (float16 may overflow)."
        )
    return tensor


@torch.no_grad()
def nearest_codes(vectors, codebook):
    """Return the index of the code nearest to each of vectors [N, C] in codebook [K, C]: int64 [N].

    At most `MAX_DISTANCES` distances are in memory at a time.
    """
    half_squares = codebook.square().sum(dim=1) / 2  # [K]
    parts = vectors.split(max(1, MAX_DISTANCES // len(codebook)))
    found = [torch.addmm(half_squares, x, codebook.T, alpha=-1).argmin(dim=1) for x in parts]
    return torch.cat(found)


read_source(EMLatentDiffusionPipeline)
