"""The 1-channel autoencoders, VQ and KL: construction, encoding and decoding."""

from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer

from em_diffusion.codebook import quantise


def create_autoencoder(config, resolution: int) -> VQModel | AutoencoderKL:
    """Create a `VQModel` or `AutoencoderKL` for images [B, 1, resolution, resolution].

    Some of diffusers' defaults are for other models. `scaling_factor` is 1 here, because the mean
    and deviation of the latents are measured and stored beside it. The quantiser's `legacy`, which
    puts beta on the wrong term of the loss, is off. Training uses `quantise` instead, and a model
    loaded from disk has the default again.
    """
    num_levels = len(config.block_out_channels)
    shape = {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D",) * num_levels,
        "up_block_types": ("UpDecoderBlock2D",) * num_levels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "sample_size": resolution,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": 1.0,
        "mid_block_add_attention": config.mid_attention,
    }
    if config.kind == "kl":
        return AutoencoderKL(**shape)
    vqvae = VQModel(**shape, num_vq_embeddings=config.num_codes)
    vqvae.quantize.legacy = False
    vqvae.quantize.beta = config.commitment_weight
    return vqvae


def has_codebook(model) -> bool:
    """Say whether the model is a `VQModel` that takes the nearest codes; a `GumbelVQ` does not."""
    return isinstance(model, VQModel) and isinstance(model.quantize, VectorQuantizer)


def is_trainable(model) -> bool:
    """Say whether `autoencoder_loop` has a loss for the model."""
    return has_codebook(model) or isinstance(model, AutoencoderKL)


def encode(model, images):
    """Encode images [B, 1, R, R] in [-1, 1] to latents [B, C, h, w] in the autoencoder's scale.

    They are what a diffusion model learns: the encoder's outputs before quantisation for a
    `VQModel`, the mean of the posterior for an `AutoencoderKL`.
    """
    output = model.encode(images)
    return output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents


def decode(model, latents):
    """Decode latents [B, C, h, w] in the autoencoder's scale to images [B, 1, R, R].

    A `VQModel` decodes the nearest codes, which are searched in float32: a narrower type would
    confuse close ones. Other kinds quantise by themselves.
    """
    if not has_codebook(model):
        return model.decode(latents.to(model.dtype)).sample
    quantised = quantise(latents, model.quantize.embedding.weight).latents
    return model.decode(quantised.to(model.dtype), force_not_quantize=True).sample


def find_codes(model, latents):
    """Return the codes int64 [B, h, w] of latents [B, C, h, w]; None for a model without any."""
    if not hasattr(model, "quantize"):
        return None
    indices = model.quantize(latents.to(model.dtype))[2][2]
    return indices.reshape(len(latents), *latents.shape[2:])
