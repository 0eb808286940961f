"""The pretrained models that are tuned, behind one interface: what their trainings differ in."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, Flux2KleinPipeline

from em_stable_diffusion.base_source import INDEX, BaseSource
from em_training.config import read_json_object
from em_training.weights import hide_loading_bars

NUM_TRAIN_TIMESTEPS = 1000


class Base(ABC):
    """A base that is tuned, at a place where it was found.

    Attributes:
        targets: Linear layers that get adapters by default, by the ends of their names.
        density, is_continuous: How timesteps are drawn, see `draw_timesteps`.
        encoding: Arguments of the pipeline's `encode_prompt` beside the prompt.
    """

    targets: ClassVar[tuple[str, ...]]
    density: ClassVar[Literal["uniform", "logit_normal"]]
    is_continuous: ClassVar[bool]
    encoding: ClassVar[dict[str, Any]]

    def __init__(self, source: BaseSource):
        self.source = source
        self.model = source.model

    def load_denoiser(self) -> Any:
        """Load the denoiser, frozen, float32."""
        with hide_loading_bars():
            variant = self.source.find_variants().get(self.model.denoiser)
            return self.model.load_denoiser(self.source.folder, variant=variant)

    def outline_denoiser(self) -> Any:
        """Return the denoiser without memory for its weights."""
        cls = getattr(diffusers, self.model.denoiser_class)
        config = cls.load_config(self.source.folder, subfolder=self.model.denoiser)
        with torch.device("meta"):
            return cls.from_config(config)

    def load_vae(self) -> Any:
        """Load the autoencoder, frozen, float32."""
        with hide_loading_bars():
            variant = self.source.find_variants().get("vae")
            return self.model.load_vae(self.source.folder, variant=variant)

    def load_scheduler(self) -> Any:
        """Load the sampler."""
        return self._load_pipeline(text_encoder=None, tokenizer=None).scheduler

    @torch.no_grad()
    def encode_prompts(self, texts: list[str]) -> torch.Tensor:
        """Return the embeddings of prompts, float32 [P, L, D]; load the text encoder and drop it.

        The text encoder of a repository is downloaded now. It computes on the CPU, so that the
        device needs no room for it, and encodes one by one, so that none depends on the others.
        """
        self.source.fetch_text_encoder()
        variant = self.source.find_variants("text_encoder").get("text_encoder")
        pipeline = self._load_pipeline(variant=variant)
        return torch.cat([pipeline.encode_prompt(text, **self.encoding)[0] for text in texts])

    @abstractmethod
    def encode(self, vae: Any, images: torch.Tensor) -> torch.Tensor:
        """Return latents [B, C, h, w] in the autoencoder's scale of images [B, 1, R, R] in [-1, 1].

        A grey image is three equal channels. Latents are the means of their posterior.
        """

    @abstractmethod
    def find_scale(self, vae: Any) -> tuple[list[float], list[float]]:
        """Return what brings latents to the denoiser's scale: mean and deviation of C channels."""

    @abstractmethod
    def compute_losses(
        self,
        denoiser: Any,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
    ) -> torch.Tensor:
        """Return the mean squared error of what the denoiser predicts, float32 [B].

        Args:
            latents, noise: Float32 [B, C, h, w]; latents are in the denoiser's scale.
            timesteps: [B] in 0 to 1000, int64 or, if `is_continuous`, float32.
            embeddings: Of the prompts, [B, L, D].
        """

    @property
    @abstractmethod
    def factor(self) -> int:
        """The number that the sides of images must be multiples of."""

    @property
    def is_distilled(self) -> bool:
        """Whether the base draws in few steps because it was distilled."""
        return bool(read_json_object(self.source.folder / INDEX).get("is_distilled"))

    def count_levels(self, part: str) -> int:
        """Return the number of resolutions of a part's network, from its config.json."""
        config = read_json_object(self.source.folder / part / "config.json")
        return len(config["block_out_channels"])

    def _load_pipeline(self, variant=None, **parts):
        """Load the text encoder, float32, and what belongs to it."""
        parts |= {self.model.denoiser: None, "vae": None, **self.model.without}
        with hide_loading_bars():
            return self.model.pipeline_class.from_pretrained(
                self.source.folder,
                use_safetensors=True,
                variant=variant,
                dtype=torch.float32,
                **parts,
            )


class StableDiffusion(Base):
    """Stable Diffusion 1.5's class: a U-Net with cross-attention, and the noise of DDPM.

    From Rombach et al. 2022, arXiv:2112.10752.
    """

    targets = ("to_q", "to_k", "to_v", "to_out.0")
    density, is_continuous = "uniform", False
    encoding: ClassVar = {
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }

    def __init__(self, source: BaseSource):
        super().__init__(source)
        self.noise_schedule = DDPMScheduler.from_pretrained(source.folder, subfolder="scheduler")

    def encode(self, vae, images):
        return vae.encode(images.expand(-1, 3, -1, -1)).latent_dist.mode()

    def find_scale(self, vae):
        config, channels = vae.config, vae.config.latent_channels
        return [config.get("shift_factor") or 0.0] * channels, [
            1 / config.scaling_factor
        ] * channels

    def compute_losses(self, denoiser, latents, noise, timesteps, embeddings):
        """The target is the noise, or the velocity if the base's scheduler says so."""
        schedule, dtype = self.noise_schedule, denoiser.dtype
        noisy = schedule.add_noise(latents, noise, timesteps)
        is_velocity = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(latents, noise, timesteps) if is_velocity else noise
        predicted = denoiser(noisy.to(dtype), timesteps, embeddings.to(dtype)).sample
        losses = F.mse_loss(predicted.float(), target, reduction="none")
        return losses.mean(dim=(1, 2, 3))

    @property
    def factor(self):
        return 2 ** (self.count_levels("vae") + self.count_levels("unet") - 2)


class Flux2Klein(Base):
    """FLUX.2 [klein]'s class: an MMDiT, and flow matching.

    Targets as Esser et al. 2024, arXiv:2403.03206: noise - latents, at noise levels whose logits
    are normal.
    """

    targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out")
    density, is_continuous = "logit_normal", True
    encoding: ClassVar = {"device": "cpu"}

    def encode(self, vae, images):
        latents = vae.encode(images.expand(-1, 3, -1, -1)).latent_dist.mode()
        return Flux2KleinPipeline._patchify_latents(latents)

    def find_scale(self, vae):
        mean, variance = vae.bn.running_mean, vae.bn.running_var
        return mean.tolist(), (variance + vae.config.batch_norm_eps).sqrt().tolist()

    def compute_losses(self, denoiser, latents, noise, timesteps, embeddings):
        """The target is noise - latents at the level s = timestep / 1000."""
        pipeline, dtype, device = Flux2KleinPipeline, denoiser.dtype, latents.device
        level = timesteps / NUM_TRAIN_TIMESTEPS  # [B]
        s = level.view(-1, 1, 1, 1)
        noisy = pipeline._pack_latents((1 - s) * latents + s * noise)  # [B, h w, C]
        target = pipeline._pack_latents(noise - latents)
        predicted = denoiser(
            hidden_states=noisy.to(dtype),
            timestep=level.to(dtype),
            guidance=None,
            encoder_hidden_states=embeddings.to(dtype),
            txt_ids=pipeline._prepare_text_ids(embeddings).to(device),
            img_ids=pipeline._prepare_latent_ids(latents).to(device),
        ).sample
        return F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2))

    @property
    def factor(self):
        return 2 ** self.count_levels("vae")  # one more than its halvings: patches of 2 x 2


BASES: dict[str, type[Base]] = {"stable-diffusion": StableDiffusion, "flux2-klein": Flux2Klein}
"""Kind of base -> how it is tuned."""


def open_base(source: BaseSource) -> Base:
    """Return how a base that was found is tuned."""
    return BASES[source.kind](source)
