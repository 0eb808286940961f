from .config import StyleGANConfig as StyleGANConfig
from .discriminator import StyleGANDiscriminator as StyleGANDiscriminator
from .em_stylegan1_generator import StyleGAN1Generator as StyleGAN1Generator
from .em_stylegan2_generator import StyleGAN2Generator as StyleGAN2Generator
from .em_stylegan3_generator import StyleGAN3Generator as StyleGAN3Generator
from .pipeline_em_stylegan import EMStyleGANPipeline as EMStyleGANPipeline
from .presets import PRESETS as PRESETS
from .train import train_gan as train_gan
