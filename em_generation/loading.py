"""A training run, a saved pipeline or a Hub repository -> what is known of it, and its pipeline."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from em_data.sources.synthetic import SYNTHETIC
from em_generation.families import read_family
from em_hub.transport import HUB_ID
from em_training.config import read_json_object
from em_training.family import Drawer, Family
from em_training.saved_models import check_class_names, check_pipeline, refuse_diverged
from em_training.sources import (
    OTHER_VARIANTS,
    fetch_pipeline_folder,
    find_pipeline_folder,
    say_starts,
)

SOURCES = ("data", "source")  # fields of a configuration that name micrographs
PUBLIC_DATA = ("hub:", "hub-stream:")
_TEXT, _NUMBER, _OBJECT = (str, "a text"), ((int, float), "a number"), (dict, "an object")
RECORD: dict[str, tuple[Any, str]] = {
    "name": _TEXT,
    "preset": _TEXT,
    "note": _TEXT,
    "train_seconds": _NUMBER,
    "num_images_seen": _NUMBER,
    "train_seconds_by_stage": _OBJECT,
    "data": _OBJECT,
    "config": _OBJECT,
    "started_from": _OBJECT,
}
"""Key of a run.json -> (its types, what they are called)."""


@dataclass(frozen=True)
class Model:
    """A trained model, found once; `load` makes its pipeline.

    Attributes:
        source: As the user named it.
        name: That of its run, or of its folder. It may come from others' files: use
            `em_data.files.make_folder_name` before a path is made of it.
        family, kind: What it is, such as "stylegan3-t" of the StyleGANs.
        pipeline_folder: Where model_index.json lies.
        folder: The local folder of the run; None for a model of the package or on the Hub.
        train_seconds, num_images_seen, data, config: From run.json; None or empty if unknown.
        about: The preset, the note and what the run started from, of run.json, where it has them.
    """

    source: str
    name: str
    family: Family
    kind: str
    pipeline_folder: Path
    folder: Path | None
    train_seconds: float | None = None
    num_images_seen: int | None = None
    data: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The kind of model in what people read, such as "StyleGAN3-T"."""
        return self.family.titles[self.kind]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the model's classes by their numbers; () if it has no named classes."""
        path = self.pipeline_folder / "model_index.json"
        names = read_json_object(path).get("id2label") or {}
        check_class_names(path, names)
        return tuple(names[str(number)] for number in range(len(names)))

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weight files that the pipeline loads."""
        return hash_weight_files(self.pipeline_folder)

    def load(self, *, device: Any = "cpu", dtype: Any = None) -> Any:
        """Load the pipeline with the installed class; no code of a repository is run.

        dtype: torch.float32 by default. Raises `ValueError` if a file is damaged or missing.
        """
        import torch

        from em_training.weights import hide_loading_bars

        cls: Any = self.family.import_pipeline()
        check_pipeline(self.pipeline_folder, cls)
        with hide_loading_bars():
            pipeline = cls.from_pretrained(str(self.pipeline_folder), dtype=dtype or torch.float32)
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                refuse_diverged(f"{self.source}: {name}", part)
        return pipeline.to(device)

    def start(self, pipeline: Any, options: Any, **settings: Any) -> Drawer:
        """Return the drawer of this model's pipeline, see `Family.start`."""
        if self.family.reads_run:
            settings["run"] = self.find_sources()
        return self.family.start(pipeline, options, **settings)

    def find_sources(self) -> dict[str, Any]:
        """Return the configuration of the training without names of others' folders.

        A repository of others may name any folder of this machine.
        """
        return {
            key: value
            for key, value in (self.config or {}).items()
            if self.folder or key not in SOURCES or is_public(str(value))
        }


def read_model(source: str) -> Model:
    """Find a model and read what is known of it; a Hub repository is downloaded once.

    Args:
        source: A run's folder, a folder written by `save_pretrained`, the name of a model in the
            package (`em_pretrained.list_models`), or a Hub id (owner/name, owner/name@revision).

    Raises:
        ValueError: `source` is none of the four, its training is not finished, its pipeline is of
            an unknown class, or the Hub cannot be reached or sends damaged files.
    """
    folder = find_pipeline_folder(source)
    run = None if folder is None else Path(source)
    folder = fetch_pipeline_folder(source) if folder is None else folder
    family, kind = read_family(folder)
    path = (run or folder) / "run.json"
    content = read_record(path) if path.is_file() else {}
    name = content.get("name") or Path(source).name
    return Model(
        source,
        str(name),
        family,
        kind,
        folder,
        run,
        content.get("train_seconds"),
        content.get("num_images_seen"),
        content.get("data") or {},
        content.get("config") or {},
        describe_run(content),
    )


def describe_run(content: dict[str, Any]) -> dict[str, Any]:
    """Return what reports say of a run beside its numbers."""
    about = {key: content[key] for key in ("preset", "note") if content.get(key)}
    started = say_starts(content.get("started_from"))
    about |= {"started_from": started} if started else {}
    source = str((content.get("config") or {}).get("data"))
    return about | ({"trained_on": source} if source.startswith("synthetic") else {})


def read_record(path: Path) -> dict[str, Any]:
    """Read a run.json; raise `ValueError` with the path if it is damaged."""
    content = read_json_object(path)
    for key, (kinds, noun) in RECORD.items():
        value = content.get(key)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ValueError(f"{path} is damaged: {key} is {value!r}, but must be {noun}.")
    return content


def is_public(source: str) -> bool:
    """Return whether a run's data mean the same to others: embedded ones, or a set on the Hub."""
    if source.startswith("datasets:"):
        name = source.removeprefix("datasets:")
        return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()
    return source in SYNTHETIC or source.startswith(PUBLIC_DATA)


def load_pipeline(source: str, *, device: Any = "cpu", dtype: Any = None) -> Any:
    """Load the pipeline of a model; see `read_model` and `Model.load`."""
    return read_model(source).load(device=device, dtype=dtype)


def hash_weight_files(folder: Path) -> str:
    """Return the SHA-256 of the weight files of a pipeline's folder.

    A retrained model and another revision are other models. Other variants of the same weights,
    and components that the index does not name, do not count.
    """
    index = read_json_object(folder / "model_index.json")
    used = {name for name, value in index.items() if value != [None, None]}
    digest, has_weights = hashlib.sha256(), False
    for path in sorted(folder.rglob("*.safetensors")):
        if path.relative_to(folder).parts[0] not in used or any(map(path.match, OTHER_VARIANTS)):
            continue
        if not path.is_file():  # a pipe would be read for ever
            raise ValueError(f"{path} is not a regular file. Download or save the model again.")
        has_weights = True
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if not has_weights:
        raise ValueError(f"{folder} holds no weights as safetensors files.")
    return digest.hexdigest()
