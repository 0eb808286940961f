"""Load an autoencoder for grey images from a folder, the Hub or an original checkpoint."""

from pathlib import Path, PurePosixPath

from diffusers import AutoencoderKL, AutoencoderKLFlux2, VQModel

import em_pretrained
from em_diffusion.em_dalle_vae import EMDalleVAE
from em_diffusion.em_patch_basis import EMPatchBasis
from em_diffusion.em_taming_models import EMGumbelVQModel, EMTamingAutoencoderKL, EMTamingVQModel
from em_diffusion.grey import fold_to_grey
from em_diffusion.original.dalle import find_dalle
from em_diffusion.original.load import load_official_autoencoder
from em_hub.transport import HUB_ID, fetch_repository
from em_training.config import read_json_object
from em_training.em_saved_pipeline import align_weights
from em_training.saved_models import check_model, refuse_diverged

KINDS = {
    VQModel: "VQ",
    AutoencoderKL: "KL",
    AutoencoderKLFlux2: "KL",
    EMTamingVQModel: "VQ",
    EMGumbelVQModel: "Gumbel VQ",
    EMTamingAutoencoderKL: "KL",
    EMDalleVAE: "dVAE",
    EMPatchBasis: "basis",
}
"""Class of an autoencoder -> what it is called."""
CLASSES = {cls.__name__: cls for cls in KINDS}
FOLDERS = ("", "autoencoder/vqvae", "pipeline/vqvae", "vqvae", "vae")
"""Where the autoencoder of a run, a pipeline or a model lies."""
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_autoencoder(source, *, device="cpu", config=None, use_ema=None, revision=None):
    """Load the autoencoder of `source` for grey images.

    A model with three channels is folded to one: it then answers exactly as if the grey image were
    repeated three times and the answer averaged. No code of a checkpoint or repository is executed.

    Args:
        source: Folder of a run, of a pipeline or of a diffusers `VQModel`, `AutoencoderKL` or
            `AutoencoderKLFlux2`; the name of a model in the package (`em_pretrained`); Hub id
            (owner/name) of a pipeline or model; a .ckpt file of taming-transformers or
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
    path = em_pretrained.find(source) or Path(source)
    if path.is_file() or find_dalle(path) is not None:
        model = load_official_autoencoder(path, config, use_ema=use_ema)
    else:
        folder = (
            _find_folder(path, str(path)) if path.is_dir() else _download(str(source), revision)
        )
        cls = CLASSES[_read_class_name(folder / "config.json")]
        check_model(folder, cls)
        model = cls.from_pretrained(folder, use_safetensors=True)
        refuse_diverged(str(source), model)
        model = align_weights(fold_to_grey(model))
    return model.eval().to(device)


def _find_folder(path: Path, name: str) -> Path:
    for folder in FOLDERS:
        if _read_class_name(path / folder / "config.json") in CLASSES:
            return path / folder
    checkpoints = sorted(path.glob("*.ckpt"))
    if checkpoints:
        names = ", ".join(str(checkpoint) for checkpoint in checkpoints[:3])
        raise ValueError(f"{name} holds original checkpoints; name one: {names}")
    raise ValueError(
        f"there is no autoencoder in {name}: expected a run, a pipeline, or the config.json of a "
        f"{' or '.join(CLASSES)}"
    )


def _read_class_name(path: Path) -> str | None:
    name = read_json_object(path).get("_class_name") if path.is_file() else None
    return name if isinstance(name, str) else None


def _download(name, revision) -> Path:
    """Return the cached folder with the autoencoder of a Hub repository."""
    if HUB_ID.fullmatch(name) is None:
        raise ValueError(
            f"there is no file or folder {name}, and it is not a Hub id (owner/name)."
            f"{em_pretrained.suggest(name)}"
        )
    name = name if revision is None else f"{name}@{revision}"
    configs = [str(PurePosixPath(folder) / "config.json") for folder in FOLDERS]
    snapshot = fetch_repository(name, configs)
    folder = _find_folder(snapshot, f"the Hub repository {name}").relative_to(snapshot)
    return fetch_repository(name, [*configs, (folder / WEIGHTS).as_posix()]) / folder
