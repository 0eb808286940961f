"""A training run, a saved pipeline or a Hub repository -> a pipeline ready to sample."""

import dataclasses
import json
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline

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
    model: str, *, device="cpu", dtype: torch.dtype = torch.float32, revision: str | None = None
) -> DiffusionPipeline:
    """Load the pipeline of `model`: a run's folder, a folder written by `save_pretrained`, or a Hub id.

    Only our own installed classes are used; no downloaded code is executed. Raises `ValueError` when `model` is none of the three, when the
    run is not finished, or when the pipeline is of another kind.
    """
    folder = find_pipeline_folder(model)
    source = str(folder) if folder is not None else model
    index = DiffusionPipeline.load_config(source, revision=revision)
    class_name = index["_class_name"]
    class_name = class_name[-1] if isinstance(class_name, list | tuple) else class_name
    if class_name not in PIPELINES:
        raise ValueError(f"{model} holds a {class_name}; this package samples from {', '.join(PIPELINES)}")
    # the bar over two or three components says nothing; sampling has one of its own
    diffusers.utils.logging.disable_progress_bar()
    pipeline = PIPELINES[class_name].from_pretrained(source, dtype=dtype, revision=revision)
    return pipeline.to(device)


def find_pipeline_folder(model: str) -> Path | None:
    """Return the local folder with `model`'s model_index.json, or None where `model` reads as a Hub id ("owner/name")."""
    path = Path(model)
    for folder in (path, path / "pipeline"):
        if (folder / "model_index.json").is_file():
            return folder
    if path.exists():
        raise ValueError(
            f"{model} holds no finished model (no model_index.json); run its training to the end first, with the same command"
        )
    if model.count("/") != 1 or model.startswith((".", "/", "runs/")):
        raise ValueError(f"there is no folder {model}, and it is not a Hub id (owner/name)")
    return None


def read_run_info(model: str) -> RunInfo:
    """Return what is known of `model` beside its weights; a bare pipeline or Hub id is known by its name and class only."""
    path = Path(model)
    file = path / "run.json"
    if file.is_file():
        content = json.loads(file.read_text())
        known = {key: content.get(key) for key in ("name", "family", "train_seconds", "num_images_seen")}
        return RunInfo(**known, data=content.get("data", {}), config=content.get("config", {}), folder=path)
    find_pipeline_folder(model)
    return RunInfo(path.name, "unknown", None, None, {}, {}, path if path.exists() else None)
