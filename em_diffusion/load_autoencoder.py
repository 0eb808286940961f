"""Load an autoencoder for grey images from a folder, the Hub or an original checkpoint."""

import json
import re
from pathlib import Path

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
"""Class of an autoencoder -> what it is called."""
CLASSES = {cls.__name__: cls for cls in KINDS}
FOLDERS = ("", "autoencoder/vqvae", "pipeline/vqvae", "vqvae", "vae")
"""Where the autoencoder of a run, a pipeline or a model lies."""
HUB_FOLDERS = ("", "vqvae", "vae")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_autoencoder(source, *, device="cpu", config=None, use_ema=None, revision=None):
    """Load the autoencoder of `source` for grey images.

    A model with three channels is folded to one: it then answers exactly as if the grey image were
    repeated three times and the answer averaged. No code of a checkpoint or repository is executed.

    Args:
        source: Folder of a run, of a pipeline or of a diffusers `VQModel` or `AutoencoderKL`; Hub
            id (owner/name) of a pipeline or model; a .ckpt file of taming-transformers or
            latent-diffusion; or a folder with DALL-E's encoder.pkl and decoder.pkl.
        config: The yaml of a .ckpt file. Default: the yaml beside it.
        use_ema: Which weights of a .ckpt file, as in `em_diffusion.original.load.load_official`.
        revision: Branch, tag or commit of a Hub repository.

    Returns:
        The model (a key of `KINDS`), float32, in evaluation mode, for images [B, 1, H, W] in [-1,
        1]. Use it with `encode`, `decode` and `find_codes` of `em_diffusion.autoencoder`.

    Raises:
        ValueError: If `source` is none of these or cannot be read.
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
    return model.eval().to(device)


def _find_folder(path: Path) -> Path:
    for name in FOLDERS:
        if _read_class_name(path / name / "config.json") in CLASSES:
            return path / name
    checkpoints = sorted(path.glob("*.ckpt"))
    if checkpoints:
        names = ", ".join(str(checkpoint) for checkpoint in checkpoints[:3])
        raise ValueError(f"{path} holds original checkpoints; name one: {names}")
    raise ValueError(
        f"there is no autoencoder in {path}: expected the folder of a run, of a pipeline, or one "
        f"with the config.json of a {' or '.join(CLASSES)}"
    )


def _read_class_name(path: Path) -> str | None:
    try:
        contents = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return contents.get("_class_name") if isinstance(contents, dict) else None


def _download(repository: str, revision) -> Path:
    """Return the cached folder with the autoencoder of a Hub repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(
            f"there is no file or folder {repository}, and it is not a Hub id (owner/name)"
        )
    try:
        for folder in HUB_FOLDERS:
            options = {"subfolder": folder or None, "revision": revision}
            try:
                config = Path(hf_hub_download(repository, "config.json", **options))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
            if _read_class_name(config) in CLASSES:
                hf_hub_download(repository, WEIGHTS, **options)
                return config.parent
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{repository} is no file or folder, and cannot be downloaded from the Hub: {reason}"
        ) from error
    raise ValueError(
        f"the Hub repository {repository} has no autoencoder: expected the config.json of a "
        f"{' or '.join(CLASSES)} in it, or in its folder vqvae or vae."
    )
