"""Training with masks: labelled views with what the U-Net takes of them, and its wider input."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from em_data.tiles import Tiles
from em_diffusion.classes import fit_classes
from em_diffusion.em_layout_sampler import EMLayoutSampler
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_diffusion.pipeline_em_mask_ldm import (
    EMMaskLatentDiffusionPipeline,
    draw_masks,
    make_condition,
)
from em_diffusion.validation import space_evenly
from em_training.config import read_json_object
from em_training.latents import Latents

MASK_SCALE = 2.0  # guidance by the mask that models are saved with; see docs/masks.md


class MaskedLatents(Latents):
    """Latents of labelled views, and their masks.

    Args:
        latents: Of these views.
        tiles: The side of the split that the views are of.
        view_ids: Numbers of the views in `tiles`, as many as there are latents.
        layout_sampler: Its `kinds` are the channels of the masks.
    """

    def __init__(self, latents: Latents, tiles: Tiles, view_ids, layout_sampler: EMLayoutSampler):
        self.__dict__.update(vars(latents))
        self.tiles, self.view_ids = tiles, view_ids
        self.layout_sampler = layout_sampler
        self.kinds = tuple(layout_sampler.config.kinds)
        self.factor = tiles.resolution // latents.shape[-1]

    @property
    def num_conditions(self) -> int:
        """Number of channels of `conditions`."""
        return (len(self.kinds) + 1) * self.factor**2 + 1

    def conditions(self, ids) -> torch.Tensor:
        """Return what the U-Net takes beside these latents, float32 [B, num_conditions, h, w].

        Those of views without labels are 0, as those of dropped masks.
        """
        side, view_ids = self.tiles.resolution, self.view_ids[np.asarray(ids)]
        masks = [draw_masks(self.tiles.defects(each), self.kinds, side, side) for each in view_ids]
        is_labelled = torch.from_numpy(self.tiles.is_labelled[self.tiles.locate(view_ids)[0]])
        return make_condition(torch.stack(masks), self.factor) * is_labelled.view(-1, 1, 1, 1)


def check_masks(config, data, log) -> None:
    """Say how much is labelled, if an `LDMConfig` asks for masks.

    Raises:
        ValueError: No training tile has labels, or there is no model to start from.
    """
    if not config.denoiser.mask_conditional:
        return
    if config.denoiser.init_from is None:
        raise ValueError(
            "denoiser.mask_conditional trains a model further that was trained on all tiles, but "
            "none is given. Train one without it first, and use --init-from RUN (or a model of the "
            "package, such as --init-from em-ldm-64)."
        )
    num, total = int(data.train.is_labelled.sum()), data.train.num_tiles
    if not num or not data.train.kinds:
        raise ValueError(
            "denoiser.mask_conditional needs labelled defects, but no micrograph of the training "
            "side has labels. Label some, or leave --denoiser.mask-conditional out."
        )
    log(
        f"masks: {num:,} of {total:,} training tiles have labels of the kinds "
        f"{', '.join(data.train.kinds)}; the denoiser is trained on these alone"
    )
    if not data.held_out.is_labelled.any():
        log("masks: no held-out tile has labels; the held-out loss is that of dropped masks")


def choose_views(config, data) -> tuple[np.ndarray, np.ndarray]:
    """Return the views to train on and those to validate on, int64 [N] and [M].

    With masks, these are views of labelled micrographs, if there are any.
    """
    train = np.arange(data.train.num_views)
    held_out = np.arange(data.held_out.num_views)
    if config.denoiser.mask_conditional:
        train, labelled = find_labelled_views(data.train), find_labelled_views(data.held_out)
        held_out = labelled if len(labelled) else held_out
    spaced = space_evenly(len(held_out), config.denoiser.num_validation_images)
    return train, held_out[spaced]


def find_labelled_views(tiles: Tiles) -> np.ndarray:
    """Return the ids of all views whose micrograph has labels, int64 [N]."""
    tile_ids, _ = tiles.locate(np.arange(tiles.num_views))
    return np.flatnonzero(tiles.is_labelled[tile_ids])


def add_masks(config, data, latents: Latents, held_out: Latents, layout_sampler):
    """Return the latents of `choose_views` with masks; as they are without a layout sampler."""
    if layout_sampler is None:
        return latents, held_out
    training, validation = choose_views(config, data)
    return (
        MaskedLatents(latents, data.train, training, layout_sampler),
        MaskedLatents(held_out, data.held_out, validation, layout_sampler),
    )


def load_layout_sampler(folder: Path) -> EMLayoutSampler | None:
    """Load the layout sampler of a run's folder; None for a run without masks."""
    folder = folder / "layouts"
    is_there = (folder / "config.json").is_file()
    return EMLayoutSampler.from_pretrained(folder).eval() if is_there else None


def find_layout_sampler(latents: Latents) -> EMLayoutSampler | None:
    """Return the layout sampler of latents with masks; None for others."""
    return latents.layout_sampler if isinstance(latents, MaskedLatents) else None


def draw_conditions(latents, ids, dropout: float, rng) -> torch.Tensor | None:
    """Return the masks of these views, some of them dropped; None for latents without masks."""
    if not isinstance(latents, MaskedLatents):
        return None
    conditions = latents.conditions(ids)
    is_kept = torch.rand(len(conditions), generator=rng) >= dropout
    return conditions * is_kept.view(-1, 1, 1, 1)


def fit_start(start, latents: Latents):
    """Return the U-Net of a `Start` with the classes and the masks of latents, if they have any."""
    unet = fit_classes(start.unet, start.class_names, latents.class_names)
    if isinstance(latents, MaskedLatents):
        return widen_input(unet, latents.num_conditions)
    return unet


def widen_input(unet, num_channels: int):
    """Return a copy of a U-Net that takes `num_channels` more channels.

    Their weights are 0, so that its predictions are those of `unet` until it is trained.
    """
    model = deepcopy(unet)
    old = model.conv_in
    with torch.random.fork_rng(devices=[]):
        new = torch.nn.Conv2d(
            old.in_channels + num_channels,
            old.out_channels,
            kernel_size=old.kernel_size,
            padding=old.padding,
        )
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
    new.bias = deepcopy(old.bias)
    model.conv_in = new.to(old.weight)
    model.register_to_config(in_channels=new.in_channels)
    return model


def create_pipeline(vqvae, unet, scheduler, layout_sampler, *arguments, **options):
    """Return a pipeline with masks, or one without if `layout_sampler` is None."""
    if layout_sampler is None:
        return EMLatentDiffusionPipeline(vqvae, unet, scheduler, *arguments, **options)
    options["mask_scale"] = MASK_SCALE
    return EMMaskLatentDiffusionPipeline(
        vqvae, unet, scheduler, layout_sampler, *arguments, **options
    )


def load_pipeline(folder: Path) -> EMLatentDiffusionPipeline:
    """Load a saved pipeline, with masks or without, by its class."""
    name = read_json_object(folder / "model_index.json").get("_class_name")
    name = name[-1] if isinstance(name, list) and name else name
    has_masks = name == EMMaskLatentDiffusionPipeline.__name__
    cls = EMMaskLatentDiffusionPipeline if has_masks else EMLatentDiffusionPipeline
    return cls.from_pretrained(folder)
