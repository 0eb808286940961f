"""The presets of the experiments. `demo` is as it was when the small-scale results were made."""

from dataclasses import replace

import em_diffusion
import em_stylegan


def make_ldm(name: str) -> em_diffusion.LDMConfig:
    """Return a preset of train_ldm.py; `demo` with a trained VQ autoencoder, f8, and Adam."""
    config = em_diffusion.PRESETS[name]()
    if name != "demo":
        return config
    autoencoder = replace(
        config.autoencoder,
        kind="vq",
        block_out_channels=(8, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        num_codes=2048,
        norm_num_groups=8,
        mid_attention=False,
        perceptual_weight=1.0,
        revive_after_images=512,
        num_images=9_600,
        batch_size=16,
        learning_rate=2e-3,
        warmup_images=320,
        log_every=320,
        validate_every=3_200,
        sample_every=4_800,
        checkpoint_every=3_200,
    )
    denoiser = replace(
        config.denoiser,
        base_channels=64,
        channel_multipliers=(1, 2),
        attention_levels=(0, 1),
        optimizer="adam",
        num_images=32_000,
        batch_size=32,
    )
    return replace(config, autoencoder=autoencoder, denoiser=denoiser, num_inference_steps=6)


def make_gan(name: str) -> em_stylegan.StyleGANConfig:
    """Return a preset of train_gan.py; `demo` without scaled or reduced images."""
    config = em_stylegan.PRESETS[name]()
    if name != "demo":
        return config
    return replace(
        config,
        generator=replace(
            config.generator,
            max_channels=64,
            image_mean=0.0,
            image_std=1.0,
            noise_strength=0.0,
            reduction=1,
        ),
        discriminator=replace(config.discriminator, max_channels=64),
        training=replace(config.training, num_images=12_000, ema_half_life_images=500),
    )
