"""Load an unconditional U-Net of latent-diffusion as a diffusers U-Net with the same answers."""

import re

import torch
from diffusers import UNet2DModel

from em_diffusion.em_unet2d_model import EMUNet2DModel
from em_diffusion.original.config import class_name, count, counts, flag, optional_count, section

CONDITIONS = {
    "use_spatial_transformer": "spatial transformers",
    "context_dim": "cross attention",
    "num_classes": "class conditioning",
    "n_embed": "prediction of codebook indices",
}
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


def read_unet(params):
    """Return (class, constructor's arguments, whether heads have the newer order) of a U-Net.

    The stock class represents heads of a fixed width, `EMUNet2DModel` also a fixed number of heads
    and resampling without convolutions.
    """
    model = section(params, "unet_config")
    if class_name(model) != "UNetModel":
        raise ValueError(
            f"its U-Net is a {model['target']}; only latent-diffusion's UNetModel is supported"
        )
    unet = section(model, "params")
    heads, head_width = _read_heads(unet)
    multipliers = counts(unet, "channel_mult", (1, 2, 4, 8))
    if multipliers[0] != 1:
        raise ValueError(
            f"channel_mult begins with {multipliers[0]}, which the original U-Net itself cannot run"
        )
    blocks = unet.get("num_res_blocks")
    if isinstance(blocks, list) and len(set(blocks)) == 1:
        unet = unet | {"num_res_blocks": blocks[0]}
    size = params.get("image_size", unet.get("image_size"))
    factors = counts(unet, "attention_resolutions")  # of downsampling
    attends = [2**level in factors for level in range(len(multipliers))]
    has_resnets = flag(unet, "resblock_updown", False)
    plain = ("DownBlock2D", "UpBlock2D")
    if has_resnets:
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    both = flag(unet, "use_scale_shift_norm", False)
    arguments = {
        "sample_size": tuple(size)
        if isinstance(size, list)
        else count({"image_size": size}, "image_size"),
        "in_channels": count(unet, "in_channels"),
        "out_channels": count(unet, "out_channels"),
        "down_block_types": tuple("AttnDownBlock2D" if a else plain[0] for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else plain[1] for a in reversed(attends)),
        "block_out_channels": tuple(count(unet, "model_channels") * m for m in multipliers),
        "layers_per_block": count(unet, "num_res_blocks", 64),
        "downsample_type": "resnet" if has_resnets else "conv",
        "upsample_type": "resnet" if has_resnets else "conv",
        "resnet_time_scale_shift": "scale_shift" if both else "default",
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,  # with scale_shift, diffusers omits it in the middle
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "attention_head_dim": head_width,
    }
    _refuse_widths(arguments["block_out_channels"], attends, heads, head_width)
    has_convolutions = flag(unet, "conv_resample", True) or has_resnets
    own = {"num_attention_heads": heads, "resample_with_conv": has_convolutions}
    is_stock = heads is None and has_convolutions
    cls = UNet2DModel if is_stock else EMUNet2DModel
    newer_order = flag(unet, "use_new_attention_order", False)
    return cls, arguments if is_stock else arguments | own, newer_order


def _read_heads(unet):
    """Return the number of heads or their width, the other as None; refuse a conditional U-Net."""
    for key, what in CONDITIONS.items():
        if unet.get(key) not in (None, False):
            raise ValueError(
                f"its U-Net has {what} ({key}: {unet[key]}), which an unconditional U-Net cannot "
                "represent"
            )
    channels = count(unet, "in_channels")
    if count(unet, "out_channels") != channels:
        raise ValueError(
            f"its U-Net takes {channels} channels and gives {unet['out_channels']}: it is "
            "conditional, which is not supported"
        )
    if unet.get("dims", 2) != 2:
        raise ValueError(f"its U-Net has dims: {unet['dims']}; only images (2) are supported")
    heads, width = (optional_count(unet, key) for key in ("num_heads", "num_head_channels"))
    if heads is None and width is None:
        raise ValueError("its U-Net has neither num_heads nor num_head_channels")
    upsample = optional_count(unet, "num_heads_upsample")
    if width is None and flag(unet, "legacy", True) and upsample not in (None, heads):
        raise ValueError(
            f"its U-Net has other heads on the way up (num_heads_upsample: {upsample}), which is "
            "not supported"
        )
    return (heads, None) if width is None else (None, width)


def _refuse_widths(widths, attends, heads, head_width):
    attending = {width for width, attention in zip(widths, attends) if attention} | {widths[-1]}
    name, divisor = ("num_heads", heads) if heads else ("num_head_channels", head_width)
    if any(width % divisor for width in attending):
        raise ValueError(
            f"{name} is {divisor} in the yaml, which does not divide the channels "
            f"{sorted(attending)} with attention"
        )
    if any(width % 32 for width in widths):
        raise ValueError(
            f"the channels {list(widths)} of its U-Net are no multiples of 32, the groups of its "
            "normalisation"
        )


def load_unet(weights, description, use_ema=None):
    """Load the U-Net of `read_unet`; `use_ema` as in `load_official`."""
    cls, arguments, newer_order = description
    try:
        with torch.device("meta"):  # shapes only: an absurd yaml takes no memory
            unet = cls(**arguments)
    except ValueError as error:
        raise ValueError(f"the yaml describes a U-Net that cannot be built: {error}.") from error
    modules = dict(unet.named_modules())

    def find_source(name):
        part, transform = re.search(r"\.to_([qkv])\.", name), None
        if part is not None:
            heads = modules[name[: part.start()]].heads
            transform = _split_qkv("qkv".index(part[1]), 1 if newer_order else heads)
        return "model.diffusion_model." + original_name(name, arguments), transform

    def ema_name(name):
        return "model_ema." + name.removeprefix("model.").replace(".", "")

    return weights.load(
        unet, find_source, what="a latent diffusion model", ema_name=ema_name, use_ema=use_ema
    )


def _split_qkv(index, num_groups):
    """Return a function that cuts queries (0), keys (1) or values (2) out of their convolution.

    Its weight is [3 C, C, 1], its bias [3 C]. The original has the three side by side for each head
    (`num_groups` = heads), or in the newer order for all heads at once (1).
    """

    def take(tensor):
        groups = tensor.reshape(num_groups, 3, -1, *tensor.shape[1:])
        return groups[:, index].reshape(-1, *tensor.shape[1:])

    return take


def original_name(name: str, arguments) -> str:
    """Return what latent-diffusion calls a parameter of a diffusers U-Net with these arguments.

    It numbers all blocks of a path consecutively: `layers_per_block` and a downsampling in each
    level on the way down; one block more, which includes the upsampling, on the way up.
    """
    name, _, kind = name.rpartition(".")
    if name in ENDS:
        return f"{ENDS[name]}.{kind}"
    path, *parts = name.split(".")
    if path == "mid_block":
        place = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}[
            parts[0], parts[1]
        ]
        return f"middle_block.{place}.{_layer(parts[0], parts[2:])}.{kind}"
    level, what, index, *layer = parts
    num_blocks = arguments["layers_per_block"]
    is_block = what in ("resnets", "attentions")
    block = int(level) * (num_blocks + 1) + (int(index) if is_block else num_blocks)
    if path == "down_blocks":
        return f"input_blocks.{1 + block}.{int(what == 'attentions')}.{_layer(what, layer)}.{kind}"
    has_attention = arguments["up_block_types"][int(level)] == "AttnUpBlock2D"
    place = {"resnets": 0, "attentions": 1}.get(what, 1 + has_attention)
    return f"output_blocks.{block}.{place}.{_layer(what, layer)}.{kind}"


def _layer(what, layer):
    if what == "attentions":
        return {"group_norm": "norm", "to_out": "proj_out"}.get(layer[0], "qkv")
    if layer[0] == "conv":
        return "op" if what == "downsamplers" else "conv"
    return RESIDUAL_BLOCK[layer[0]]
