"""Load original checkpoints of taming-transformers, latent-diffusion and DALL-E's dVAE as diffusers models.

Nothing in a checkpoint is executed: see `em_training.torch_checkpoint`.
"""

from em_diffusion.grey import fold_to_grey
from em_diffusion.original.autoencoder import load_first_stage
from em_diffusion.original.config import OriginalModel, find_config, read_config
from em_diffusion.original.dalle import find_dalle, load_dalle
from em_diffusion.original.unet import create_scheduler, load_unet, read_stored_betas
from em_diffusion.original.weights import OriginalWeights
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline

FIRST_STAGE_PREFIX = "first_stage_model."
DIFFUSION_PREFIXES = ("model.", "cond_stage_model.", "transformer.")


def load_official(
    source, config=None, *, use_ema=None, grey=True, autoencoder=None, say=lambda text: None
):
    """Load what an original checkpoint holds: an autoencoder, or a whole `EMLatentDiffusionPipeline`; float32, on the CPU.

    source: a .ckpt of taming-transformers or latent-diffusion, or a folder with DALL-E's encoder.pkl and decoder.pkl.
    config: the yaml of a .ckpt; None looks beside it (`find_config`).
    use_ema: True for averaged weights, False for raw ones, None for averaged ones where the checkpoint has them.
    grey: fold an autoencoder with three channels into one with a single one, as `fold_to_grey` does exactly.
    autoencoder: a model for a diffusion checkpoint that holds its U-Net alone.
    say: called with a sentence about what was left out.

    The pipeline's scheduler has the original's noise schedule and spacing, and its autoencoder's `latents_std` is one over
    the original's scale factor. Raises `ValueError` in one sentence, with the way out, for everything that cannot be loaded to
    give the original's numbers.
    """
    folder = find_dalle(source)
    if folder is not None:
        return _to_grey(load_dalle(folder), grey)
    weights, original = open_official(source, config)
    if original.unet is None:
        return load_official_autoencoder(source, config, use_ema=use_ema, grey=grey, say=say)
    unet, scheduler, scale_factor = _load_denoiser(weights, original, use_ema)
    if (
        autoencoder is None
        and original.first_stage is not None
        and weights.has_prefix(FIRST_STAGE_PREFIX)
    ):
        autoencoder = _to_grey(
            load_first_stage(weights, original.first_stage, FIRST_STAGE_PREFIX), grey
        )
    _say_left(weights, say, FIRST_STAGE_PREFIX)
    if autoencoder is None:
        raise ValueError(
            f"{source} holds a U-Net and no autoencoder; name the autoencoder of its latents with --autoencoder, or take the U-Net "
            "alone with `load_official_unet`."
        )
    _set_scale(autoencoder, unet, scale_factor)
    return EMLatentDiffusionPipeline(autoencoder, unet, scheduler).to("cpu")


def load_official_autoencoder(
    source, config=None, *, use_ema=None, grey=True, say=lambda text: None
):
    """The autoencoder of an original checkpoint, also out of a whole diffusion model; arguments as in `load_official`."""
    folder = find_dalle(source)
    if folder is not None:
        return _to_grey(load_dalle(folder), grey)
    weights, original = open_official(source, config)
    if original.first_stage is None:
        raise ValueError(f"{source} is a diffusion model over pixels, without an autoencoder.")
    is_part = weights.has_prefix(FIRST_STAGE_PREFIX)
    model = load_first_stage(
        weights, original.first_stage, FIRST_STAGE_PREFIX if is_part else "", use_ema
    )
    _say_left(weights, say, *(DIFFUSION_PREFIXES if is_part else ()))
    model = _to_grey(model, grey)
    if original.schedule is not None:
        _set_scale(model, None, _find_scale(weights, original))
    return model


def load_official_unet(source, config=None, *, use_ema=None):
    """The U-Net of an original diffusion checkpoint, its `DDIMScheduler`, and the factor that scales its latents."""
    weights, original = open_official(source, config)
    if original.unet is None:
        raise ValueError(f"{source} is an autoencoder, and holds no U-Net.")
    denoiser = _load_denoiser(weights, original, use_ema)
    weights.count_left(FIRST_STAGE_PREFIX)
    return denoiser


def open_official(source, config=None) -> tuple[OriginalWeights, OriginalModel]:
    """The tensors of a checkpoint and what its yaml says; the file is judged first, so that a wrong one is not asked for a yaml."""
    weights = OriginalWeights(source)
    return weights, read_config(find_config(source) if config is None else config)


def _load_denoiser(weights, original, use_ema):
    if weights.has_prefix("cond_stage_model."):
        raise ValueError(
            f"{weights.path} is a conditional model (cond_stage_model); only unconditional ones are supported."
        )
    unet = load_unet(weights, original.unet, use_ema)
    return (
        unet,
        create_scheduler(original.schedule, read_stored_betas(weights)),
        _find_scale(weights, original),
    )


def _find_scale(weights, original):
    """The factor that the latents are multiplied by: measured in training and stored, or said by the yaml."""
    stored = "scale_factor" in weights
    scale = weights.read_number("scale_factor") if stored else original.schedule.scale_factor
    if scale <= 0:
        raise ValueError(f"scale_factor in {weights.path} is {scale}; it must be positive.")
    return scale


def _set_scale(autoencoder, unet, scale_factor):
    num_channels = autoencoder.config.get("vq_embed_dim") or autoencoder.config.get(
        "latent_channels"
    )
    if unet is not None and unet.config.in_channels != num_channels:
        raise ValueError(
            f"the U-Net is for latents of {unet.config.in_channels} channels, and the autoencoder's have {num_channels}: they do not "
            "belong together."
        )
    autoencoder.register_to_config(
        latents_mean=[0.0] * num_channels, latents_std=[1 / scale_factor] * num_channels
    )


def _to_grey(model, grey):
    return fold_to_grey(model) if grey else model


def _say_left(weights, say, *others):
    for kind, count in sorted(weights.count_left(*others).items()):
        say(f"left out: {count} tensors of the {kind.replace('another model', 'other model')}")
