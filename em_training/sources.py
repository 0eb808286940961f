"""Find a trained model by its name: a folder, a model of the package, or a Hub repository."""

import json
from pathlib import Path
from typing import Any

import em_pretrained
from em_data.files import write_atomically
from em_hub.transport import HUB_ID, fetch_repository
from em_training.config import read_json_object

PATTERNS = ["*.json", "*/*.json", "*/*.safetensors"]  # of a repository: no code
STARTS, TRAINED_FURTHER = "started_from.json", "trained further"
OTHER_VARIANTS = ["*.bf16.*", "*.bf16-*", "*.fp16.*", "*.fp16-*"]  # of the same weights


def find_pipeline_folder(source: str) -> Path | None:
    """Return the local folder with model_index.json.

    Returns None if `source` names a model in the package or reads as a Hub id.
    """
    path = Path(source)
    for folder in (path, path / "pipeline"):
        if (folder / "model_index.json").is_file():
            return folder
    if path.is_dir() and not (path / "config.json").exists():
        suffixes = {each.suffix.lower() for each in path.iterdir()}
        if suffixes & {".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"}:
            raise ValueError(f"{source} holds images, not a run. Give a run's folder.")
    if path.exists():
        raise ValueError(
            f"{source} holds no finished model (no model_index.json). Finish its training first, "
            "with the same command."
        )
    if em_pretrained.find(source) is not None:
        return None
    if not HUB_ID.fullmatch(source) or source.startswith((".", "runs/")):
        raise ValueError(
            f"There is no folder {source}, and it is not a Hub id (owner/name or "
            f"owner/name@revision).{em_pretrained.suggest(source)}"
        )
    return None


def fetch_pipeline_folder(source: str) -> Path:
    """Return the local folder with model_index.json; download a Hub repository if needed."""
    folder = find_pipeline_folder(source) or em_pretrained.find(source)
    if folder is not None:
        return folder
    folder = fetch_repository(source, PATTERNS, ignore=OTHER_VARIANTS)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"The Hub repository {source} holds no pipeline (no model_index.json).")
    return folder


def describe_origin(source: str) -> dict[str, Any]:
    """Return what a run records of a model that it starts from: "model" and, if known, "license".

    "model" is the name in the package or on the Hub; of a local run, its name without the path.
    """
    path = Path(source)
    if not path.exists():
        folder = em_pretrained.find(source)
        if folder is None:
            folder = fetch_repository(source, ["README.md"])
        name, folders = source, [folder]
    else:
        folders = [path, path / "pipeline"] if path.is_dir() else []
        resolved = path.resolve()
        name = resolved.parent.name if resolved.name == "pipeline" else resolved.name
        if (path / "run.json").is_file():
            name = str(read_json_object(path / "run.json").get("name") or name)
    licenses = filter(None, map(em_pretrained.read_license, folders))
    license = next(licenses, None)
    return {"model": name} | ({"license": license} if license else {})


def write_starts(out: Path, source: str, parts: dict[str, dict[str, Any]]) -> None:
    """Record in a run's folder that `parts` of it start from a trained model.

    parts: {name, such as "autoencoder": {"use": what becomes of it, ...}}.
    """
    origin = describe_origin(source)
    record = read_starts(out) | {name: origin | part for name, part in parts.items()}
    write_atomically(out / STARTS, json.dumps(record, indent=2) + "\n")


def read_starts(out: Path) -> dict[str, Any]:
    """Return {part of a run: what it started from}; {} for a run that began at random."""
    path = out / STARTS
    return read_json_object(path) if path.is_file() else {}


def say_starts(started: dict[str, Any] | None) -> str:
    """Return what a run started from, such as "em-ldm-64's autoencoder (unchanged)"; else ""."""
    by_model: dict[str, list[str]] = {}
    for part, origin in (started or {}).items():
        if isinstance(origin, dict):
            use = origin.get("use", TRAINED_FURTHER)
            words = part if use == TRAINED_FURTHER else f"{part} ({use})"
            by_model.setdefault(str(origin.get("model")), []).append(words)
    return "; ".join(f"{model}'s {' and '.join(parts)}" for model, parts in by_model.items())
