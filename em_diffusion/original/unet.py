"""An unconditional U-Net of latent-diffusion, and its noise schedule -> a diffusers U-Net and scheduler that answer the same."""

import math
import re

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel

from em_diffusion.em_unet2d_model import EMUNet2DModel

RESIDUAL_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Layers of a residual block in diffusers, and in the original."""
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
STORED_SCHEDULE_TOLERANCE = 1e-5


def create_unet(config):
    """The U-Net of an `OriginalUNet` with random weights: the stock class for heads of a fixed width, else `EMUNet2DModel`."""
    attends = [
        2**level in config.attention_resolutions for level in range(len(config.channel_mult))
    ]
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if config.resblock_updown
        else ("DownBlock2D", "UpBlock2D")
    )
    arguments = {
        "sample_size": config.sample_size,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "down_block_types": tuple(
            "AttnDownBlock2D" if attention else plain[0] for attention in attends
        ),
        "up_block_types": tuple(
            "AttnUpBlock2D" if attention else plain[1] for attention in reversed(attends)
        ),
        "block_out_channels": tuple(
            config.model_channels * multiplier for multiplier in config.channel_mult
        ),
        "layers_per_block": config.num_res_blocks,
        "downsample_type": "resnet" if config.resblock_updown else "conv",
        "upsample_type": "resnet" if config.resblock_updown else "conv",
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,  # with scale_shift, diffusers would leave it out in the middle
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    _refuse_widths(config, attends)
    try:
        if config.num_heads is None and (config.conv_resample or config.resblock_updown):
            return UNet2DModel(**arguments, attention_head_dim=config.num_head_channels)
        return EMUNet2DModel(
            **arguments,
            attention_head_dim=config.num_head_channels,
            num_attention_heads=config.num_heads,
            resample_with_conv=config.conv_resample or config.resblock_updown,
        )
    except ValueError as error:
        raise ValueError(f"the yaml describes a U-Net that cannot be built: {error}.") from error


def _refuse_widths(config, attends):
    widths = [config.model_channels * multiplier for multiplier in config.channel_mult]
    attending = {width for width, attention in zip(widths, attends) if attention} | {widths[-1]}
    name = "num_heads" if config.num_head_channels is None else "num_head_channels"
    divisor = config.num_head_channels or config.num_heads
    if any(width % divisor for width in attending):
        raise ValueError(
            f"{name} is {divisor} in the yaml, which does not divide the channels {sorted(attending)} with attention."
        )
    if any(width % 32 for width in widths):
        raise ValueError(
            f"the channels {widths} of the yaml's U-Net are no multiples of 32, the groups of its normalisation."
        )


def load_unet(weights, config, use_ema=None):
    """The U-Net of an `OriginalUNet` with the tensors of `OriginalWeights`, averaged ones where there are any, unless told."""
    with torch.device("meta"):  # shapes alone: an absurd yaml takes no memory
        unet = create_unet(config)
    modules = dict(unet.named_modules())

    def find_source(name):
        original = original_name(name, config)
        part = re.search(r"\.to_([qkv])\.", name)
        transform = None
        if part is not None:
            heads = modules[name[: part.start()]].heads
            transform = _split_qkv(
                "qkv".index(part[1]), 1 if config.use_new_attention_order else heads
            )
        return "model.diffusion_model." + original, transform

    def ema_name(name):
        return "model_ema." + name.removeprefix("model.").replace(".", "")

    return weights.load(
        unet, find_source, what="a latent diffusion model", ema_name=ema_name, use_ema=use_ema
    )


def _split_qkv(index, num_groups):
    """Take queries (0), keys (1) or values (2) out of their common convolution [3 C, C, 1] or bias [3 C].

    The original has them side by side for each head (num_groups: heads), or in the newer order for all heads at once (1).
    """

    def take(tensor):
        rows = tensor.reshape(num_groups, 3, -1, *tensor.shape[1:])[
            :, index
        ]  # [groups, C / groups, ...]
        return rows.reshape(-1, *tensor.shape[1:])

    return take


def original_name(name: str, config) -> str:
    """What latent-diffusion calls a parameter of diffusers' U-Net.

    It counts all blocks of a path through: `num_res_blocks` and a downsampling a level on the way down, one more block, with
    the upsampling in it, on the way up.
    """
    name, _, kind = name.rpartition(".")
    if name in ENDS:
        return f"{ENDS[name]}.{kind}"
    path, *parts = name.split(".")
    if path == "mid_block":
        place = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}[tuple(parts[:2])]
        return f"middle_block.{place}.{_layer(parts[0], parts[2:])}.{kind}"
    level, what, index, *layer = parts
    level, index, blocks = int(level), int(index), config.num_res_blocks + 1
    if path == "down_blocks":
        block = (
            1
            + level * blocks
            + (index if what in ("resnets", "attentions") else config.num_res_blocks)
        )
        return f"input_blocks.{block}.{int(what == 'attentions')}.{_layer(what, layer)}.{kind}"
    block = level * blocks + (index if what in ("resnets", "attentions") else config.num_res_blocks)
    depth = len(config.channel_mult) - 1 - level
    after_attention = 1 + (2**depth in config.attention_resolutions)
    place = {"resnets": 0, "attentions": 1}.get(what, after_attention)
    return f"output_blocks.{block}.{place}.{_layer(what, layer)}.{kind}"


def _layer(what, layer):
    if what == "attentions":
        return {"group_norm": "norm", "to_out": "proj_out"}.get(layer[0], "qkv")
    if layer[0] == "conv":
        return "op" if what == "downsamplers" else "conv"
    return RESIDUAL_BLOCK[layer[0]]


def create_scheduler(schedule, stored_betas=None) -> DDIMScheduler:
    """The noise schedule of a `NoiseSchedule` as DDIM, with the original's spacing of steps.

    stored_betas: those of the checkpoint, float [timesteps], which the original uses in the place of the yaml's; None if it
        holds none.

    n of T steps are every T / n-th from 1 on, and the last one goes to the first timestep's noise, not to none.
    """
    betas = compute_betas(schedule)
    arguments = {"beta_start": schedule.linear_start, "beta_end": schedule.linear_end}
    names = {"linear": "scaled_linear", "sqrt_linear": "linear"}
    if stored_betas is not None:
        stored = stored_betas.double().numpy()
        if stored.shape != betas.shape or not ((stored > 0) & (stored < 1)).all():
            raise ValueError(
                f"the checkpoint's noise schedule has {stored.size} steps, the yaml's {betas.size}: it is the yaml of another "
                "model; name the right one with --config."
                if stored.shape != betas.shape
                else "the checkpoint's noise schedule holds numbers outside of (0, 1): the file is damaged."
            )
        if not np.allclose(stored, betas, rtol=STORED_SCHEDULE_TOLERANCE, atol=0):
            betas, names = stored, {}
    if schedule.beta_schedule in names:
        arguments["beta_schedule"] = names[schedule.beta_schedule]
    else:
        arguments = {"trained_betas": betas.tolist()}
    return DDIMScheduler(
        num_train_timesteps=schedule.timesteps,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=schedule.prediction_type,
        **arguments,
    )


def compute_betas(schedule):
    """The variances that each step of a `NoiseSchedule` adds, float64 [timesteps].

    "linear" is linear in the square root of beta (diffusers calls it "scaled_linear"), "sqrt_linear" in beta itself, "sqrt" in
    its square; "cosine" is Nichol and Dhariwal's (2021, arXiv:2102.09672, equation 17).
    """
    start, end, count = schedule.linear_start, schedule.linear_end, schedule.timesteps
    if schedule.beta_schedule == "linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    if schedule.beta_schedule == "cosine":
        steps = np.arange(count + 1) / count + schedule.cosine_s
        signal = np.cos(steps / (1 + schedule.cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - signal[1:] / signal[:-1], 0, 0.999)
    betas = np.linspace(start, end, count)
    return np.sqrt(betas) if schedule.beta_schedule == "sqrt" else betas


def read_stored_betas(weights) -> torch.Tensor | None:
    """The noise schedule that a checkpoint holds beside its weights."""
    return weights.read("betas") if "betas" in weights else None
