"""Draw images of a tuned text-to-image model by their numbers."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from em_training import make_image_rng
from em_training.classes import assign_classes


class LoRADrawer:
    """Draws images of an `EMLoRAPipeline`; arguments as in `Family.start`.

    options: an `em_stable_diffusion.family.LoRAOptions`.
    Image i draws its noise from a generator seeded by (seed, i). The colourfulness of the first
    batch is said once: the model draws colour images, and what is returned is grey.
    """

    fixed_batch = False

    def __init__(
        self,
        pipeline,
        options,
        *,
        seed: int = 0,
        batch_size: int = 50,
        say: Callable[[str], Any] = print,
        on_progress: Callable[[float], None] | None = None,
    ):
        assign_classes(pipeline, options.classes, [0])  # an unknown class is an error now
        self.pipeline, self.options, self.seed = copy.copy(pipeline), options, seed
        self.say, self.on_progress, self._has_said_colour = say, on_progress, False
        self.pipeline.set_progress_bar_config(disable=True)
        config = pipeline.config
        self.num_steps = options.num_inference_steps or config.default_num_inference_steps
        given = options.guidance_scale
        self.guidance_scale = config.guidance_scale if given is None else given

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide the images."""
        classes = {"classes": list(self.options.classes)} if self.options.classes else {}
        return classes | {
            "scheduler": type(self.pipeline.scheduler).__name__,
            "num_inference_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
        }

    def draw(self, numbers: list[int]) -> torch.Tensor:
        """Return images float32 [B, 1, H, W] in [-1, 1] on the model's device."""

        def report(pipeline, step, timestep, tensors):
            if self.on_progress is not None:
                self.on_progress(min(1.0, (step + 1) / self.num_steps))
            return tensors

        images, colourfulness = self.pipeline.draw(
            len(numbers),
            [make_image_rng(self.seed, number) for number in numbers],
            self.num_steps,
            self.guidance_scale,
            assign_classes(self.pipeline, self.options.classes, numbers),
            callback=report,
        )
        if not self._has_said_colour:
            self._has_said_colour = True
            self.say(
                f"colourfulness: {float(colourfulness.mean()):.2g} of 255 grey levels in the first "
                "images, which are turned grey (mean deviation of the channels from their mean)"
            )
        return images
