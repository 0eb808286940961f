from .config import LoRAConfig as LoRAConfig
from .em_adapters import EMAdapters as EMAdapters
from .em_prompts import EMPrompts as EMPrompts
from .pipeline_em_lora import EMLoRAPipeline as EMLoRAPipeline
from .presets import PRESETS as PRESETS
from .train import train_lora as train_lora
