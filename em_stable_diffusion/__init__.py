"""LoRA: a pretrained text-to-image model tuned on micrographs, and its pipeline."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
