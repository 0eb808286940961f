"""Draw images of a mask-conditioned latent diffusion model, and tell their layouts."""

from collections.abc import Iterator

import torch

from em_data.micrograph import Defect
from em_diffusion.drawing import LDMDrawer
from em_diffusion.layouts import draw_layout
from em_training import make_image_rng


class MaskLDMDrawer(LDMDrawer):
    """Draws images of an `EMMaskLatentDiffusionPipeline`; arguments as of `LDMDrawer`.

    The generator of image i draws its layout before its noise, so that both depend on (seed, i)
    alone.
    """

    def __init__(self, pipeline, options, **settings):
        super().__init__(pipeline, options, **settings)
        saved = pipeline.config.mask_scale
        self.mask_scale = saved if options.mask_scale is None else options.mask_scale
        self.kinds = pipeline.kinds

    def describe(self) -> dict:
        """Return the settings that decide the images."""
        return {"mask_scale": self.mask_scale} | super().describe()

    def draw(self, numbers: list[int]) -> torch.Tensor:
        """Return images float32 [B, 1, H, W] in [-1, 1] on the model's device."""
        with self.pipeline.conditioned_on(None, self.mask_scale):
            return super().draw(numbers)

    def draw_both(self, numbers: list[int]) -> torch.Tensor:
        """Return images like `draw`, and the same ones without grain: float32 [B, 2, H, W]."""
        with self.pipeline.conditioned_on(None, self.mask_scale):
            return super().draw_both(numbers)

    def draw_layouts(self, numbers: list[int]) -> tuple[torch.Tensor, list[list[Defect]]]:
        """Return images as `draw` does, and the defects that each one was drawn for."""
        return self.draw(numbers), [self.find_layout(number) for number in numbers]

    def find_layout(self, number: int) -> list[Defect]:
        """Return the defects of image `number`, without drawing it."""
        pipeline, rng = self.pipeline, make_image_rng(self.seed, number)
        height, width = (side * pipeline.mask_factor for side in pipeline.latent_shape[1:])
        if self.size is not None:
            height, width = self.size
        return draw_layout(pipeline.layout_sampler, height, width, rng)

    def walk(self, frames_per_key: int) -> Iterator[torch.Tensor]:
        """Yield batches of frames of a closed walk; all have the layout of image 0."""
        with self.pipeline.conditioned_on(None, self.mask_scale):
            yield from super().walk(frames_per_key)
