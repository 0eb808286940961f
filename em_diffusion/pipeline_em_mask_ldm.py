"""Latent diffusion conditioned on masks of defects. A saved pipeline's file holds its base, too."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin

from em_training.em_saved_pipeline import find_kept_options, find_own_class, read_source, wake

from .pipeline_em_ldm import EMLatentDiffusionPipeline

# a kind, its box (x0, y0, x1, y1) and its mask in the box; or an object with these attributes
Layout = Sequence[tuple[str, tuple[int, int, int, int], np.ndarray]] | Sequence[Any]


@dataclass
class EMMaskPipelineOutput(ImagePipelineOutput):
    """Images and what they were drawn for.

    Args:
        images: As of `ImagePipelineOutput`.
        masks: Float32 [B, K + 1, H, W] in [0, 1]: a channel a kind, then that of contacts.
        layouts: The defects of each image as (kind, box_px, mask); None if tensors were given.
    """

    masks: torch.Tensor | None = None
    layouts: list[Layout] | None = None


class EMMaskLatentDiffusionPipeline(EMLatentDiffusionPipeline):
    """Generates micrographs in which defects lie where masks say.

    The U-Net takes noisy latents and, in further channels, the masks: one channel a kind of defect
    and one for contacts, where defects touch or overlap. The pixels that one latent covers are
    stacked as channels. One more channel is 1, and 0 for images whose mask is not given ("dropped"
    in training), which then have any defects.

    Args:
        layout_sampler: An `EMLayoutSampler`, which draws layouts for images without a given mask.
            Its `kinds` name the channels of masks.
        mask_scale: Guidance by the mask in a call that does not say otherwise, see `denoise`.
        vqvae, scheduler, grain, guide, options: As of `EMLatentDiffusionPipeline`. The guide takes
            masks, too.
    """

    model_cpu_offload_seq = "layout_sampler->unet->vqvae->grain"

    def __init__(
        self,
        vqvae: ModelMixin,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        layout_sampler: ModelMixin,
        pixel_size_nm: float | str | None = "kept",
        default_num_inference_steps: int | None = None,
        grain: ModelMixin | None = None,
        guide: ModelMixin | None = None,
        guidance_scale: float | None = None,
        guidance_start: float | None = None,
        guidance_stop: float | None = None,
        mask_scale: float | None = None,
        id2label: dict[int, str] | dict[str, str] | str | None = "kept",
    ):
        kept = find_kept_options(unet)
        super().__init__(
            vqvae,
            unet,
            scheduler,
            pixel_size_nm=pixel_size_nm,
            default_num_inference_steps=default_num_inference_steps,
            grain=grain,
            guide=guide,
            guidance_scale=guidance_scale,
            guidance_start=guidance_start,
            guidance_stop=guidance_stop,
            id2label=id2label,
        )
        if cls := find_own_class(layout_sampler):
            read_source(cls)
        self.register_modules(layout_sampler=layout_sampler)
        scale = kept.get("mask_scale", 1.0) if mask_scale is None else mask_scale
        self.register_to_config(mask_scale=float(scale))
        self._given: Any = None
        self._masks = self._layouts = self._condition = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of defects: the channels of masks, in this order."""
        return tuple(self.layout_sampler.config.kinds)

    @property
    def mask_factor(self) -> int:
        """Pixels that a latent covers along one side."""
        channels = self.unet.config.in_channels - self.latent_shape[0] - 1
        return math.isqrt(channels // (len(self.kinds) + 1))

    @torch.no_grad()
    def __call__(  # type: ignore[override]
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
        *,
        mask: torch.Tensor | np.ndarray | Sequence[Layout] | None = None,
        mask_scale: float | None = None,
        **options: Any,
    ) -> EMMaskPipelineOutput | tuple:
        """Generate images for masks; other arguments as of `EMLatentDiffusionPipeline`.

        Args:
            batch_size: Number of images. Default: that of masks, or 1.
            mask: [B, K, H, W], bool or numbers from 0 to 1, the channels of which are `kinds`;
                [B, K + 1, H, W] with a channel of contacts, see `draw_masks`; or a list of layouts:
                defects with `kind`, `box_px` and `mask`, or tuples of these. One serves the whole
                batch. Default: layouts of `layout_sampler`, drawn by `generator`.
            mask_scale: See `denoise`.

        Returns:
            `EMMaskPipelineOutput`, or (images, masks, layouts) with return_dict=False.
        """
        with self.conditioned_on(mask, mask_scale):
            batch_size = _count(mask, batch_size)
            options = self._fit_size(options) | {
                "return_dict": False,
                "callback_on_step_end": callback_on_step_end,
                "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            }
            images = super().__call__(
                batch_size, generator, num_inference_steps, eta, latents, output_type, **options
            )[0]
            masks, layouts = self._masks, self._layouts
        if not return_dict:
            return images, masks, layouts
        return EMMaskPipelineOutput(images=images, masks=masks, layouts=layouts)

    @torch.no_grad()
    def denoise(  # type: ignore[override]
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *arguments: Any,
        mask: torch.Tensor | np.ndarray | Sequence[Layout] | None = None,
        mask_scale: float | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Generate latents for masks; see `__call__` and `EMLatentDiffusionPipeline.denoise`.

        Args:
            mask: As of `__call__`. Default: that of `conditioned_on`, or of `layout_sampler`.
            mask_scale: The prediction is dropped + mask_scale (given - dropped), with the U-Net's
                predictions for the dropped and the given mask (classifier-free guidance, Ho and
                Salimans 2022, arXiv:2207.12598). 1 needs no second prediction.
        """
        given, scale = self._given or (None, None)
        mask_scale = scale if mask_scale is None else mask_scale
        with self.conditioned_on(given if mask is None else mask, mask_scale):
            if mask is not None:
                options = self._fit_size(options)
            batch_size = _count(mask, batch_size)
            return super().denoise(batch_size, generator, *arguments, **options)

    @contextlib.contextmanager
    def conditioned_on(self, mask: Any, mask_scale: float | None = None) -> Iterator[None]:
        """Use these masks in all calls of the block that are given none."""
        before = self._given
        scale = self.config.mask_scale if mask_scale is None else mask_scale
        if not math.isfinite(scale):
            raise ValueError(f"`mask_scale` is {scale}; it must be a finite number.")
        self._given = (mask, scale)
        try:
            yield
        finally:
            self._given = before
            if before is None:
                self._masks = self._layouts = self._condition = None

    def _fit_size(self, options):
        """Return options with height and width of the given masks, if these are tensors."""
        mask, _ = self._given
        if isinstance(mask, torch.Tensor | np.ndarray):
            if mask.ndim != 4:
                raise ValueError(
                    f"`mask` has the shape {tuple(mask.shape)}; give [B, K, H, W] with the kinds "
                    f"{', '.join(self.kinds)}."
                )
            for name, side in zip(("height", "width"), mask.shape[2:]):
                if options.get(name) not in (None, side):
                    raise ValueError(
                        f"`{name}` is {options[name]}, but the masks have {side} pixels; leave it "
                        "out, or resize the masks."
                    )
            options = options | dict(zip(("height", "width"), mask.shape[2:]))
        return options

    def _prepare_latents(self, batch_size, generator, latents, size):
        """Prepare the masks of a batch, too: drawn layouts come before the noise."""
        mask, _ = self._given
        height, width = (side * self.mask_factor for side in size)
        self._layouts = None
        if mask is None:
            wake(self.layout_sampler)
            rngs = generator if isinstance(generator, list | tuple) else [generator] * batch_size
            mask = [self.layout_sampler.sample(height, width, rng) for rng in rngs]
        if len(mask) not in (1, batch_size):
            raise ValueError(
                f"{len(mask)} masks for {batch_size} images; give one for each, or one for all."
            )
        if isinstance(mask, torch.Tensor | np.ndarray):
            masks = self._check_masks(torch.as_tensor(mask), height, width)
        else:
            mask = list(mask) * (batch_size if len(mask) == 1 else 1)
            self._layouts = mask
            masks = torch.stack([draw_masks(each, self.kinds, height, width) for each in mask])
        self._masks = masks.expand(batch_size, -1, -1, -1)
        condition = make_condition(self._masks, self.mask_factor)
        self._condition = condition.to(self._execution_device)
        return super()._prepare_latents(batch_size, generator, latents, size)

    def _check_masks(self, mask, height, width):
        """Return masks with the channel of contacts, float32 [B, K + 1, H, W]."""
        num_kinds, channels = len(self.kinds), mask.shape[1]
        if tuple(mask.shape[2:]) != (height, width):
            raise ValueError(
                f"the masks have {tuple(mask.shape[2:])} pixels, but the images ({height}, "
                f"{width}); give masks of the same size."
            )
        if channels not in (num_kinds, num_kinds + 1):
            raise ValueError(
                f"`mask` has {channels} channels, but this model has {num_kinds} kinds, "
                f"{', '.join(self.kinds)}; give a channel for each, and one of contacts if known."
            )
        mask = mask.float()
        low, high = mask.aminmax()
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"`mask` has values from {low:g} to {high:g}; give bool, or numbers from 0 to 1."
            )
        if channels == num_kinds:
            near = F.max_pool2d(mask, 3, stride=1, padding=1).sum(dim=1, keepdim=True)
            contacts = (near > 1) & (mask.amax(dim=1, keepdim=True) > 0)
            mask = torch.cat([mask, contacts.float()], dim=1)
        return mask

    def _predict(self, latents, *arguments):
        """Return the prediction for noisy latents [B, C, h, w] and the masks; float32."""
        _, scale = self._given
        condition = self._condition.to(latents)
        given = super()._predict(torch.cat([latents, condition], dim=1), *arguments)
        if scale == 1:
            return given
        dropped = torch.cat([latents, torch.zeros_like(condition)], dim=1)
        weaker = super()._predict(dropped, *arguments)
        return weaker + scale * (given - weaker)


def _count(mask, batch_size):
    """Return the number of images; None if neither masks nor `batch_size` tell it."""
    has_number = batch_size is None and mask is not None and len(mask) > 1
    return len(mask) if has_number else batch_size


def draw_masks(layout: Layout, kinds: Sequence[str], height: int, width: int) -> torch.Tensor:
    """Draw a layout as float32 [K + 1, H, W] of 0 and 1: a channel a kind, then contacts.

    A pixel is a contact if it belongs to a defect, and it or one of its eight neighbours belongs to
    another one.

    Args:
        layout: Defects with `kind`, `box_px` and `mask` in the box, or tuples of these. A defect
            without a mask fills its box.

    Raises:
        ValueError: For an unknown kind, a box outside the image, or a mask that does not fit.
    """
    channels = np.zeros((len(kinds) + 1, height, width), np.float32)
    near = np.zeros((height + 2, width + 2), np.int32)
    for each in layout:
        kind, box, mask = each if isinstance(each, tuple) else (each.kind, each.box_px, each.mask)
        x0, y0, x1, y1 = box
        if kind not in kinds:
            raise ValueError(f"a defect is a {kind}, but this model knows {', '.join(kinds)}.")
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(
                f"a {kind} has the box {tuple(box)}, which is not inside the image of {height} x "
                f"{width} pixels; cut it, or give `height` and `width`."
            )
        inside = np.ones((y1 - y0, x1 - x0), bool) if mask is None else np.asarray(mask, bool)
        if inside.shape != (y1 - y0, x1 - x0):
            raise ValueError(
                f"the mask of a {kind} has the shape {inside.shape}, but its box "
                f"{(y1 - y0, x1 - x0)}; give the mask inside the box."
            )
        part = channels[list(kinds).index(kind), y0:y1, x0:x1]
        np.maximum(part, inside, out=part)
        grown = np.zeros((y1 - y0 + 2, x1 - x0 + 2), bool)
        for dy in range(3):
            for dx in range(3):
                grown[dy : dy + y1 - y0, dx : dx + x1 - x0] |= inside
        near[y0 : y1 + 2, x0 : x1 + 2] += grown
    channels[-1] = (near[1:-1, 1:-1] > 1) & (channels[:-1].max(axis=0) > 0)
    return torch.from_numpy(channels)


def make_condition(masks: torch.Tensor, factor: int) -> torch.Tensor:
    """Return what the U-Net takes beside latents, float32 [B, (K + 1) factor^2 + 1, h, w].

    Args:
        masks: Float32 [B, K + 1, h factor, w factor].
        factor: Pixels that a latent covers along one side.
    """
    stacked = F.pixel_unshuffle(masks, factor)
    return torch.cat([stacked, torch.ones_like(stacked[:, :1])], dim=1)


read_source(EMMaskLatentDiffusionPipeline)
