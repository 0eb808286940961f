"""The denoiser: construction, noise schedule and training objective."""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from em_diffusion.em_unet2d_model import EMUNet2DModel
from em_diffusion.pipeline_em_ldm import align_weights


def create_denoiser(config, latent_size: int, latent_channels: int) -> UNet2DModel:
    """A U-Net over latents [B, latent_channels, latent_size, latent_size]: the stock `UNet2DModel`, or with
    `config.num_attention_heads` an `EMUNet2DModel`."""
    heads = {"attention_head_dim": config.attention_head_dim}
    if config.num_attention_heads:
        heads = {"num_attention_heads": config.num_attention_heads}
    num_levels = len(config.channel_multipliers)
    attends = [level in config.attention_levels for level in range(num_levels)]
    return (EMUNet2DModel if config.num_attention_heads else UNet2DModel)(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple(
            "AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends
        ),
        up_block_types=tuple(
            "AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)
        ),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        **heads,
    )


def load_denoiser(folder) -> UNet2DModel:
    """The U-Net saved in `folder`, of the class that it was saved from."""
    classes = {cls.__name__: cls for cls in (UNet2DModel, EMUNet2DModel)}
    name = UNet2DModel.load_config(folder)["_class_name"]
    if name not in classes:
        raise ValueError(f"{folder} holds a {name}; a denoiser is one of {', '.join(classes)}.")
    return align_weights(classes[name].from_pretrained(folder))


def create_scheduler(config) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """The noise schedule, as the sampler that is saved with the model.

    diffusers' default `clip_sample=True` cuts the predicted latents to [-1, 1], right for pixels and wrong for latents of
    unit deviation. Steps are spaced "trailing", so that sampling starts at the noisiest step that was trained.
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


def draw_timesteps(
    count: int,
    num_train_timesteps: int,
    generator,
    density: str = "uniform",
    continuous: bool = False,
):
    """`count` timesteps, int64 [count] in 0 .. num_train_timesteps - 1, spread evenly over their distribution.

    One uniform offset shifts a comb of `count` teeth over the quantiles: every timestep is drawn as often as `density`
    says, as by independent draws, but a batch covers the range, which lowers the variance of its loss. "uniform" draws
    each equally often; "logit_normal" draws sigmoid(u) of the range for a standard normal u. `continuous` gives float32
    anywhere in 0 .. num_train_timesteps, as flow matching wants them.
    """
    offset = torch.rand((), generator=generator, device=generator.device)
    quantiles = (torch.arange(count, device=generator.device) + offset) / count  # [count] in [0, 1)
    if density == "logit_normal":
        quantiles = torch.special.ndtri(quantiles).sigmoid()
    timesteps = quantiles * num_train_timesteps
    return timesteps if continuous else timesteps.long().clamp(0, num_train_timesteps - 1)


def compute_denoising_loss(unet, scheduler, latents, noise, timesteps):
    """||target - unet(x_t, t)||^2, mean over elements, of each sample: float32 [B].

    The scheduler decides. A `DDIMScheduler` with x_t = sqrt(abar_t) latents + sqrt(1 - abar_t) noise asks for the noise
    with prediction_type "epsilon", the simple objective of DDPM (Ho et al. 2020, arXiv:2006.11239, equation 14), and for
    sqrt(abar_t) noise - sqrt(1 - abar_t) latents with "v_prediction". A `FlowMatchEulerDiscreteScheduler` with
    x_t = (1 - s) latents + s noise, s = t / num_train_timesteps, asks for dx/ds = noise - latents (Lipman et al. 2023,
    arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206). `latents` and `noise` [B, C, h, w] float32, latents
    normalised; `timesteps` [B], int64, or float32 for flow.
    """
    if is_flow(scheduler):
        s = (timesteps / scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
        noisy, target = (1 - s) * latents + s * noise, noise - latents
    else:
        noisy = scheduler.add_noise(latents, noise, timesteps)
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    predicted = unet(noisy, timesteps).sample
    return F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))


def is_flow(scheduler) -> bool:
    """Say whether the model answers the velocity of a straight path from latents to noise."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def compute_min_snr_weights(scheduler, timesteps, gamma: float):
    """Weights of the loss at `timesteps`, float32 [B], that count the error of the latents min(SNR, gamma) times (Hang et al. 2023,
    arXiv:2303.09556, section 3.4), with SNR = abar / (1 - abar).

    An error of the noise is one of the latents divided by SNR^(1/2), one of the velocity divided by (SNR + 1)^(1/2), whence
    min(SNR, gamma) / SNR for "epsilon" and min(SNR, gamma) / (SNR + 1) for "v_prediction".
    """
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)
    abar = scheduler.alphas_cumprod[timesteps]
    snr = abar / (1 - abar)
    clipped = snr.clamp(max=gamma)
    return (
        clipped / (snr + 1) if scheduler.config.prediction_type == "v_prediction" else clipped / snr
    )
