"""Presets: each returns a whole configuration; any flag overrides it."""

from dataclasses import replace

from em_data import DataConfig
from em_stylegan.config import (
    DiscriminatorConfig,
    GANTrainingConfig,
    GeneratorConfig,
    StyleGANConfig,
)


def paper() -> StyleGANConfig:
    """The study's best GAN: StyleGAN2, mapping depth 4, 1024 feature maps, 256 x 256, 1200 kimg.

    Hardware: one GPU of 40 GB or more. Time: the study took 18 hours; ours is not measured. The
    study's FID is 58.96, on its own leaky split. This preset splits by micrograph.
    """
    return StyleGANConfig(out="runs/stylegan2-paper")


def small() -> StyleGANConfig:
    """A lighter StyleGAN2 for one common GPU: 256 x 256, 256 feature maps, 600 kimg.

    The tiles are those of the LDM's `small`.

    Hardware: one GPU of 12 GB. Time: about 12 hours, an estimate.
    """
    return StyleGANConfig(
        out="runs/stylegan2-small",
        tiles=DataConfig(resolution=256),
        generator=GeneratorConfig(z_dim=256, w_dim=256, channel_base=16384, max_channels=256),
        discriminator=DiscriminatorConfig(channel_base=16384, max_channels=256),
        training=GANTrainingConfig(
            num_images=600_000, r1_gamma=0.5, class_ramp_images=(100_000, 200_000)
        ),
    )


def stylegan3_t() -> StyleGANConfig:
    """StyleGAN3-T, equivariant to translation, 256 x 256, mapping depth 2.

    The paper's recipe: no style mixing and no path length regularisation.

    Hardware: one GPU of 40 GB or more. Time: not measured.
    """
    return StyleGANConfig(
        out="runs/stylegan3-t",
        tiles=DataConfig(resolution=256),
        generator=GeneratorConfig(
            architecture="stylegan3-t", mapping_depth=2, channel_base=32768, max_channels=512
        ),
        discriminator=DiscriminatorConfig(
            channel_base=32768, max_channels=512, clamp=256, num_reduced_resolutions=4
        ),
        training=GANTrainingConfig(
            discriminator_learning_rate=0.002,
            r1_gamma=1.0,
            path_length_every_steps=0,
            path_length_weight=0.0,
            style_mixing_probability=0.0,
        ),
    )


def stylegan3_r() -> StyleGANConfig:
    """StyleGAN3-R, also equivariant to rotation, 256 x 256: radial filters, 1 x 1 kernels.

    It has twice the feature maps. The discriminator sees blurred images for the first 200 kimg.

    Hardware: one GPU of 40 GB or more. Time: not measured.
    """
    config = stylegan3_t()
    return replace(
        config,
        out="runs/stylegan3-r",
        generator=replace(
            config.generator, architecture="stylegan3-r", channel_base=65536, max_channels=1024
        ),
        training=replace(config.training, blur_initial_sigma_px=10.0, blur_fade_images=200_000),
    )


def demo() -> StyleGANConfig:
    """The embedded micrographs at 64 x 64, for `make demo`.

    The networks work on 32 x 32 pixels of unit variance; grain is added.

    Hardware: one CPU core. Time: about 8 minutes in float32 on a core with AVX-512.
    """
    return StyleGANConfig(
        out="runs/demo/stylegan2",
        save_untrained=True,
        tiles=DataConfig(resolution=64, held_out_fraction=0.33),
        generator=GeneratorConfig(
            z_dim=64,
            w_dim=64,
            channel_base=1024,
            max_channels=128,
            image_mean=None,
            image_std=None,
            noise_strength=0.2,
            reduction=2,
        ),
        discriminator=DiscriminatorConfig(channel_base=1024, max_channels=128),
        training=GANTrainingConfig(
            num_images=56_000,
            batch_size=16,
            r1_gamma=0.1,
            path_length_weight=0.0,
            ema_half_life_images=3_000,
            class_ramp_images=(8_000, 20_000),
            log_every=640,
            sample_every=14_000,
            checkpoint_every=14_000,
        ),
    )


def test() -> StyleGANConfig:
    """A few steps of tiny networks at 32 x 32, to see that everything runs.

    Hardware: any. Time: seconds. The images mean nothing.
    """
    return StyleGANConfig(
        out="runs/test/stylegan2",
        save_untrained=True,
        tiles=DataConfig(resolution=32, downsample=4, num_synthetic=4, micrograph_size=256),
        generator=GeneratorConfig(
            z_dim=8, w_dim=8, mapping_depth=2, channel_base=128, max_channels=8
        ),
        discriminator=DiscriminatorConfig(channel_base=128, max_channels=8, group_size=2),
        training=GANTrainingConfig(
            num_images=64,
            batch_size=8,
            r1_every_steps=4,
            path_length_every_steps=2,
            class_ramp_images=(16, 32),
            num_sample_images=4,
            log_every=16,
            sample_every=32,
            checkpoint_every=32,
        ),
    )


PRESETS = {
    "paper": paper,
    "small": small,
    "stylegan3-t": stylegan3_t,
    "stylegan3-r": stylegan3_r,
    "demo": demo,
    "test": test,
}
