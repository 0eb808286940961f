"""StyleGAN generators, discriminator, losses, loop and pipeline."""

from em_stylegan.config import StyleGANConfig
from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.em_stylegan1_generator import StyleGAN1Generator
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_stylegan.presets import PRESETS
from em_stylegan.train import train_gan

__all__ = [
    "PRESETS",
    "EMStyleGANPipeline",
    "StyleGAN1Generator",
    "StyleGAN2Generator",
    "StyleGAN3Generator",
    "StyleGANConfig",
    "StyleGANDiscriminator",
    "train_gan",
]
