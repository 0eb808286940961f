"""Tuned text-to-image models as a `Family`: what the commands need to know about them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from em_training.classes import list_class_controls
from em_training.config import read_json_object
from em_training.family import Card, Control, Family, check_options

TITLES = {"stable-diffusion": "Stable Diffusion LoRA", "flux2-klein": "FLUX.2 klein LoRA"}
EMPTY_PROMPT = "any"  # in the demo


@dataclass(frozen=True)
class LoRAOptions:
    """Sampling options of tuned text-to-image models (LoRA)."""

    num_inference_steps: int | None = None
    """Denoising steps. Default: the number saved with the model."""
    guidance_scale: float | None = None
    """Guidance away from the empty prompt: 1 is none, more follows the prompt more closely and
    varies less. Default: the scale saved with the model."""
    classes: tuple[str, ...] = ()
    """Classes of the images by name or number, such as --classes copper steel: images take them in
    turn, and a class that is named twice gets twice as many. Default: the empty prompt, which draws
    from all that the model has learnt. For models that have classes."""

    def __post_init__(self):
        check_options(self, num_inference_steps=(1, 65_536), guidance_scale=(0, 100))


def read_kind(folder: Path) -> str:
    """Return the kind of base that a saved pipeline's adapters belong to."""
    path = folder / "adapters" / "config.json"
    kind = read_json_object(path).get("base")
    if kind not in TITLES:
        raise ValueError(f"{path}: base is {kind!r}, but known are {', '.join(TITLES)}.")
    return kind


def find_reconstructions(pipeline, options: LoRAOptions, seed: int) -> Mapping[str, Callable]:
    """Return the reconstruction by the base's autoencoder."""
    from em_stable_diffusion.reconstruction import reconstruct

    return {"autoencoder": partial(reconstruct, pipeline.vae)}


def describe_card(pipeline) -> dict:
    """Return what only this family's card needs."""
    from em_stable_diffusion.em_base_models import BASE_MODELS, GREY_LEVELS

    config = pipeline.adapters.config
    base = BASE_MODELS[config.base]
    return {
        "resolution": pipeline.config.resolution,
        "base": {
            "title": base.title,
            "pipeline": base.pipeline,
            "repository": config.repository,
            "revision": config.revision,
        },
        "prompts": list(pipeline.prompts.config.texts),
        "rank": config.rank,
        "alpha": f"{config.alpha:g}",
        "num_layers": len(config.layers),
        "colourfulness": config.colourfulness,
        "grey_levels": GREY_LEVELS,
        "default_num_inference_steps": pipeline.config.default_num_inference_steps,
        "guidance_scale": f"{pipeline.config.guidance_scale:g}",
        "base_model": config.repository,
    }


def list_controls(pipeline) -> tuple[Control, ...]:
    """Return the demo's inputs: the class, the number of steps, and the guidance."""
    config = pipeline.config
    return (
        *list_class_controls(pipeline, EMPTY_PROMPT),
        Control(
            "num_inference_steps",
            "Steps",
            "slider",
            config.default_num_inference_steps,
            help="More steps take more time and follow the equation more closely.",
            minimum=1,
            maximum=max(100, config.default_num_inference_steps),
        ),
        Control(
            "guidance_scale",
            "Guidance",
            "slider",
            config.guidance_scale,
            help="1 is none. More follows the prompt more closely and varies less.",
            minimum=1,
            maximum=max(10, config.guidance_scale),
            step=0.5,
        ),
    )


FAMILY = Family(
    name="lora",
    titles=TITLES,
    pipeline="em_stable_diffusion.pipeline_em_lora:EMLoRAPipeline",
    options=LoRAOptions,
    stages=("lora",),
    card=Card(
        "lora.md.j2", "em_stable_diffusion", "lora", "tuned text-to-image model", describe_card
    ),
    drawer="em_stable_diffusion.drawing:LoRADrawer",
    read_kind=read_kind,
    reconstructions=find_reconstructions,
    controls=list_controls,
    script="train_lora.py",
    presets="em_stable_diffusion.presets:PRESETS",
    train="em_stable_diffusion.train:train_lora",
)
