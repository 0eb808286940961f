"""Training state on disk: safetensors and JSON, written whole or not at all, never pickled.

A checkpoint is a folder named by its number of images seen. It is written under a temporary name,
flushed to the disk and renamed, so that a kill or a power cut leaves only whole checkpoints. A
checksum of each file finds later damage.
"""

import json
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from em_data.files import replace_folder

TENSORS, STATE, CHECKSUMS = "tensors.safetensors", "state.json", "checksums.json"


def save_checkpoint(
    folder: str | Path, num_images_seen: int, state: dict, *, keep: int = 2
) -> Path:
    """Write `state` as `folder`/NUM_IMAGES_SEEN and keep the newest `keep` checkpoints.

    state: Nested dicts and lists of tensors, numbers, strings and None.

    Raises:
        OSError: In one sentence, when it cannot be written; earlier checkpoints stay.
    """
    folder = Path(folder)
    target = folder / f"{num_images_seen:012d}"
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with replace_folder(target) as temporary:
            _write(temporary, state)
    except (OSError, SafetensorError) as error:
        last = list_checkpoints(folder)
        where = (
            f"The last good checkpoint is {last[-1]}." if last else "There is no checkpoint yet."
        )
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"The checkpoint {target} cannot be written: {reason}. {where} Free "
            "space or repair the disk and run the same command again."
        ) from error
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    return target


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(p for p in Path(folder).glob("[0-9]" * 12) if p.is_dir())


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint; its tensors lie in aligned memory, as kernels may round otherwise.

    Raises:
        ValueError: With its name, when it is damaged.
    """
    path = Path(path)
    try:
        checksums = json.loads((path / CHECKSUMS).read_text())
        for name in (TENSORS, STATE):
            if _checksum(path / name) != checksums[name]:
                raise ValueError(f"{name} has changed since it was written")
        tensors = load_file(path / TENSORS)
        tensors = {name: tensors.pop(name).clone() for name in list(tensors)}
        return _unflatten(json.loads((path / STATE).read_text()), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged ({error}); remove that folder to resume from the one "
            "before it"
        ) from error


def _write(folder: Path, state: dict) -> None:
    tensors: dict[str, torch.Tensor] = {}
    tree = _flatten(state, "", tensors)
    save_file(tensors, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(tree))
    checksums = {name: _checksum(folder / name) for name in (TENSORS, STATE)}
    (folder / CHECKSUMS).write_text(json.dumps(checksums))


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _remove(path: Path) -> None:
    """Delete a checkpoint, after renaming it: a kill must not leave half of it under its name."""
    shutil.rmtree(path.rename(path.with_name(f".removed-{path.name}")))


def _flatten(value, name: str, tensors: dict):
    """Return `value` as JSON data; its tensors move to `tensors`, replaced by {"tensor": name}."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        items = [[key, _flatten(item, f"{name}/{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
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
