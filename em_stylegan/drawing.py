"""Draw images of a StyleGAN by their numbers: z -> w, styles mixed, then the image."""

from collections.abc import Callable, Iterator

import torch

from em_stylegan.pictures.styles import mix_styles
from em_training import make_image_rng
from em_training.classes import assign_classes
from em_training.family import EXACT_BATCH, WALK_KEYS, parse_size
from em_training.walk import walk

# fresh noise for each image, as in training, from that image's own random generator
NOISE_MODE = "random"
LAYER_GROUPS = ("coarse", "middle", "fine")


class StyleGANDrawer:
    """Draws images of an `EMStyleGANPipeline`; arguments as in `Family.start`.

    options: an `em_stylegan.family.StyleGANOptions`.
    Image i draws z, and then its noise, from a generator seeded by (seed, i). Of a generator of
    colour images, the mean of the channels is taken.
    """

    fixed_batch = False

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
        self.pipeline, self.options, self.seed = pipeline, options, seed
        self.canvas = find_canvas(pipeline, options.size)
        if self.canvas:
            self.images_at_once = 1
        self.say, self._has_said_grey = say, False
        assign_classes(pipeline, options.classes, [0])  # an unknown class is an error now

    def describe(self) -> dict:
        """Return the settings that decide the images."""
        options = self.options
        settings = {"truncation_psi": options.truncation_psi, "noise_mode": NOISE_MODE}
        if self.pipeline.num_classes:
            settings["classes"] = list(options.classes) or "drawn at random"
        if self.canvas:
            settings["size"] = "{}x{}".format(*self.canvas["size"])
        if options.mix_seed is not None:
            settings |= {"mix_seed": options.mix_seed, "mix_layers": options.mix_layers}
        return settings

    @torch.no_grad()
    def draw(self, numbers: list[int]) -> torch.Tensor:
        """Return images float32 [B, 1, H, W] in [-1, 1] on the model's device."""
        rngs = [make_image_rng(self.seed, number) for number in numbers]
        ws = self._map(rngs, numbers)
        if self.options.mix_seed is not None:
            other = self._map([make_image_rng(self.options.mix_seed, 0)], [0])
            layers = find_layers(ws.shape[1], self.options.mix_layers)
            ws = mix_styles(ws, other, layers)[:, 0]
        return self._synthesise(ws, NOISE_MODE, rngs)

    @torch.no_grad()
    def walk(self, frames_per_key: int) -> Iterator[torch.Tensor]:
        """Yield batches of frames of a closed walk through w of the first images."""
        numbers = range(WALK_KEYS)
        keys = self._map([make_image_rng(self.seed, i) for i in numbers], numbers)
        for ws in walk(keys, frames_per_key).split(EXACT_BATCH):
            yield self._synthesise(ws, "const", None)

    def _map(self, rngs, numbers):
        """Return w of every layer of the images `numbers`, float32 [B, num_ws, w_dim]."""
        return self.pipeline(
            len(rngs),
            rngs,
            self.options.truncation_psi,
            class_labels=assign_classes(self.pipeline, self.options.classes, numbers),
            output_type="latent",
        ).images

    def _synthesise(self, ws, noise_mode, rngs):
        generator = self.pipeline.generator
        ws = ws.to(generator.dtype)
        images = generator.synthesis(ws, noise_mode, rngs, **self.canvas).float()
        self.pipeline.check_finite(images)
        if images.shape[1] > 1 and not self._has_said_grey:
            self._has_said_grey = True
            self.say(f"the model makes {images.shape[1]}-channel images; their mean is used")
        return images.clamp(-1, 1).mean(dim=1, keepdim=True)


def find_canvas(pipeline, size: str | None) -> dict:
    """Return arguments of the generator's `synthesis` for --size; {} for that of a tile.

    Raises:
        ValueError: The model cannot draw that size.
    """
    try:
        return pipeline.find_canvas(*(parse_size(size) if size else ()))
    except ValueError as error:
        raise ValueError(f"--size is {size}: {error}") from error


def find_layers(num_ws: int, group: str) -> tuple[int, int]:
    """Return (first, end) of a third of `num_ws` layers; together the three are all layers."""
    i = LAYER_GROUPS.index(group)
    return round(num_ws * i / 3), round(num_ws * (i + 1) / 3)
