"""A third family of models, all in this file: noise, smoothed by the decoder of an autoencoder."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput

from em_training import make_image_rng
from em_training.family import WALK_KEYS, Card, Control, Family, check_options


class ToyPipeline(DiffusionPipeline):
    """Decodes normal noise."""

    def __init__(self, generator: AutoencoderKL, pixel_size_nm: float | None = None):
        super().__init__()
        self.register_modules(generator=generator)
        self.register_to_config(pixel_size_nm=pixel_size_nm)

    def draw_noise(self, rngs):
        return torch.cat([torch.randn(1, 2, 16, 16, generator=rng) for rng in rngs])

    @torch.no_grad()
    def decode(self, noise, contrast=1.0):
        """Images [B, 1, 32, 32] in [-1, 1]."""
        return (
            contrast * self.generator.decode(noise.to(self.device, self.generator.dtype)).sample
        ).tanh()

    def __call__(self, batch_size=1, generator=None, output_type="pil", return_dict=True):
        rngs = generator if isinstance(generator, list) else [generator] * batch_size
        images = self.decode(self.draw_noise(rngs)).float() / 2 + 0.5
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
            images = images if output_type == "np" else self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


@dataclass(frozen=True)
class ToyOptions:
    """Sampling options of toys."""

    contrast: float = 1.0
    """Contrast of the images."""

    def __post_init__(self):
        check_options(self, contrast=(0, 10))


class ToyDrawer:
    fixed_batch = False

    def __init__(self, pipeline, options, *, seed=0, batch_size=50, say=print, on_progress=None):
        self.pipeline, self.options, self.seed = pipeline, options, seed

    def describe(self):
        return {"contrast": self.options.contrast}

    def draw(self, numbers):
        rngs = [make_image_rng(self.seed, i) for i in numbers]
        noise = self.pipeline.draw_noise(rngs)
        return self.pipeline.decode(noise, self.options.contrast).float()

    def walk(self, frames_per_key):
        """Yield the keys, each as many times as there are frames: a toy does not wander."""
        yield self.draw(list(range(WALK_KEYS))).repeat_interleave(frames_per_key, dim=0)


def reconstruct(pipeline, images):
    with torch.no_grad():
        latents = pipeline.generator.encode(images.to(pipeline.device)).latent_dist.mode()
        return pipeline.generator.decode(latents).sample.clamp(-1, 1).cpu()


FAMILY = Family(
    name="toy",
    titles={"toy": "Toy"},
    pipeline="support.toy_family:ToyPipeline",
    options=ToyOptions,
    stages=("toy",),
    card=Card("stylegan.md.j2", "support", "toy", "toy", lambda pipeline: {"resolution": 32}),
    drawer="support.toy_family:ToyDrawer",
    read_kind=lambda folder: "toy",
    reconstructions=lambda pipeline, options, seed: {
        "autoencoder": lambda images: reconstruct(pipeline, images)
    },
    controls=lambda pipeline: (
        Control("contrast", "Contrast", "slider", 1.0, minimum=0, maximum=10, step=0.1),
    ),
    walk_help="A toy does not wander.",
)


def make_toy(seed=0):
    """A toy of 32 x 32 pixels."""
    torch.manual_seed(seed)
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = AutoencoderKL(
        1, 1, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4, **kinds
    )
    return ToyPipeline(vae.eval(), pixel_size_nm=0.5)
