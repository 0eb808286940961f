"""Draw images of a latent diffusion model by their numbers: denoise a batch, decode it in parts."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from em_diffusion.autoencoder import decode, encode
from em_diffusion.em_windows import place_windows
from em_diffusion.samplers import create_sampler
from em_training import make_image_rng
from em_training.classes import assign_classes
from em_training.family import EXACT_BATCH, WALK_KEYS, parse_size
from em_training.memory import halve_batch
from em_training.walk import walk_noise

# Decoded at a time: 16 images of 256 x 256. Larger parts are not faster and take much memory.
DECODED_PIXELS = 2**20


class LDMDrawer:
    """Draws images of an `EMLatentDiffusionPipeline`; arguments as in `Family.start`.

    options: an `em_diffusion.family.LDMOptions`.
    Image i draws its noise, and then its grain, from a generator seeded by (seed, i). The pipeline
    is copied (not its weights), so that the caller's keeps its sampler.
    """

    def __init__(
        self,
        pipeline,
        options,
        *,
        seed: int = 0,
        batch_size: int = 50,
        say: Callable[[str], None] = print,
        on_progress: Callable[[float], None] | None = None,
    ):
        self.options, self.seed, self.say, self.on_progress = options, seed, say, on_progress
        assign_classes(pipeline, options.classes, [0])  # an unknown class is an error now
        if options.guidance_scale not in (None, 1) and not self._can_guide(pipeline):
            classes = ", name classes with --classes" if pipeline.num_classes else ""
            raise ValueError(
                f"--guidance-scale is {options.guidance_scale}, but this model has no guide. Leave "
                f"it out{classes}, or add the guide of a run: python -m "
                "em_diffusion.choose_guidance RUN"
            )
        self.size = find_size(pipeline, options.size)
        self.fixed_batch = options.compile
        self.num_steps = options.num_inference_steps or pipeline.config.default_num_inference_steps
        self.pipeline = copy.copy(pipeline)
        self.pipeline.set_progress_bar_config(disable=True)
        if options.scheduler is None:
            scheduler = copy.deepcopy(pipeline.scheduler)
        else:
            scheduler = create_sampler(options.scheduler, pipeline.scheduler)
        self.pipeline.register_modules(scheduler=scheduler)
        for model in filter(None, (pipeline.unet, pipeline.guide, pipeline.vqvae)):
            model.to(memory_format=torch.channels_last)
        self.decode_batch_size = options.decode_batch_size or choose_decode_batch_size(
            pipeline, batch_size
        )
        if self.size is not None:
            self.window_batch_size = batch_size
            self.images_at_once = max(1, batch_size // count_windows(pipeline, self.size))
        if options.compile:
            # freezing packs the weights as a CPU reads them
            frozen = partial(torch.compile, options={"freezing": True})
            compile_model = frozen if pipeline.device.type == "cpu" else torch.compile
            self.pipeline.unet = compile_model(pipeline.unet)
            if pipeline.guide is not None:
                self.pipeline.guide = compile_model(pipeline.guide)

    def describe(self) -> dict:
        """Return the settings that decide the images."""
        scheduler = self.pipeline.scheduler
        defaults = dict(type(scheduler)().config)
        changed = {
            key: value
            for key, value in scheduler.config.items()
            if not key.startswith("_") and value != defaults.get(key)
        }
        grain = {} if self.pipeline.grain is None else {"grain": self.options.grain}
        scale, start, stop = self._find_guidance()
        guidance = {} if scale == 1 else {"guidance_scale": scale}
        if guidance and (start, stop) != (0, 1):
            guidance |= {"guidance_start": start, "guidance_stop": stop}
        size = {} if self.size is None else {"size": "{}x{}".format(*self.size)}
        classes = {"classes": list(self.options.classes)} if self.options.classes else {}
        return (classes | size | grain | guidance) | {
            "scheduler": type(scheduler).__name__,
            "scheduler_options": json.dumps(changed, sort_keys=True),
            "num_inference_steps": self.num_steps,
            "eta": self.options.eta,
        }

    def draw(self, numbers: list[int]) -> torch.Tensor:
        """Return images float32 [B, 1, H, W] in [-1, 1] on the model's device."""
        return self._draw(numbers)

    def draw_both(self, numbers: list[int]) -> torch.Tensor:
        """Return images like `draw`, and the same ones without grain: float32 [B, 2, H, W].

        For models with grain and images of a tile's size.
        """
        rngs = [make_image_rng(self.seed, number) for number in numbers]
        return self._decode(self._denoise(rngs, numbers), rngs, True, keep_bare=True)

    def draw_from(self, numbers: list[int], images, strength: float | None = None) -> torch.Tensor:
        """Return images like `draw` that start from images [B, 1, H, W] in [-1, 1]."""
        return self._draw(numbers, image=torch.as_tensor(images) / 2 + 0.5, strength=strength)

    def draw_references(self, num_images: int) -> torch.Tensor:
        """Return images of a tile's size without grain; they depend on the seed alone."""
        images = []
        for start in range(0, num_images, EXACT_BATCH):
            numbers = range(start, start + EXACT_BATCH)
            rngs = [make_image_rng(self.seed, -1 - number) for number in numbers]
            images.append(self._decode(self._denoise(rngs, numbers), rngs, add_grain=False))
        return torch.cat(images)[:num_images]

    def _draw(self, numbers, **from_image):
        if self.size is not None:
            return self._draw_whole(numbers, **from_image)
        rngs = [make_image_rng(self.seed, number) for number in numbers]
        return self._decode(self._denoise(rngs, numbers, **from_image), rngs, self.options.grain)

    def _draw_whole(self, numbers, **from_image):
        """Draw images larger than a tile, in smaller batches of windows when the memory is full."""
        while True:
            rngs = [make_image_rng(self.seed, number) for number in numbers]
            try:
                latents = self._denoise(rngs, numbers, size=self.size, **from_image)
                windows = min(self.window_batch_size, self.decode_batch_size)
                return self.pipeline.decode(latents, rngs, self.options.grain, windows)
            except (RuntimeError, MemoryError) as error:
                count = halve_batch(self.window_batch_size, error, "one window of an image")
                self.window_batch_size = count
                self.say(f"out of memory: going on with --batch-size {count}")

    def walk(self, frames_per_key: int) -> Iterator[torch.Tensor]:
        """Yield batches of frames of a closed walk through the noise of the first images.

        Noise that the sampler adds on the way is the same in all frames. Frames have no grain: it
        would flicker, or stand still in front of what moves. They are all of the first class.
        """
        shape = (1, *self.pipeline.latent_shape)
        rngs = [make_image_rng(self.seed, i) for i in range(WALK_KEYS)]
        keys = [torch.randn(shape, generator=rng) for rng in rngs]
        for noise in walk_noise(torch.cat(keys), frames_per_key).split(EXACT_BATCH):
            rngs = [make_image_rng(self.seed, 0) for _ in noise]
            latents = self._denoise(rngs, [0] * len(noise), noise)
            yield self._decode(latents, rngs, add_grain=False)

    def _denoise(self, rngs, numbers, noise=None, size=None, **from_image):
        """Return latents [B, C, h, w] in the autoencoder's scale, of the classes of `numbers`.

        from_image: `image` and `strength` of `denoise`.
        """

        def report(pipeline, step, timestep, tensors):
            if self.on_progress is not None:
                # Heun's methods call twice a step; fewer steps follow on an image
                num_steps = min(self.num_steps, pipeline.num_timesteps)
                self.on_progress(min(1.0, (step + 1) / num_steps))
            return tensors

        scale, start, stop = self._find_guidance()
        whole = {}
        if size is not None:
            whole = dict(zip(("height", "width"), size), window_batch_size=self.window_batch_size)
        return self.pipeline.denoise(
            len(rngs),
            rngs,
            self.num_steps,
            self.options.eta,
            noise,
            callback_on_step_end=report,
            guidance_scale=scale,
            guidance_start=start,
            guidance_stop=stop,
            class_labels=assign_classes(self.pipeline, self.options.classes, numbers),
            **whole,
            **from_image,
        )

    def _can_guide(self, pipeline):
        """Return whether there is a weaker prediction, see `EMLatentDiffusionPipeline.denoise`."""
        return pipeline.guide is not None or bool(self.options.classes)

    def _find_guidance(self) -> list[float]:
        """Return scale, start and stop of the guidance: the options', else the pipeline's.

        Images of no class are not guided if there is no guide.
        """
        names = ("guidance_scale", "guidance_start", "guidance_stop")
        values = ((getattr(self.options, name), self.pipeline.config[name]) for name in names)
        found = [saved if given is None else given for given, saved in values]
        return found if self._can_guide(self.pipeline) else [1.0, *found[1:]]

    def _decode(self, latents, rngs, add_grain: bool, keep_bare=False):
        """Decode in parts, and in smaller ones after an out-of-memory error.

        A part may be decoded twice, so its grain is drawn by copies of the generators.
        """
        images, start, is_smaller = [], 0, False
        while start < len(latents):
            rows = latents[start : start + self.decode_batch_size]
            count = len(rows)
            part = (rows, rngs[start : start + count], add_grain, keep_bare)
            try:
                images.append(self._decode_part(*part))
            except (RuntimeError, MemoryError) as error:
                self.decode_batch_size, is_smaller = halve_batch(count, error), True
                continue
            if is_smaller:
                is_smaller = False
                self.say(f"out of memory: going on with --decode-batch-size {count}")
            start += count
        return torch.cat(images)

    def _decode_part(self, rows, rngs, add_grain, keep_bare):
        count = len(rows)
        least = self.decode_batch_size if self.fixed_batch else EXACT_BATCH
        padding = max(0, min(self.decode_batch_size, least) - count)
        rngs = [rng.clone_state() for rng in [*rngs, *rngs[-1:] * padding]]
        if padding:
            rows = torch.cat([rows, rows[-1:].expand(padding, -1, -1, -1)])
        if not keep_bare:
            return self.pipeline.decode(rows, rngs, add_grain)[:count]
        grain = self.pipeline.grain
        drawn = grain.draw(len(rows), rngs, rows.device)
        bare = self.pipeline.decode(rows, rngs, False)
        return torch.cat([grain(bare, drawn=drawn).clamp(-1, 1), bare], dim=1)[:count]


def choose_decode_batch_size(pipeline, batch_size: int) -> int:
    """Return how many images make `DECODED_PIXELS`, at most `batch_size`.

    An unknown autoencoder is taken for one of factor 8.
    """
    _, height, width = pipeline.latent_shape
    config = pipeline.vqvae.config
    factor = config.get("patch_size") or 2 ** (len(config.get("block_out_channels", range(4))) - 1)
    return max(1, min(batch_size, DECODED_PIXELS // (height * width * factor**2)))


def find_size(pipeline, size: str | None) -> tuple[int, int] | None:
    """Return (height, width) that --size asks for, and None for that of a tile.

    Raises:
        ValueError: The model cannot draw that size.
    """
    if size is None:
        return None
    height, width = parse_size(size)
    try:
        latent_size = pipeline.find_latent_size(height, width)
    except ValueError as error:
        raise ValueError(f"--size is {size}: {error}") from error
    return None if latent_size == pipeline.latent_shape[1:] else (height, width)


def count_windows(pipeline, size: tuple[int, int]) -> int:
    """Return about how many windows an image of `size` has."""
    sides = zip(pipeline.find_latent_size(*size), pipeline.latent_shape[1:])
    return math.prod(len(place_windows(*each)) for each in sides)


@torch.no_grad()
def reconstruct(vqvae, images, grain=None, generator=None):
    """Send images [B, 1, H, W] in [-1, 1] through the autoencoder; float32 on the CPU.

    grain: added if given, drawn by `generator`.
    """
    decoded = decode(vqvae, encode(vqvae, images.to(vqvae.device))).float().clamp(-1, 1)
    return (decoded if grain is None else grain(decoded, generator).clamp(-1, 1)).cpu()
