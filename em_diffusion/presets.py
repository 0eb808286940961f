"""Named configurations of a latent diffusion run; flags override single fields."""

from em_data import DataConfig
from em_diffusion.config import AutoencoderConfig, DenoiserConfig, LDMConfig


def paper() -> LDMConfig:
    """The study's sizes: 256 x 256 tiles, f8 autoencoder, 32 x 32 x 4 latents, U-Net of width 256.

    The autoencoder has 8192 codes of 4 channels. The study used a pretrained one; this preset
    trains one on the micrographs. Where the study's text is open, the preset chooses: the
    multipliers 1, 2, 2, 4, 4 give five levels; all levels but the finest have attention, and so has
    the middle; 8 heads are counted at 512 channels (heads are 64 wide, so 1024 channels have 16).
    This gives 475 million parameters. The denoiser sees five epochs of its 56,160 views, after
    which the study calls it converged. Images get no grain.

    Hardware: one GPU of 40 GB or more. Time: about 6 hours for the autoencoder and 1 for the
    denoiser on one H100, estimated from the number of operations. The study's FID is 36.1.
    """
    return LDMConfig(
        out="runs/ldm-paper",
        grain_images=0,
        tiles=DataConfig(resolution=256, symmetries="paper"),
        autoencoder=AutoencoderConfig(
            block_out_channels=(128, 256, 256, 512),
            num_codes=8192,
            num_images=1_000_000,
            batch_size=32,
            learning_rate=2e-4,
            discriminator_weight=0.75,
            discriminator_start_images=250_000,
            ema_half_life_images=10_000,
        ),
        denoiser=DenoiserConfig(
            base_channels=256,
            channel_multipliers=(1, 2, 2, 4, 4),
            attention_levels=(1, 2, 3, 4),
            attention_head_dim=64,
            num_images=5 * 56_160,
            guide_images=35_000,
            batch_size=64,
            learning_rate=1e-4,
            warmup_images=10_000,
            ema_half_life_images=20_000,
            validate_every=10_000,
            sample_every=28_080,
            checkpoint_every=28_080,
        ),
    )


def small() -> LDMConfig:
    """256 x 256 tiles for one consumer GPU: narrow f8 autoencoder, four-level U-Net of width 128.

    Hardware: one GPU of 12 GB. Time: about 8 hours for the autoencoder and 6 for the denoiser on a
    card like an RTX 3060, estimated from the number of operations.
    """
    return LDMConfig(
        out="runs/ldm-small",
        tiles=DataConfig(resolution=256, symmetries="paper"),
        autoencoder=AutoencoderConfig(
            block_out_channels=(64, 128, 128, 256),
            layers_per_block=1,
            num_images=500_000,
            batch_size=16,
            discriminator_weight=0.75,
            discriminator_start_images=125_000,
            ema_half_life_images=10_000,
        ),
        denoiser=DenoiserConfig(
            base_channels=128,
            channel_multipliers=(1, 2, 3, 4),
            attention_levels=(2, 3),
            num_images=2_000_000,
            guide_images=250_000,
            learning_rate=2e-4,
            warmup_images=20_000,
            ema_half_life_images=50_000,
        ),
    )


def base() -> LDMConfig:
    """256 x 256 tiles for a GPU of 24 GB: autoencoder of `paper`, four-level U-Net of width 192.

    The U-Net has 201 million parameters. It predicts velocity and trains the middle timesteps more
    often. The run keeps the weights that come nearest to held-out tiles, stores what `python -m
    em_diffusion.posthoc_ema` needs, and can be lengthened at any time.

    Hardware: one GPU of 24 GB. Time: not measured.
    """
    return LDMConfig(
        out="runs/ldm-base",
        tiles=DataConfig(resolution=256, symmetries="paper"),
        autoencoder=paper().autoencoder,
        denoiser=DenoiserConfig(
            base_channels=192,
            channel_multipliers=(1, 2, 3, 4),
            attention_levels=(1, 2, 3),
            prediction_type="v_prediction",
            timestep_density="logit_normal",
            num_images=3_000_000,
            guide_images=375_000,
            warmup_images=20_000,
            learning_rate_decay="inverse_sqrt",
            ema_half_life_images=50_000,
            posthoc_ema_every=187_500,
            evaluate_every=250_000,
        ),
    )


def demo() -> LDMConfig:
    """The embedded micrographs at 64 x 64 with 16 x 16 x 4 latents: a whole run in minutes.

    A third of the micrographs is held out, so that there are enough real images to compare 1,000
    images with. The linear autoencoder is fitted in seconds and leaves the time to the denoiser,
    which predicts velocity and trains the middle timesteps more often: with the study's noise
    prediction, minutes on a CPU are too short to learn dislocation loops.

    Hardware: one or two CPU cores. Time: minutes; docs/results.md has times and distances.
    """
    return LDMConfig(
        out="runs/demo/ldm",
        tiles=DataConfig(resolution=64, symmetries="paper", held_out_fraction=0.33),
        autoencoder=AutoencoderConfig(
            kind="basis",
            patch_size=4,
            latent_channels=4,
            num_images=4_000,
            batch_size=32,
            num_validation_images=64,
        ),
        denoiser=DenoiserConfig(
            base_channels=32,
            channel_multipliers=(1, 2, 4),
            layers_per_block=1,
            attention_levels=(1, 2),
            attention_head_dim=32,
            norm_num_groups=16,
            prediction_type="v_prediction",
            timestep_density="logit_normal",
            optimizer="muon",
            num_images=64_000,
            guide_images=8_000,
            batch_size=64,
            learning_rate=2e-3,
            warmup_images=1_600,
            ema_half_life_images=2_000,
            num_validation_images=128,
            num_sample_images=32,
            log_every=1_024,
            validate_every=4_000,
            sample_every=8_000,
            checkpoint_every=8_000,
        ),
    )


def test() -> LDMConfig:
    """The smallest whole run, to test that everything works; its images mean nothing.

    Hardware: one CPU core. Time: seconds.
    """
    return LDMConfig(
        out="runs/test/ldm",
        num_inference_steps=5,
        tiles=DataConfig(resolution=32, downsample=4, num_synthetic=4, micrograph_size=256),
        autoencoder=AutoencoderConfig(
            block_out_channels=(16, 32),
            layers_per_block=1,
            num_codes=64,
            norm_num_groups=8,
            mid_attention=False,
            perceptual_layers=1,
            revive_after_images=32,
            num_images=64,
            batch_size=8,
            learning_rate=1e-3,
            warmup_images=16,
            num_validation_images=8,
            log_every=16,
            validate_every=32,
            sample_every=32,
            checkpoint_every=32,
        ),
        denoiser=DenoiserConfig(
            base_channels=16,
            channel_multipliers=(1, 2),
            layers_per_block=1,
            attention_levels=(1,),
            attention_head_dim=8,
            norm_num_groups=8,
            num_images=64,
            guide_images=16,
            batch_size=8,
            learning_rate=1e-3,
            warmup_images=16,
            ema_half_life_images=32,
            num_validation_images=8,
            num_sample_images=4,
            num_sample_steps=4,
            log_every=16,
            validate_every=32,
            sample_every=32,
            checkpoint_every=32,
        ),
    )


PRESETS = {"paper": paper, "base": base, "small": small, "demo": demo, "test": test}
