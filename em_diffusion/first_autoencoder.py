"""The autoencoder that its stage begins with: new, fitted or loaded."""

import time

import torch

from em_diffusion.autoencoder import create_autoencoder, is_trainable
from em_diffusion.load_autoencoder import KINDS, load_autoencoder
from em_diffusion.patch_basis import fit_to_tiles
from em_training import fill_cache, seed_for


def build_autoencoder(config, tiles, accelerator):
    """Return the autoencoder on the accelerator's device, and the seconds of fitting it, if any.

    A loaded one keeps its architecture whatever the configuration says; differences are printed.

    Raises:
        ValueError: If a loaded one is to be trained but its kind has no loss here.
    """
    if config.init_from is None and config.kind == "basis":
        factor, channels = config.downsampling_factor, config.latent_channels
        started = time.monotonic()
        model = fit_to_tiles(tiles, config.num_images, factor, channels)
        return model.to(accelerator.device), time.monotonic() - started
    if config.init_from is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(config.seed, "autoencoder"))
            model = create_autoencoder(config, tiles.resolution)
        return model.to(accelerator.device, memory_format=torch.channels_last), 0.0
    model = fill_cache(accelerator, lambda: load_autoencoder(config.init_from))
    if config.freeze_encoder and not is_trainable(model):
        accelerator.print(f"{config.init_from} has an autoencoder that is used unchanged")
    elif config.num_images > 0 and not is_trainable(model):
        raise ValueError(
            f"autoencoder.init_from {config.init_from} is a {type(model).__name__}, which "
            "cannot be trained here: only VQ models with nearest codes and KL models can. Use "
            "it unchanged with --autoencoder.num-images 0."
        )
    if changes := list_changes(config, model):
        accelerator.print(f"{config.init_from} keeps its own architecture: {', '.join(changes)}")
    # statistics of other micrographs; measured anew
    stale = [name for name in ("latents_mean", "latents_std") if name in model.config]
    model.register_to_config(**dict.fromkeys(stale))
    model.requires_grad_(True)
    if config.freeze_encoder and is_trainable(model):
        model.encoder.requires_grad_(False)
        if getattr(model, "quant_conv", None) is not None:
            model.quant_conv.requires_grad_(False)
    return model.to(accelerator.device, memory_format=torch.channels_last), 0.0


def list_changes(config, model) -> list[str]:
    """Return where the model's architecture differs from the configuration's."""
    own = {
        "kind": KINDS[type(model)].lower(),
        "block_out_channels": tuple(model.config.get("block_out_channels", ())),
        "layers_per_block": model.config.get("layers_per_block"),
        "latent_channels": model.config.get("latent_channels"),
        "num_codes": model.config.get("num_vq_embeddings"),
        "norm_num_groups": model.config.get("norm_num_groups"),
        "mid_attention": model.config.get("mid_block_add_attention"),
    }
    return [
        f"{name} {value} (not {getattr(config, name)})"
        for name, value in own.items()
        if value not in (None, (), getattr(config, name))
    ]


def list_trained(model):
    """Return the parameters that are trained: all, or those behind a frozen encoder."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
