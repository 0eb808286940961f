from .config import CycleGANConfig as CycleGANConfig
from .em_resnet_generator import EMResnetGenerator as EMResnetGenerator
from .image_pool import ImagePool as ImagePool
from .pipeline_em_translation import EMTranslationPipeline as EMTranslationPipeline
from .presets import PRESETS as PRESETS
from .train import train_cyclegan as train_cyclegan
