"""The mask-conditioned latent diffusion model as a `Family`."""

from dataclasses import dataclass, replace

from em_diffusion.family import (
    LDMOptions,
    describe_for_card,
    find_codebook,
    find_reconstructions,
    list_controls,
)
from em_training.family import Card, Control, Family, check_options


@dataclass(frozen=True)
class MaskLDMOptions(LDMOptions):
    """Sampling options of latent diffusion models (LDMs) that are conditioned on masks."""

    mask_scale: float | None = None
    """Guidance by the mask of the defects: 1 is none, more follows the mask more closely and takes
    twice the time. Default: the scale saved with the model."""

    def __post_init__(self):
        super().__post_init__()
        check_options(self, mask_scale=(-100, 100))


def describe_with_masks(pipeline) -> dict:
    """Return what the card's template needs."""
    sampler = pipeline.layout_sampler
    return describe_for_card(pipeline) | {
        "kinds": list(pipeline.kinds),
        "layouts": {"source": sampler.config.source, "num_shapes": len(sampler.shape_kinds)},
        "mask_scale": pipeline.config.mask_scale,
    }


def list_mask_controls(pipeline) -> tuple[Control, ...]:
    """Return the demo's inputs: those of latent diffusion models, and guidance by the mask."""
    scale = Control(
        "mask_scale",
        "Guidance by the mask",
        "slider",
        pipeline.config.mask_scale,
        help="1 is none. More follows the drawn layout of defects more closely.",
        minimum=1,
        maximum=4,
        step=0.25,
    )
    return (*list_controls(pipeline), scale)


FAMILY = Family(
    name="mask-ldm",
    titles={"mask-ldm": "LDM with masks"},
    pipeline="em_diffusion.pipeline_em_mask_ldm:EMMaskLatentDiffusionPipeline",
    options=MaskLDMOptions,
    stages=("autoencoder", "denoiser"),
    card=Card(
        "mask_ldm.md.j2",
        "em_diffusion",
        "latent-diffusion",
        "mask-conditioned latent diffusion model",
        describe_with_masks,
    ),
    drawer="em_diffusion.mask_drawing:MaskLDMDrawer",
    read_kind=lambda folder: "mask-ldm",
    reconstructions=find_reconstructions,
    draws_layouts=True,
    without_grain=lambda options: replace(options, grain=False),
    find_exact_modules=find_codebook,
    controls=list_mask_controls,
    walk_help="The noise that images start from changes smoothly; the layout of defects stays, and "
    "frames have no grain.",
    script="train_ldm.py",
    presets="em_diffusion.presets:PRESETS",
    train="em_diffusion.train:train_ldm",
)
