"""Presets: each returns a whole configuration; any flag overrides it."""

from em_cyclegan.config import (
    CycleGANConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    TranslationTrainingConfig,
)
from em_data import DataConfig


def paper() -> CycleGANConfig:
    """CycleGAN as in the paper, with a discriminator of spectra: 256 x 256, 9 blocks, 400 kimg.

    The learning rate falls over the second half. The paper counts 200 epochs instead.

    Hardware: one GPU of 16 GB or more. Time: not measured.
    """
    return CycleGANConfig(out="runs/cyclegan-paper")


def small() -> CycleGANConfig:
    """A lighter CycleGAN for one common GPU: 256 x 256, 32 feature maps, 9 blocks, 200 kimg.

    The generators compute what is added to an image.

    Hardware: one GPU of 8 GB. Time: not measured.
    """
    return CycleGANConfig(
        out="runs/cyclegan-small",
        generator=GeneratorConfig(base_channels=32, adds_input=True),
        discriminator=DiscriminatorConfig(base_channels=32),
        training=TranslationTrainingConfig(
            num_images=200_000, batch_size=4, evaluate_every=20_000, ema_half_life_images=5_000
        ),
    )


def demo() -> CycleGANConfig:
    """The embedded micrographs, translated to those of another microscope, at 64 x 64.

    The generators compute what is added to an image.

    Hardware: one CPU core. Time: 8 minutes of processor time. Distances are in
    experiments/families/README.md.
    """
    return CycleGANConfig(
        out="runs/demo/cyclegan",
        tiles=DataConfig(resolution=64, symmetries="d4", held_out_fraction=0.33),
        generator=GeneratorConfig(base_channels=12, num_blocks=3, adds_input=True),
        discriminator=DiscriminatorConfig(base_channels=16, num_layers=2),
        training=TranslationTrainingConfig(
            num_images=12_000,
            batch_size=4,
            learning_rate=5e-4,
            ema_half_life_images=1_000,
            evaluate_every=2_000,
            num_evaluation_images=400,
            log_every=200,
            sample_every=4_000,
            checkpoint_every=4_000,
        ),
    )


def test() -> CycleGANConfig:
    """A few steps of tiny networks at 32 x 32, to see that everything runs.

    Hardware: any. Time: seconds. The images mean nothing.
    """
    return CycleGANConfig(
        out="runs/test/cyclegan",
        data="synthetic-varied",
        tiles=DataConfig(
            resolution=32, downsample=4, symmetries="d4", num_synthetic=4, micrograph_size=256
        ),
        generator=GeneratorConfig(base_channels=4, num_blocks=2),
        discriminator=DiscriminatorConfig(base_channels=4, num_layers=2),
        training=TranslationTrainingConfig(
            num_images=64,
            batch_size=4,
            pool_size=6,
            num_patches=16,
            num_sample_images=4,
            log_every=16,
            sample_every=32,
            checkpoint_every=32,
        ),
    )


PRESETS = {"paper": paper, "small": small, "demo": demo, "test": test}
