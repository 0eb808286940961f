"""The latent diffusion model: autoencoder, latents, denoiser, pipeline."""

from em_diffusion.autoencoder_loop import train_autoencoder
from em_diffusion.config import AutoencoderConfig, DenoiserConfig, LDMConfig
from em_diffusion.denoiser_loop import train_denoiser
from em_diffusion.latents import Latents, encode_latents
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_diffusion.presets import PRESETS
from em_diffusion.train import train_ldm

__all__ = [
    "PRESETS",
    "AutoencoderConfig",
    "DenoiserConfig",
    "EMLatentDiffusionPipeline",
    "LDMConfig",
    "Latents",
    "encode_latents",
    "train_autoencoder",
    "train_denoiser",
    "train_ldm",
]
