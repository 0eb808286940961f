"""Configuration of a LoRA run: base, data, adapters, training."""

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass

from em_data import DataConfig
from em_training import MAY_CHANGE, strict
from em_training.config import NotNegative, NotNegativeFloat, Positive, PositiveFloat, Size

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FLUX2_KLEIN = "black-forest-labs/FLUX.2-klein-base-4B"
CLASS = "{class}"  # in a prompt
Beta = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True, config=strict("lora"))
class AdapterConfig:
    """The adapters. A weight W becomes W + alpha / rank * B A."""

    rank: Size = 16
    """Rank of the change of each weight."""
    alpha: Annotated[float, Gt(0), Le(65_536)] | None = None
    """Strength of the change. Default: the rank."""
    targets: tuple[str, ...] = ()
    """Linear layers of the denoiser that get adapters, by the ends of their names, such as to_q.
    Default: the projections of the attention layers; those of the image where text has its own."""


@dataclass(frozen=True, config=strict("training"))
class LoRATrainingConfig:
    """The training. Lengths and intervals count images."""

    num_images: Positive = 40_000
    """Images that the adapters are trained on, repetitions counted."""
    batch_size: Size = 4
    """Images of one step, over all processes."""
    micro_batch_size: Annotated[NotNegative, MAY_CHANGE] = 0
    """Images that one process computes at once, with accumulated gradients; 0 for its whole batch.
    Halved automatically when the memory is full."""
    gradient_checkpointing: Annotated[bool, MAY_CHANGE] = True
    """Recompute activations in the backward pass: much less memory, a third slower."""
    learning_rate: PositiveFloat = 1e-4
    warmup_images: NotNegative = 1_000
    """Images over which the learning rate rises from 0; then it is constant."""
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: PositiveFloat = 1.0
    prompt_dropout: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the images that are trained with the empty prompt, for guidance. A model with
    classes draws from all that it has learnt by the empty prompt."""
    ema_half_life_images: NotNegativeFloat = 2_000
    """Images after which old weights of the adapters count half in the saved average; 0 for the
    last weights."""
    num_validation_images: Size = 128
    evaluate_every: Annotated[NotNegative, MAY_CHANGE] = 0
    """Interval in images for comparing images of the averaged adapters with held-out tiles (Frechet
    distance, efficientnet-lite0). The best adapters are kept and go into the pipeline. 0: never,
    and the last ones go into the pipeline."""
    num_evaluation_images: Size = 200
    num_evaluation_steps: Size = 20
    evaluation_metrics: Annotated[tuple[str, ...], MAY_CHANGE] = ()
    """More metrics at these moments, for the curves of the report: kernel_distance, precision,
    recall, density, coverage, frechet_distance_infinite. The Frechet distance chooses the
    weights."""
    num_sample_images: Size = 8
    num_sample_steps: Size = 25
    log_every: Annotated[Positive, MAY_CHANGE] = 200
    validate_every: Annotated[NotNegative, MAY_CHANGE] = 2_000
    sample_every: Annotated[NotNegative, MAY_CHANGE] = 5_000
    checkpoint_every: Annotated[Positive, MAY_CHANGE] = 2_000


@dataclass(frozen=True, config=strict())
class LoRAConfig:
    """A LoRA run: base, data, output folder, prompt, adapters and training."""

    base: str = STABLE_DIFFUSION
    """The pretrained model: a repository on the Hub (owner/name or owner/name@revision), or a
    folder in diffusers' layout, of the class of Stable Diffusion 1.5 or FLUX.2 [klein]. A published
    model refers to a repository; the weights of a folder are saved with the model."""
    data: str = "synthetic"
    """A folder of micrographs, or "synthetic" for the embedded ones. Also "synthetic-varied",
    "synthetic-materials" (three classes), "synthetic-other", "hub:owner/name[@revision]" (written
    by em_data.push), "hub-stream:owner/name[@revision]", "damaged-alloys:FOLDER" and
    "datasets:NAME_OR_PATH"."""
    out: Annotated[str, MAY_CHANGE] = "runs/lora"
    """Folder of the run. The same command on it resumes the run."""
    prompt: str = "an electron micrograph"
    """The prompt of all images. With {class} in it, there is one prompt for each class of the
    micrographs, which has the class's name in that place: "an electron micrograph of {class}"."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the adapters, the order of the data and the noise; the split has tiles.seed."""
    precision: Literal["auto", "bf16", "no"] = "auto"
    """Number format: auto (bf16 where the hardware computes in it), bf16 or no (float32). With
    bf16, the base's weights are kept in it; the adapters stay float32."""
    num_inference_steps: Annotated[Size, MAY_CHANGE] = 50
    """Denoising steps that the pipeline is saved with."""
    guidance_scale: Annotated[float, Gt(0), Le(100), MAY_CHANGE] = 1.0
    """Guidance that the pipeline is saved with; 1 is none. More follows the prompt more closely and
    varies less."""
    tiles: DataConfig = field(default_factory=lambda: DataConfig(resolution=512, symmetries="d4"))
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    training: LoRATrainingConfig = field(default_factory=LoRATrainingConfig)

    @property
    def is_conditional(self) -> bool:
        """Whether there is one prompt for each class."""
        return CLASS in self.prompt
