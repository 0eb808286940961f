"""Load checkpoints of taming-transformers, latent-diffusion and DALL-E as diffusers models.

Nothing in a checkpoint is executed: see `em_training.torch_checkpoint`.
"""

from dataclasses import dataclass
from pathlib import Path

from em_diffusion.grey import fold_to_grey
from em_diffusion.original.autoencoder import KINDS, load_first_stage, read_autoencoder
from em_diffusion.original.config import class_name, find_config, number, read_config, section
from em_diffusion.original.dalle import find_dalle, load_dalle
from em_diffusion.original.schedule import create_scheduler, read_schedule
from em_diffusion.original.unet import load_unet, read_unet
from em_diffusion.original.weights import OriginalWeights
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline

DIFFUSION_MODELS = ("LatentDiffusion", "DDPM")
FIRST_STAGE_PREFIX = "first_stage_model."
DIFFUSION_PREFIXES = ("model.", "cond_stage_model.", "transformer.")


def load_official(
    source, config=None, *, use_ema=None, grey=True, autoencoder=None, say=lambda text: None
):
    """Load what an original checkpoint holds: an autoencoder, or a whole latent diffusion model.

    Args:
        source: A .ckpt file of taming-transformers or latent-diffusion, or a folder with DALL-E's
            encoder.pkl and decoder.pkl.
        config: The yaml of a .ckpt file. Default: the yaml beside it (`find_config`).
        use_ema: True for averaged weights, False for raw ones, None for averaged ones if there are
            any.
        grey: Fold an autoencoder with three channels exactly into one with a single channel.
        autoencoder: The autoencoder of a checkpoint that holds only a U-Net.
        say: Called with a sentence about each kind of tensors that was not used.

    Returns:
        A diffusers model, or an `EMLatentDiffusionPipeline` with the original's noise schedule and
        spacing of steps, whose autoencoder's `latents_std` is 1 / the original's scale factor;
        float32, on the CPU.

    Raises:
        ValueError: If anything cannot be loaded so that it gives the original's numbers.
    """
    folder = find_dalle(source)
    if folder is not None:
        return _to_grey(load_dalle(folder), grey)
    weights, original = open_official(source, config)
    if original.unet is None:
        return _load_autoencoder(weights, original, use_ema, grey, say)
    unet, scheduler, scale_factor = _load_denoiser(weights, original, use_ema)
    has_autoencoder = original.autoencoder and weights.has_prefix(FIRST_STAGE_PREFIX)
    if autoencoder is None and has_autoencoder:
        autoencoder = load_first_stage(weights, original.autoencoder, FIRST_STAGE_PREFIX)
        autoencoder = _to_grey(autoencoder, grey)
    _say_unused(weights, say, FIRST_STAGE_PREFIX)
    if autoencoder is None:
        raise ValueError(
            f"{source} holds a U-Net and no autoencoder; name the autoencoder of its latents with "
            "--autoencoder, or load the U-Net alone with `load_official_unet`."
        )
    _set_scale(autoencoder, unet, scale_factor)
    return EMLatentDiffusionPipeline(autoencoder, unet, scheduler).to("cpu")


def load_official_autoencoder(
    source, config=None, *, use_ema=None, grey=True, say=lambda text: None
):
    """Load an original autoencoder, also from a diffusion model; see `load_official`."""
    folder = find_dalle(source)
    if folder is not None:
        return _to_grey(load_dalle(folder), grey)
    return _load_autoencoder(*open_official(source, config), use_ema, grey, say)


def load_official_unet(source, config=None, *, use_ema=None):
    """Return the U-Net of an original model, its `DDIMScheduler` and the factor of its latents."""
    weights, original = open_official(source, config)
    if original.unet is None:
        raise ValueError(f"{source} is an autoencoder, and holds no U-Net.")
    denoiser = _load_denoiser(weights, original, use_ema)
    weights.count_unused(FIRST_STAGE_PREFIX)
    return denoiser


@dataclass(frozen=True)
class Original:
    """What a yaml describes, as the `read_` functions return it; None for what it does not have."""

    autoencoder: tuple | None
    unet: tuple | None = None
    schedule: dict | None = None
    scale_factor: float | None = None


def open_official(source, config=None) -> tuple[OriginalWeights, Original]:
    """Return the weights of a checkpoint and what its yaml describes."""
    weights = OriginalWeights(source)
    path = Path(find_config(source) if config is None else config)
    try:
        return weights, _read_original(read_config(path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}.") from error


def _read_original(model):
    name, params = class_name(model), model["params"]
    if name in KINDS:
        return Original(read_autoencoder(model))
    if name == "Net2NetTransformer":  # an autoregressive model over the codes of an autoencoder
        return Original(read_autoencoder(section(params, "first_stage_config")))
    if name not in DIFFUSION_MODELS:
        known = ", ".join([*KINDS, *DIFFUSION_MODELS])
        raise ValueError(f"its model is a {model['target']}, and only these are known: {known}")
    _refuse_conditions(params)
    return Original(
        read_autoencoder(section(params, "first_stage_config"))
        if name == "LatentDiffusion"
        else None,
        read_unet(params),
        read_schedule(params),
        number(params, "scale_factor", 1.0),
    )


def _refuse_conditions(params):
    condition, key = params.get("cond_stage_config"), params.get("conditioning_key")
    if condition == "__is_unconditional__" or (condition is None and key is None):
        return
    target = condition.get("target") if isinstance(condition, dict) else condition
    what = f"conditioning_key: {key}" if condition is None else f"cond_stage_config: {target}"
    raise ValueError(f"its model is conditional ({what}); only unconditional ones are supported")


def _load_autoencoder(weights, original, use_ema, grey, say):
    if original.autoencoder is None:
        raise ValueError(
            f"{weights.path} is a diffusion model over pixels, without an autoencoder."
        )
    is_part = weights.has_prefix(FIRST_STAGE_PREFIX)
    prefix, others = (FIRST_STAGE_PREFIX, DIFFUSION_PREFIXES) if is_part else ("", ())
    model = load_first_stage(weights, original.autoencoder, prefix, use_ema)
    _say_unused(weights, say, *others)
    model = _to_grey(model, grey)
    if original.scale_factor is not None:
        _set_scale(model, None, _find_scale(weights, original))
    return model


def _load_denoiser(weights, original, use_ema):
    if weights.has_prefix("cond_stage_model."):
        raise ValueError(
            f"{weights.path} is a conditional model (cond_stage_model); only unconditional ones "
            "are supported."
        )
    unet = load_unet(weights, original.unet, use_ema)
    betas = weights.read("betas") if "betas" in weights else None
    scheduler = create_scheduler(**original.schedule, stored_betas=betas)
    return unet, scheduler, _find_scale(weights, original)


def _find_scale(weights, original):
    """Return the factor of the latents: measured in training and stored, or given by the yaml."""
    stored = "scale_factor" in weights
    scale = weights.read_number("scale_factor") if stored else original.scale_factor
    if scale <= 0:
        raise ValueError(f"scale_factor in {weights.path} is {scale}; it must be positive.")
    return scale


def _set_scale(autoencoder, unet, scale_factor):
    config = autoencoder.config
    num_channels = config.get("vq_embed_dim") or config.get("latent_channels")
    if unet is not None and unet.config.in_channels != num_channels:
        raise ValueError(
            f"the U-Net is for latents of {unet.config.in_channels} channels, but the "
            f"autoencoder's have {num_channels}: they do not belong together."
        )
    autoencoder.register_to_config(
        latents_mean=[0.0] * num_channels, latents_std=[1 / scale_factor] * num_channels
    )


def _to_grey(model, grey):
    return fold_to_grey(model) if grey else model


def _say_unused(weights, say, *others):
    for kind, count in sorted(weights.count_unused(*others).items()):
        say(f"left out: {count} tensors of the {kind}")
