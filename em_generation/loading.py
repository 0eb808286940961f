"""A training run, a saved pipeline or a Hub repository -> a pipeline ready to sample."""

import dataclasses
import json
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_hub.transport import HUB_ID, fetch_repository
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline

PATTERNS = ["*.json", "*/*.json", "*/*.safetensors"]  # of a repository: no code
OTHER_VARIANTS = ["*.bf16.*", "*.bf16-*", "*.fp16.*", "*.fp16-*"]  # of the same weights
PIPELINES = {cls.__name__: cls for cls in (EMLatentDiffusionPipeline, EMStyleGANPipeline)}


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a finished run says of itself in run.json: name, family, seconds, images seen, data; empty fields for a bare pipeline."""

    name: str
    family: str
    train_seconds: float | None
    num_images_seen: int | None
    data: dict
    config: dict
    folder: Path | None


def load_pipeline(
    model: str, *, device="cpu", dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """Load the pipeline of `model`: a run's folder, a folder written by `save_pretrained`, or a Hub id (owner/name, owner/name@revision).

    Only our own installed classes are used; no code is downloaded. Raises `ValueError` when `model` is none of the three, when the
    run is not finished, when the pipeline is of another kind, and when the Hub cannot be reached or sends damaged files.
    """
    source = fetch_pipeline_folder(model)
    class_name = read_class_name(source)
    if class_name not in PIPELINES:
        raise ValueError(
            f"{model} holds a {class_name}; this package samples from {', '.join(PIPELINES)}"
        )
    # the bar over two or three components says nothing; sampling has one of its own
    diffusers.utils.logging.disable_progress_bar()
    pipeline = PIPELINES[class_name].from_pretrained(str(source), dtype=dtype)
    return pipeline.to(device)


def read_class_name(folder: Path) -> str:
    """Return the name of the class that a saved pipeline's model_index.json names."""
    name = DiffusionPipeline.load_config(str(folder))["_class_name"]
    return name[-1] if isinstance(name, list | tuple) else name


def fetch_pipeline_folder(model: str) -> Path:
    """Return the local folder with `model`'s model_index.json; a Hub id's is downloaded once, and found without a network then."""
    folder = find_pipeline_folder(model)
    if folder is not None:
        return folder
    folder = fetch_repository(model, PATTERNS, ignore=OTHER_VARIANTS)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"the Hub repository {model} holds no pipeline (no model_index.json)")
    return folder


def find_pipeline_folder(model: str) -> Path | None:
    """Return the local folder with `model`'s model_index.json, or None where `model` reads as a Hub id (owner/name[@revision])."""
    path = Path(model)
    for folder in (path, path / "pipeline"):
        if (folder / "model_index.json").is_file():
            return folder
    if path.exists():
        raise ValueError(
            f"{model} holds no finished model (no model_index.json); run its training to the end first, with the same command"
        )
    if not HUB_ID.fullmatch(model) or model.startswith((".", "runs/")):
        raise ValueError(
            f"there is no folder {model}, and it is not a Hub id (owner/name or owner/name@revision)"
        )
    return None


def read_run_info(model: str) -> RunInfo:
    """Return what is known of `model` beside its weights; a bare pipeline is known by its name and class only.

    A repository that was published from a run tells of it in its run.json.
    """
    path = Path(model)
    is_on_hub = not (path / "run.json").is_file() and find_pipeline_folder(model) is None
    file = (fetch_pipeline_folder(model) if is_on_hub else path) / "run.json"
    if file.is_file():
        content = json.loads(file.read_text())
        known = {
            key: content.get(key) for key in ("name", "family", "train_seconds", "num_images_seen")
        }
        folder = None if is_on_hub else path
        return RunInfo(
            **known, data=content.get("data", {}), config=content.get("config", {}), folder=folder
        )
    return RunInfo(path.name, "unknown", None, None, {}, {}, path if path.exists() else None)
