"""The latent diffusion model as a `Family`: what the commands need to know about it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from em_training.classes import list_class_controls
from em_training.family import Card, Control, Family, check_options, parse_size

SamplerName = Literal[
    "ddim",
    "ddpm",
    "dpm-solver++",
    "dpm-solver++-karras",
    "dpm-solver++-sde",
    "unipc",
    "unipc-karras",
    "euler",
    "heun",
    "flow-euler",
    "flow-heun",
]
NO_CLASS = "none"  # in the demo
# usual numbers of steps, which the demo proposes when another sampler is chosen
DEMO_STEPS = {
    "ddim": 50,
    "ddpm": 250,
    "dpm-solver++": 20,
    "dpm-solver++-karras": 20,
    "dpm-solver++-sde": 20,
    "unipc": 20,
    "unipc-karras": 20,
    "euler": 30,
    "heun": 20,
    "flow-euler": 20,
    "flow-heun": 10,
}


@dataclass(frozen=True)
class LDMOptions:
    """Sampling options of latent diffusion models (LDMs)."""

    size: str | None = None
    """Height x width of the images in pixels, such as 1024x768, or one number for a square.
    Default: the size of a tile. Larger images are drawn whole, from overlapping windows without
    seams; --batch-size then counts windows."""
    num_inference_steps: int | None = None
    """Denoising steps. Default: the number saved with the model."""
    scheduler: SamplerName | None = None
    """Sampler to use instead of the one saved with the model. It needs --num-inference-steps.
    Models trained by flow matching take dpm-solver++, unipc, flow-euler and flow-heun; others take
    all but the last two."""
    eta: float = 0.0
    """Noise added back in each step of ddim: 0 (deterministic) to 1 (as noisy as ddpm)."""
    classes: tuple[str, ...] = ()
    """Classes of the images by name or number, such as --classes copper steel: images take them in
    turn, and a class that is named twice gets twice as many. Default: no class, which draws from
    all that the model has learnt. For models that have classes."""
    guidance_scale: float | None = None
    """Guidance by the weaker U-Net that the model holds or, if it holds none, by its own prediction
    without the class: 1 is none, more trades variety for fidelity. Default: the scale saved with
    the model."""
    guidance_start: float | None = None
    """Fraction of the steps at which the guidance begins. Default: that saved with the model."""
    guidance_stop: float | None = None
    """Fraction of the steps at which the guidance ends. Default: that saved with the model."""
    grain: bool = True
    """Add the noise of micrographs that the autoencoder does not reproduce, if the model has it."""
    decode_batch_size: int | None = None
    """Images decoded at a time. Default: as many as make a million pixels."""
    compile: bool = False
    """Compile the U-Net with torch.compile. It pays from some thousands of images on: compiling
    takes about a minute."""

    def __post_init__(self):
        check_options(
            self,
            num_inference_steps=(1, 65_536),
            eta=(0, 1),
            guidance_scale=(-100, 100),
            guidance_start=(0, 1),
            guidance_stop=(0, 1),
            decode_batch_size=(1, 65_536),
        )
        if self.size is not None:
            parse_size(self.size)
        if self.scheduler is not None and self.scheduler not in get_args(SamplerName):
            raise ValueError(
                f"--scheduler is {self.scheduler}; choose {', '.join(get_args(SamplerName))}"
            )
        if self.scheduler is not None and self.num_inference_steps is None:
            raise ValueError(
                f"--scheduler {self.scheduler} needs --num-inference-steps: the default number "
                "belongs to the sampler saved with the model"
            )


def find_reconstructions(pipeline, options: LDMOptions, seed: int) -> dict[str, Callable]:
    """Return the reconstruction by the autoencoder, with the grain if images are drawn with it."""
    from em_diffusion.drawing import reconstruct
    from em_training import make_generator

    grain = pipeline.grain if options.grain else None
    rng = make_generator(seed, stream="grain")
    part = "autoencoder" if grain is None else "autoencoder and grain"
    return {part: partial(reconstruct, pipeline.vqvae, grain=grain, generator=rng)}


def describe_for_card(pipeline) -> dict:
    """Return what only this family's template needs."""
    import diffusers
    import torch

    channels, height, width = pipeline.latent_shape
    parts = [type(part) for part in pipeline.components.values()]
    stock = [cls.__name__ for cls in parts if cls.__module__.startswith("diffusers.")]
    blank = torch.zeros(1, channels, height, width, device=pipeline.device)
    return {
        "resolution": pipeline.decode(blank, add_grain=False).shape[-1],
        "latents": {"channels": channels, "height": height, "width": width},
        "autoencoder": {"num_codes": pipeline.vqvae.config.get("num_vq_embeddings")},
        "default_num_inference_steps": pipeline.config.default_num_inference_steps,
        "guidance_scale": pipeline.config.guidance_scale,
        "is_guided_by_classes": bool(
            pipeline.guide is None and pipeline.num_classes and pipeline.config.guidance_scale != 1
        ),
        "guided_percent": tuple(
            f"{100 * pipeline.config[name]:g}" for name in ("guidance_start", "guidance_stop")
        ),
        "stock": [name for name in stock if hasattr(diffusers, name)],
    }


def list_controls(pipeline) -> tuple[Control, ...]:
    """Return the demo's inputs: the class, the sampler, its number of steps, and the guidance."""
    from em_diffusion.samplers import list_samplers

    saved = type(pipeline.scheduler).__name__.removesuffix("Scheduler") + ", as saved"
    saved_steps = pipeline.config.default_num_inference_steps
    names = list_samplers(pipeline.scheduler)
    steps = {saved: saved_steps} | {name: DEMO_STEPS[name] for name in names}
    guidance = Control(
        "guidance_scale",
        "Guidance",
        "slider",
        pipeline.config.guidance_scale,
        help="1 is none. More follows typical images more closely and varies less.",
        minimum=1,
        maximum=4,
        step=0.25,
    )
    classes = list_class_controls(pipeline, NO_CLASS)
    if pipeline.guide is None:  # then images of no class cannot be guided
        classes = tuple(replace(c, sets={NO_CLASS: {"guidance_scale": 1.0}}) for c in classes)
    return (
        *classes,
        Control(
            "scheduler",
            "Sampler",
            "choice",
            saved,
            help="Solves the denoising equation. The number of steps follows the choice.",
            choices={saved: None} | {name: name for name in names},
            sets={name: {"num_inference_steps": number} for name, number in steps.items()},
        ),
        Control(
            "num_inference_steps",
            "Steps",
            "slider",
            saved_steps,
            help="More steps take more time and follow the equation more closely.",
            minimum=1,
            maximum=max(250, saved_steps),
        ),
        *([guidance] if pipeline.guide is not None or pipeline.num_classes else []),
    )


def find_codebook(pipeline) -> tuple:
    """Return the codes of a VQ autoencoder: rounded ones are confused with each other."""
    codes = getattr(getattr(pipeline.vqvae, "quantize", None), "embedding", None)
    return () if codes is None else (codes,)


FAMILY = Family(
    name="ldm",
    titles={"ldm": "LDM"},
    pipeline="em_diffusion.pipeline_em_ldm:EMLatentDiffusionPipeline",
    options=LDMOptions,
    stages=("autoencoder", "denoiser"),
    card=Card(
        "ldm.md.j2", "em_diffusion", "latent-diffusion", "latent diffusion model", describe_for_card
    ),
    drawer="em_diffusion.drawing:LDMDrawer",
    read_kind=lambda folder: "ldm",
    reconstructions=find_reconstructions,
    without_grain=lambda options: replace(options, grain=False),
    draws_from_images=True,
    find_exact_modules=find_codebook,
    controls=list_controls,
    walk_help="The noise that images start from changes smoothly; frames have no grain.",
    script="train_ldm.py",
    presets="em_diffusion.presets:PRESETS",
    train="em_diffusion.train:train_ldm",
)
