"""Weights of models: their hash, saving them in one piece, and loading them quietly."""

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import huggingface_hub
import torch
from torch import nn

from em_data.files import replace_folder
from em_training.nodes import fail_together


def hash_weights(module: nn.Module, without: tuple[str, ...] = ()) -> str:
    """Return the SHA-256 of a module's state: names, types, shapes and bytes.

    without: prefixes of the names that do not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(without):
            continue
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_from_main_process(model, path, accelerator) -> Path:
    """Save a trained model from the main process, while the others wait; return `path`."""
    with fail_together(accelerator):
        if accelerator.is_main_process:
            save_model(model.eval(), path)
    return Path(path)


def save_model(model, path) -> Path:
    """Save a model or pipeline by its `save_pretrained` in place of what `path` held."""
    with replace_folder(path) as folder:
        model.save_pretrained(folder)
    return Path(path)


@contextlib.contextmanager
def hide_loading_bars() -> Iterator[None]:
    """Hide the bars of diffusers and transformers for the block; downloads keep theirs."""
    libraries = filter(None, (diffusers, sys.modules.get("transformers")))
    logs = [
        each.utils.logging for each in libraries if each.utils.logging.is_progress_bar_enabled()
    ]
    shows_downloads = not huggingface_hub.utils.are_progress_bars_disabled()

    def restore_downloads():  # transformers switches them as well
        if shows_downloads:
            huggingface_hub.utils.enable_progress_bars()
        else:
            huggingface_hub.utils.disable_progress_bars()

    for log in logs:
        log.disable_progress_bar()
    restore_downloads()
    try:
        yield
    finally:
        for log in logs:
            log.enable_progress_bar()
        restore_downloads()
