"""The denoiser and its noise schedule."""

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from em_diffusion.em_unet2d_model import EMUNet2DModel
from em_training.em_saved_pipeline import align_weights


def create_denoiser(
    config, latent_size: int, latent_channels: int, num_classes: int = 0
) -> UNet2DModel:
    """Create a U-Net over latents [B, latent_channels, latent_size, latent_size].

    It is a stock `UNet2DModel`, or with `config.num_attention_heads` an `EMUNet2DModel`. With
    classes, it has one more embedding than classes: the last one is that of no class.
    """
    cls, heads = UNet2DModel, {"attention_head_dim": config.attention_head_dim}
    if config.num_attention_heads:
        cls, heads = EMUNet2DModel, {"num_attention_heads": config.num_attention_heads}
    levels = range(len(config.channel_multipliers))
    prefixes = ["Attn" if level in config.attention_levels else "" for level in levels]
    return cls(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple(f"{prefix}DownBlock2D" for prefix in prefixes),
        up_block_types=tuple(f"{prefix}UpBlock2D" for prefix in reversed(prefixes)),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        num_class_embeds=num_classes + 1 if num_classes else None,
        **heads,
    )


def load_denoiser(folder) -> UNet2DModel:
    """Load the U-Net saved in `folder` as the class that it was saved from."""
    classes = {cls.__name__: cls for cls in (UNet2DModel, EMUNet2DModel)}
    name = UNet2DModel.load_config(folder)["_class_name"]
    if name not in classes:
        raise ValueError(f"{folder} holds a {name}, but a denoiser is a {' or '.join(classes)}.")
    return align_weights(classes[name].from_pretrained(folder))


def create_scheduler(config) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """Create the noise schedule, as the sampler that is saved with the model.

    diffusers' default `clip_sample=True` clips the predicted latents to [-1, 1]. That suits
    pixels, but not latents of unit deviation. "trailing" spacing starts sampling at the noisiest
    timestep that was trained.
    """
    if config.prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps)
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.zero_terminal_snr,
    )
