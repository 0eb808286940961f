"""The latent diffusion model: autoencoder, latents, denoiser, pipeline."""

from em_diffusion.config import AutoencoderConfig, DenoiserConfig, LDMConfig
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_diffusion.presets import PRESETS
from em_diffusion.train import train_ldm

__all__ = [
    "PRESETS",
    "AutoencoderConfig",
    "DenoiserConfig",
    "EMLatentDiffusionPipeline",
    "LDMConfig",
    "train_ldm",
]
