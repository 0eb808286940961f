"""Any autoencoder, from wherever it lies, as one that takes and gives grey images."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from em_diffusion.em_dalle_vae import EMDalleVAE
from em_diffusion.em_taming_models import EMGumbelVQModel, EMTamingAutoencoderKL, EMTamingVQModel
from em_diffusion.grey import fold_to_grey
from em_diffusion.original.dalle import find_dalle
from em_diffusion.original.load import load_official_autoencoder
from em_diffusion.pipeline_em_ldm import align_weights

KINDS = {
    VQModel: "VQ",
    AutoencoderKL: "KL",
    EMTamingVQModel: "VQ",
    EMGumbelVQModel: "Gumbel VQ",
    EMTamingAutoencoderKL: "KL",
    EMDalleVAE: "dVAE",
}
"""Classes that are read, and what they are called."""
CLASSES = {cls.__name__: cls for cls in KINDS}
FOLDERS = ("", "autoencoder/vqvae", "pipeline/vqvae", "vqvae", "vae")
"""Where a run, a pipeline or a model has its autoencoder."""
HUB_FOLDERS = ("", "vqvae", "vae")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Autoencoder:
    """An autoencoder for images [B, 1, H, W] in [-1, 1]; what it is made of does not matter to the caller.

    model: the network, one channel at both ends, in evaluation mode; `model.config` is its configuration.
    kind: "VQ", "Gumbel VQ", "dVAE" or "KL".
    num_codes: vectors in its codebook; None without one.
    """

    model: torch.nn.Module
    kind: str
    num_codes: int | None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode(self, images):
        """Latents of images [B, 1, H, W] in [-1, 1] and the codes they fall on: (float32 [B, C, h, w], int64 [B, h, w] or None).

        The latents are the encoder's, before quantisation, in the autoencoder's own scale: what a diffusion model learns. A
        KL autoencoder gives the mean of its posterior, a dVAE the codes themselves.
        """
        images = images.to(self.device, self.model.dtype)
        if self.num_codes is None:
            return self.model.encode(images).latent_dist.mode().float(), None
        latents = self.model.encode(images).latents.float()
        return latents, self.find_codes(latents)

    @torch.no_grad()
    def find_codes(self, latents):
        """The codes that latents [B, C, h, w] fall on: int64 [B, h, w]."""
        indices = self.model.quantize(latents.to(self.device, self.model.dtype))[2][2]
        return indices.reshape(len(latents), *latents.shape[2:])

    @torch.no_grad()
    def decode(self, latents):
        """Images of latents as `encode` gives them, quantised on the way where there are codes: float32 [B, 1, H, W] in [-1, 1]."""
        return (
            self.model.decode(latents.to(self.device, self.model.dtype)).sample.float().clamp(-1, 1)
        )


def load_autoencoder(
    source, *, device="cpu", config=None, use_ema=None, revision=None
) -> Autoencoder:
    """Load the autoencoder of `source`, float32, for grey images.

    source: a run's folder, a pipeline's, or one with a diffusers `VQModel` or `AutoencoderKL`; the Hub id (owner/name) of one of
        the last two; a .ckpt of taming-transformers or latent-diffusion; or a folder with DALL-E's encoder.pkl and decoder.pkl.
    config: the yaml of a .ckpt, if it does not lie beside it.
    use_ema: which weights of a .ckpt, as in `load_official`.
    revision: branch, tag or commit of a Hub repository.

    One with three channels is folded to one: exactly what repeating the grey image and averaging the answer gives. No code
    of a checkpoint or a repository is run. Raises `ValueError` that names the source and the way out when it is none of these.
    """
    path = Path(source)
    if path.is_file() or find_dalle(path) is not None:
        model = load_official_autoencoder(path, config, use_ema=use_ema)
    else:
        folder = _find_folder(path) if path.is_dir() else _download(str(source), revision)
        cls = CLASSES[_read_class_name(folder / "config.json")]
        try:
            model = cls.from_pretrained(folder, use_safetensors=True)
        except OSError as error:
            raise ValueError(
                f"{source} has no weights that can be read: {' '.join(str(error).split())}"
            ) from error
        model = align_weights(fold_to_grey(model))
    return Autoencoder(
        model.eval().to(device), KINDS[type(model)], model.config.get("num_vq_embeddings")
    )


def _find_folder(path: Path) -> Path:
    for name in FOLDERS:
        if _read_class_name(path / name / "config.json") in CLASSES:
            return path / name
    checkpoints = sorted(path.glob("*.ckpt"))
    raise ValueError(
        f"{path} holds original checkpoints; name one: {', '.join(str(checkpoint) for checkpoint in checkpoints[:3])}"
        if checkpoints
        else f"there is no autoencoder in {path}: expected a run's folder, a pipeline's, or one with the config.json of a "
        f"{' or '.join(CLASSES)}"
    )


def _read_class_name(path: Path) -> str | None:
    try:
        contents = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return contents.get("_class_name") if isinstance(contents, dict) else None


def _download(repository: str, revision) -> Path:
    """The folder of the local cache with the autoencoder of a Hub repository: its configuration and its weights alone."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(
            f"there is no file or folder {repository}, and it is not a Hub id (owner/name)"
        )
    try:
        for folder in HUB_FOLDERS:
            try:
                config = Path(
                    hf_hub_download(
                        repository, "config.json", subfolder=folder or None, revision=revision
                    )
                )
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
            if _read_class_name(config) in CLASSES:
                hf_hub_download(repository, WEIGHTS, subfolder=folder or None, revision=revision)
                return config.parent
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{repository} is no file or folder, and cannot be fetched from the Hub: {reason}"
        ) from error
    raise ValueError(
        f"the Hub repository {repository} has no autoencoder: expected the config.json of a {' or '.join(CLASSES)} in it, or in "
        "its folder vqvae or vae."
    )
