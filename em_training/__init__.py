"""What every training loop shares, and no loop: checkpoints, EMA, seeding, run log, strict configuration."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
