"""The denoiser: construction, noise schedule and training objective."""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel


def create_denoiser(config, latent_size: int, latent_channels: int) -> UNet2DModel:
    """A stock `UNet2DModel` over latents [B, latent_channels, latent_size, latent_size]."""
    num_levels = len(config.channel_multipliers)
    attends = [level in config.attention_levels for level in range(num_levels)]
    return UNet2DModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends),
        up_block_types=tuple("AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
    )


def create_scheduler(config) -> DDIMScheduler:
    """The noise schedule, as the sampler that is saved with the model.

    diffusers' default `clip_sample=True` cuts the predicted latents to [-1, 1], right for pixels and wrong for latents of
    unit deviation. Steps are spaced "trailing", so that sampling starts at the noisiest step that was trained.
    """
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=config.prediction_type,
    )


def draw_timesteps(count: int, num_train_timesteps: int, generator, density: str = "uniform"):
    """`count` timesteps, int64 [count] in 0 .. num_train_timesteps - 1, spread evenly over their distribution.

    One uniform offset shifts a comb of `count` teeth over the quantiles: every timestep is drawn as often as `density`
    says, as by independent draws, but a batch covers the range, which lowers the variance of its loss. "uniform" draws
    each equally often; "logit_normal" draws sigmoid(u) of the range for a standard normal u.
    """
    offset = torch.rand((), generator=generator, device=generator.device)
    quantiles = (torch.arange(count, device=generator.device) + offset) / count  # [count] in [0, 1)
    if density == "logit_normal":
        quantiles = torch.special.ndtri(quantiles).sigmoid()
    return (quantiles * num_train_timesteps).long().clamp(0, num_train_timesteps - 1)


def compute_denoising_loss(unet, scheduler, latents, noise, timesteps):
    """||target - unet(x_t, t)||^2, mean over elements, for x_t = sqrt(abar_t) latents + sqrt(1 - abar_t) noise.

    With the scheduler's prediction_type "epsilon" the target is the noise, the simple objective of DDPM (Ho et al. 2020,
    arXiv:2006.11239, equation 14); with "v_prediction" it is sqrt(abar_t) noise - sqrt(1 - abar_t) latents. `latents` and
    `noise` [B, C, h, w] float32, latents normalised; `timesteps` int64 [B]. Returns the loss of each sample, float32 [B].
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    predicted = unet(noisy, timesteps).sample
    return F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))
