"""An autoencoder of taming-transformers or latent-diffusion -> a diffusers model that answers the same numbers."""

import re

import torch
from diffusers import AutoencoderKL, VQModel

from em_diffusion.em_taming_models import EMGumbelVQModel, EMTamingAutoencoderKL, EMTamingVQModel

CLASSES = {
    "VQ": (VQModel, EMTamingVQModel),
    "Gumbel VQ": (None, EMGumbelVQModel),
    "KL": (AutoencoderKL, EMTamingAutoencoderKL),
}
"""Kind -> the stock class, and the one that holds what the stock one cannot."""


def create_first_stage(config):
    """The model of a `FirstStage` with random weights: the stock class wherever it represents the original exactly.

    Stock: attention on any levels, other ones in encoder and decoder, none at all; any widths, depths and channels at the
    ends. Not stock: a classifier for the codes, a first level wider than the first convolution, resampling without
    convolutions, a tanh at the end, and for KL a `quant_conv` that changes the number of channels.
    """
    arguments = {
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D"
            for attends in config.encoder_attends
        ),
        "up_block_types": tuple(
            "AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D"
            for attends in reversed(config.decoder_attends)
        ),
        "block_out_channels": config.channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": 32,
        "sample_size": config.resolution,
        "mid_block_add_attention": config.has_attention,
        "scaling_factor": 1.0,
    }
    own = {}
    if config.channels[0] != config.ch:
        own["stem_channels"] = config.ch
    if not config.resamp_with_conv:
        own["resample_with_conv"] = False
    if config.tanh_out:
        own["tanh_output"] = True
    if config.kind == "KL":
        arguments |= {"latent_channels": config.embed_dim, "force_upcast": False}
        if config.z_channels != config.embed_dim:
            own["z_channels"] = config.z_channels
    else:
        arguments |= {
            "latent_channels": config.z_channels,
            "vq_embed_dim": config.embed_dim,
            "num_vq_embeddings": config.n_embed,
        }
    stock, component = CLASSES[config.kind]
    cls = component if own or stock is None else stock
    try:
        return cls(**arguments, **own)
    except ValueError as error:  # such as channels that 32 groups do not divide
        raise ValueError(
            f"the yaml describes an autoencoder that cannot be built: {error}."
        ) from error


def load_first_stage(weights, config, prefix="", use_ema=None):
    """The model of a `FirstStage` with the tensors of `OriginalWeights` whose names begin with `prefix`."""
    with torch.device("meta"):  # shapes alone: an absurd yaml takes no memory
        model = create_first_stage(config)
    num_levels = len(config.ch_mult)

    def find_source(name):
        return prefix + original_name(name, num_levels), None

    ema_name = None if prefix else lambda name: "model_ema." + name.replace(".", "")
    what = f"a {config.kind} autoencoder" + (" within a diffusion model" if prefix else "")
    return weights.load(
        model, find_source, what=what, ema_name=ema_name, use_ema=None if prefix else use_ema
    )


PLACES = [
    (r"\bdown_blocks\.", "down."),
    (r"\bmid_block\.resnets\.0\.", "mid.block_1."),
    (r"\bmid_block\.resnets\.1\.", "mid.block_2."),
    (r"\bmid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\bresnets\.", "block."),
    (r"\battentions\.", "attn."),
    (r"\b(down|up)samplers\.0\.", r"\1sample."),
    (r"\bconv_shortcut\.", "nin_shortcut."),
    (r"\bconv_norm_out\.", "norm_out."),
    (r"\bgroup_norm\.", "norm."),
    (r"\bto_([qkv])\.", r"\1."),
    (r"\bto_out\.0\.", "proj_out."),
]
"""Parts of names in diffusers, and what they are called in the originals."""


def original_name(name: str, num_levels: int) -> str:
    """What the original format calls a parameter of diffusers' autoencoders; there, both paths count levels from the finest."""
    name = re.sub(
        r"\bup_blocks\.(\d+)\.", lambda level: f"up.{num_levels - 1 - int(level[1])}.", name
    )
    for pattern, original in PLACES:
        name = re.sub(pattern, original, name)
    return name
