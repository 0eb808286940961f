"""Load an autoencoder of taming-transformers or latent-diffusion as a diffusers model."""

import re

import torch
from diffusers import AutoencoderKL, VQModel

from em_diffusion.em_taming_models import EMGumbelVQModel, EMTamingAutoencoderKL, EMTamingVQModel
from em_diffusion.original.config import class_name, count, counts, flag, section

KINDS = {
    "VQModel": "VQ",
    "VQModelInterface": "VQ",
    "VQNoDiscModel": "VQ",
    "VQSegmentationModel": "VQ",
    "EMAVQ": "VQ",
    "GumbelVQ": "Gumbel VQ",
    "AutoencoderKL": "KL",
}
"""Class in a yaml -> kind."""
CLASSES = {
    "VQ": (VQModel, EMTamingVQModel),
    "Gumbel VQ": (None, EMGumbelVQModel),
    "KL": (AutoencoderKL, EMTamingAutoencoderKL),
}
"""Kind -> the stock class, and our class for what the stock class cannot represent."""
STOCK = {
    "stem_channels": None,
    "resample_with_conv": True,
    "tanh_output": False,
    "z_channels": None,
}
"""What only our class can change."""


def read_autoencoder(model):
    """Return (kind, class, constructor's arguments) of the autoencoder in a section of a yaml.

    The stock class represents attention on any levels, different in encoder and decoder; any widths
    and depths; and any channels at the ends. Ours adds a classifier for the codes, a first level
    wider than the first convolution, resampling without convolutions, a tanh at the end, and for KL
    a `quant_conv` that changes the number of channels.
    """
    name = class_name(model)
    if name not in KINDS:
        raise ValueError(
            f"its autoencoder is a {model['target']}, and only these are known: {', '.join(KINDS)}"
        )
    kind, params = KINDS[name], section(model, "params")
    network = section(params, "ddconfig")
    double_z = flag(network, "double_z", True)
    if double_z != (kind == "KL"):
        raise ValueError(f"double_z is {double_z}, which a {name} cannot have")
    multipliers, stem = counts(network, "ch_mult", (1, 2, 4, 8)), count(network, "ch")
    encoder_attends, decoder_attends = _find_attention(network, len(multipliers))
    embed_dim, z_channels = count(params, "embed_dim"), count(network, "z_channels")
    arguments = {
        "in_channels": count(network, "in_channels"),
        "out_channels": count(network, "out_ch"),
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D"
            for attends in encoder_attends
        ),
        "up_block_types": tuple(
            "AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in decoder_attends
        ),
        "block_out_channels": tuple(stem * multiplier for multiplier in multipliers),
        "layers_per_block": count(network, "num_res_blocks", 64),
        "norm_num_groups": 32,
        "sample_size": count(network, "resolution"),
        "mid_block_add_attention": network.get("attn_type") != "none",
        "scaling_factor": 1.0,
    }
    own = {
        "stem_channels": None if multipliers[0] == 1 else stem,
        "resample_with_conv": flag(network, "resamp_with_conv", True),
        "tanh_output": flag(network, "tanh_out", False),
    }
    if kind == "KL":
        arguments |= {"latent_channels": embed_dim, "force_upcast": False}
        own["z_channels"] = None if z_channels == embed_dim else z_channels
    else:
        arguments |= {"latent_channels": z_channels, "vq_embed_dim": embed_dim}
        arguments["num_vq_embeddings"] = count(params, "n_embed")
    own = {name: value for name, value in own.items() if value != STOCK[name]}
    stock, component = CLASSES[kind]
    return kind, component if own or stock is None else stock, arguments | own


def _find_attention(network, num_levels):
    """Return whether each block of the encoder and of the decoder has attention, in their order.

    `attn_resolutions` counts from `resolution`, which halves from level to level. The decoder
    counts from the smallest side up, so an odd `resolution` gives it other sides than the encoder.
    """
    kind = network.get("attn_type", "vanilla")
    if network.get("use_linear_attn") or kind not in ("vanilla", "none"):
        kind = network.get("attn_type", "linear")
        raise ValueError(
            f"attention of the type {kind!r} is not supported, only 'vanilla' and 'none'"
        )
    if network.get("give_pre_end"):
        raise ValueError("give_pre_end, a decoder without its last layers, is not supported")
    resolution, attending = count(network, "resolution"), counts(network, "attn_resolutions")
    if kind == "none":
        attending = ()
    smallest = resolution // 2 ** (num_levels - 1)
    encoder = [resolution // 2**level in attending for level in range(num_levels)]
    return encoder, [smallest * 2**level in attending for level in range(num_levels)]


def load_first_stage(weights, description, prefix="", use_ema=None):
    """Load the autoencoder of `read_autoencoder`; its weights have the prefix `prefix`."""
    kind, cls, arguments = description
    try:
        with torch.device("meta"):  # shapes only: an absurd yaml takes no memory
            model = cls(**arguments)
    except ValueError as error:  # such as channels that 32 groups do not divide
        raise ValueError(
            f"the yaml describes an autoencoder that cannot be built: {error}."
        ) from error
    num_levels = len(arguments["block_out_channels"])

    def find_source(name):
        return prefix + original_name(name, num_levels), None

    ema_name = None if prefix else lambda name: "model_ema." + name.replace(".", "")
    what = f"a {kind} autoencoder" + (" within a diffusion model" if prefix else "")
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
"""Parts of names in diffusers, and what the originals call them."""


def original_name(name: str, num_levels: int) -> str:
    """Return the original name of a parameter; original levels count from the finest."""
    name = re.sub(
        r"\bup_blocks\.(\d+)\.", lambda level: f"up.{num_levels - 1 - int(level[1])}.", name
    )
    for pattern, original in PLACES:
        name = re.sub(pattern, original, name)
    return name
