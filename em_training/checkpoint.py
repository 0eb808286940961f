"""Training state on disk: safetensors and JSON, written whole or not at all, never pickled.

A checkpoint is a folder named by its number of images seen. It is written under a temporary name, flushed to the disk, and renamed, so a
kill at any moment leaves the folders that were there before or those and one more whole one.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def save_checkpoint(folder, num_images_seen: int, state: dict, *, keep: int = 2) -> Path:
    """Write `state` (nested dicts and lists of tensors, numbers, strings, None) as `folder`/NUM_IMAGES_SEEN and keep the newest `keep`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder / f".tmp-{num_images_seen:012d}-{os.getpid()}"
    temporary.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    tree = _flatten(state, "", tensors)
    save_file(tensors, temporary / "tensors.safetensors")
    size = (temporary / "tensors.safetensors").stat().st_size
    (temporary / "state.json").write_text(json.dumps({"tensors_bytes": size, "state": tree}))
    for name in ("tensors.safetensors", "state.json"):
        _flush_to_disk(temporary / name)
    target = folder / f"{num_images_seen:012d}"
    if target.exists():
        _remove(target)
    temporary.rename(target)
    _flush_to_disk(folder)
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    return target


def list_checkpoints(folder) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(p for p in Path(folder).glob("[0-9]" * 12) if p.is_dir())


def load_checkpoint(path) -> dict:
    """Read one checkpoint back; raises `ValueError` that names it when it is damaged."""
    path = Path(path)
    try:
        content = json.loads((path / "state.json").read_text())
        if (path / "tensors.safetensors").stat().st_size != content["tensors_bytes"]:
            raise ValueError("its tensors are not of the size written")
        tensors = load_file(path / "tensors.safetensors")
        return _unflatten(content["state"], tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged ({error}); remove that folder to go on from the one before it"
        ) from error


def _remove(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a kill halfway leaves no half of one under it."""
    doomed = path.with_name(f".tmp-removed-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _flatten(value, name: str, tensors: dict):
    """Return `value` as JSON data, its tensors moved to `tensors` and replaced by {"tensor": name}."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            "dict": [[key, _flatten(item, f"{name}/{key}", tensors)] for key, item in value.items()]
        }
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state '{name}' holds a {type(value).__name__}, which a checkpoint cannot")


def _unflatten(tree, tensors: dict):
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    items = [_unflatten(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _flush_to_disk(path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
