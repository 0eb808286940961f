"""The pretrained text-to-image models that are tuned, and how diffusers draws with each.

It needs only torch, diffusers and the standard library.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

GREY_LEVELS = 255
VARIANTS = ("fp16", "bf16")  # names of weight files of 16 bits, in their order of preference


@dataclass(frozen=True)
class BaseModel:
    """A class of text-to-image models: diffusers' classes of it, by their names.

    Attributes:
        title: What people call it.
        pipeline: The pipeline.
        denoiser: What the pipeline calls its denoiser, in the repository and in LoRA files.
        denoiser_class, vae_class: The denoiser, and the autoencoder.
        without: Options for a pipeline without the parts that are not used here.
    """

    title: str
    pipeline: str
    denoiser: str
    denoiser_class: str
    vae_class: str
    without: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pipeline_class(self) -> Any:
        """diffusers' pipeline."""
        return getattr(diffusers, self.pipeline)

    def load_denoiser(self, source: Any, **options: Any) -> Any:
        """Load the denoiser of a folder or repository in diffusers' layout, for inference."""
        return self._load(self.denoiser_class, source, self.denoiser, options)

    def load_vae(self, source: Any, **options: Any) -> Any:
        """Load the autoencoder of a folder or repository in diffusers' layout, for inference."""
        return self._load(self.vae_class, source, "vae", options)

    def make_pipeline(self, denoiser: Any, vae: Any, scheduler: Any) -> Any:
        """Return diffusers' pipeline without its text encoder."""
        parts = {self.denoiser: denoiser, "vae": vae, "scheduler": scheduler}
        return self.pipeline_class(**parts, text_encoder=None, tokenizer=None, **self.without)

    @staticmethod
    def _load(name, source, folder, options):
        cls = getattr(diffusers, name)
        model = cls.from_pretrained(source, subfolder=folder, use_safetensors=True, **options)
        return model.requires_grad_(False).eval()


BASE_MODELS = {
    "stable-diffusion": BaseModel(
        "Stable Diffusion 1.5",
        "StableDiffusionPipeline",
        "unet",
        "UNet2DConditionModel",
        "AutoencoderKL",
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "flux2-klein": BaseModel(
        "FLUX.2 [klein]",
        "Flux2KleinPipeline",
        "transformer",
        "Flux2Transformer2DModel",
        "AutoencoderKLFlux2",
    ),
}
"""Kind of base -> its classes."""


@torch.no_grad()
def draw_grey(
    pipeline: Any,
    embeddings: torch.Tensor,
    empty: torch.Tensor,
    rngs: torch.Generator | list[torch.Generator] | None,
    *,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
    callback: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images by diffusers' pipeline of colour images, and turn them grey.

    Args:
        pipeline: Of `BaseModel.make_pipeline`.
        embeddings: Of the prompt of each image, [B, L, D].
        empty: Of the empty prompt, [L, D].
        rngs: One for the batch, or one for each image.

    Returns:
        The mean of the three channels, float32 [B, 1, R, R] in [-1, 1]; and the colourfulness of
        each image before, float32 [B]: the mean absolute deviation of the channels from their
        mean, in grey levels of which [-1, 1] has 255.

    Raises:
        ValueError: An image is not finite.
    """
    embeddings = embeddings.to(pipeline._execution_device)
    images = pipeline(
        prompt_embeds=embeddings,
        negative_prompt_embeds=empty.to(embeddings).expand_as(embeddings),
        height=resolution,
        width=resolution,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=rngs,
        callback_on_step_end=callback,
        output_type="pt",
    ).images.float()  # [B, 3, R, R] in [0, 1]
    if not torch.isfinite(images).all():
        raise ValueError(
            "An image is not finite (NaN or infinity). The training diverged, or "
            f"{embeddings.dtype} overflowed. Load an earlier checkpoint, or use float32."
        )
    grey = images.mean(dim=1, keepdim=True)
    colourfulness = (images - grey).abs().mean(dim=(1, 2, 3)) * GREY_LEVELS
    return grey * 2 - 1, colourfulness
