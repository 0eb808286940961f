"""Weights of models: their hash, and saving them in one piece."""

import hashlib
from pathlib import Path

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
