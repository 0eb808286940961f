"""Runs to repositories with cards on the Hub, and the demo to a Space."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
