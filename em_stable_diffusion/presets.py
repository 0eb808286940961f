"""Presets: each returns a whole configuration; any flag overrides it."""

from em_data import DataConfig
from em_stable_diffusion.config import (
    FLUX2_KLEIN,
    AdapterConfig,
    LoRAConfig,
    LoRATrainingConfig,
)


def small() -> LoRAConfig:
    """Stable Diffusion 1.5 at 512 x 512: rank 16, 40,000 images.

    Hardware: one GPU of 12 GB. Time: not measured.
    """
    return LoRAConfig(out="runs/lora-small")


def klein() -> LoRAConfig:
    """FLUX.2 [klein] base 4B, an MMDiT under Apache-2.0, at 512 x 512: rank 16, 20,000 images.

    Hardware: one GPU of 24 GB. Time: not measured.
    """
    return LoRAConfig(
        base=FLUX2_KLEIN,
        out="runs/lora-klein",
        training=LoRATrainingConfig(num_images=20_000, warmup_images=400),
    )


def demo() -> LoRAConfig:
    """Stable Diffusion 1.5 on the embedded micrographs at 256 x 256: rank 8, 4,000 images.

    Hardware: one GPU of 8 GB. Time: not measured.
    """
    return LoRAConfig(
        out="runs/demo/lora",
        tiles=DataConfig(resolution=256, symmetries="d4", held_out_fraction=0.33),
        lora=AdapterConfig(rank=8),
        training=LoRATrainingConfig(
            num_images=4_000,
            learning_rate=3e-4,
            warmup_images=100,
            ema_half_life_images=400,
            num_validation_images=32,
            validate_every=500,
            sample_every=1_000,
            checkpoint_every=500,
        ),
    )


def test() -> LoRAConfig:
    """A few steps at 32 x 32, to see that everything runs; --base names a tiny model.

    Hardware: any. Time: seconds with a tiny base. The images mean nothing.
    """
    return LoRAConfig(
        out="runs/test/lora",
        num_inference_steps=4,
        tiles=DataConfig(
            resolution=32, downsample=4, symmetries="d4", num_synthetic=4, micrograph_size=256
        ),
        lora=AdapterConfig(rank=4),
        training=LoRATrainingConfig(
            num_images=64,
            batch_size=4,
            learning_rate=1e-3,
            warmup_images=16,
            ema_half_life_images=16,
            num_validation_images=8,
            num_sample_images=4,
            num_sample_steps=4,
            log_every=16,
            validate_every=32,
            sample_every=32,
            checkpoint_every=32,
        ),
    )


PRESETS = {"small": small, "klein": klein, "demo": demo, "test": test}
