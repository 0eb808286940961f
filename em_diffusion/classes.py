"""The classes of the micrographs in the training of the denoiser."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import UNet2DModel

from em_data import Tiles


def check_classes(config, data) -> str | None:
    """Return a sentence if the data's classes are not used, else None.

    Args:
        config: `LDMConfig`.
        data: `em_data.Data`.

    Raises:
        ValueError: The run is to be conditional, but the data have no classes.
    """
    names = data.train.class_names
    if config.conditional and not names:
        raise ValueError(
            f"conditional is True, but no micrograph of {config.data} has a class. Give classes "
            "(docs/classes.md), or leave --conditional out."
        )
    if names and not config.conditional:
        return (
            f"The micrographs have the classes {', '.join(names)}, which are not used. Train with "
            "--conditional to draw images of a class."
        )
    return None


def read_classes(tiles: Tiles, view_ids: np.ndarray) -> tuple:
    """Return the class names, and the class of each view, as `Latents` take them."""
    return tiles.class_names, tiles.class_labels(view_ids)


def fit_classes(unet: UNet2DModel, before: Sequence[str], after: Sequence[str]) -> UNet2DModel:
    """Give a trained U-Net the classes `after`; it is changed in place.

    A class that it does not know begins as no class. So a U-Net without classes predicts the same
    for all of them, and a U-Net whose classes are taken away predicts what it did for no class.

    Args:
        before: Its class names; () for a U-Net without classes, or without names.
        after: Those that it gets; () for none.
    """
    vars(unet).pop("_pipeline_options", None)  # of its last pipeline, with the names
    old = unet.class_embedding
    bias = unet.time_embedding.linear_2.bias
    no_class = torch.zeros_like(bias) if old is None else old.weight[-1].detach()
    rows = {} if old is None else dict(zip(before, old.weight.detach(), strict=False))
    if not after:
        with torch.no_grad():
            bias += no_class
        unet.class_embedding = None
        unet.register_to_config(num_class_embeds=None)
        return unet
    table = torch.stack([*(rows.get(name, no_class) for name in after), no_class])
    unet.class_embedding = torch.nn.Embedding.from_pretrained(table.clone(), freeze=False)
    unet.register_to_config(num_class_embeds=len(table))
    return unet
