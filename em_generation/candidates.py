"""What evaluate.py judges: trained models, and folders or data sets of images, each with a name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from em_data import read_image_folder
from em_data.reading import SUFFIXES
from em_generation.loading import Model, read_model
from em_generation.repeats import group_trainings, read_training

DATASET_FILES = ("state.json", "dataset_dict.json")
DATASET_PREFIXES = ("hub:", "hub-stream:", "datasets:")


@dataclass(frozen=True)
class Candidate:
    """A model or a set of images to judge.

    name: its name in the report. source: as given. model: None for images. images: those of a
    folder or a data set; None for a model. repeat_of, training_seed: as in `ModelImages`.
    """

    name: str
    source: str
    model: Model | None = None
    images: Any = None
    repeat_of: str = ""
    training_seed: str = ""


def name_candidates(sources: Sequence[str]) -> list[Candidate]:
    """Open what --models names, and give each a name of its own.

    A text is SOURCE or NAME=SOURCE. Without a name, a model is called by its kind if it is the only
    one of this kind, else by its run's name; images are called by their folder. Trainings that
    differ in the seed alone belong together, and may share a name.
    """
    if not sources:
        raise ValueError(
            "There is nothing to judge. Name at least one run, pipeline, Hub id or folder of "
            "images with --models."
        )
    given, found = [], []
    for text in sources:
        name, _, source = ("", "", text) if Path(text).exists() else text.rpartition("=")
        given.append(clean_name(name))
        found.append(open_candidate(given[-1], source))
    groups = group_trainings([read_training(each.model) for each in found], given)
    found = name_repeats(found, groups)
    kinds = [each.model.kind for each in found if each.model is not None]
    named: dict[str, Candidate] = {}
    for each in found:
        name = each.name
        if not name and each.model is not None:
            alone = kinds.count(each.model.kind) == 1
            name = each.model.title if alone else clean_name(each.model.name)
        name = name or clean_name(Path(each.source.rpartition(":")[2]).resolve().name) or "images"
        if name in named:
            raise ValueError(
                f"Two models are called {name}. Give one another name: --models NAME={each.source}"
            )
        named[name] = replace(each, name=name)
    return list(named.values())


def name_repeats(found: list[Candidate], groups: list[list[int]]) -> list[Candidate]:
    """Return the candidates, those of each group with its name, their seeds and their own names.

    A group has the name that its runs share, else that of their kind if it holds all of this kind.
    Runs of one name are told apart by their seeds.
    """
    found = list(found)
    kinds = [each.model.kind for each in found if each.model is not None]
    for group in groups:
        members = [(found[i], found[i].model, read_training(found[i].model)) for i in group]
        names = [each.name or clean_name(model.name) for each, model, _ in members if model]
        kind, title = next((model.kind, model.title) for _, model, _ in members if model)
        shared = len(set(names)) < len(names)
        if shared and members[0][0].name:
            title = names[0]
        elif kinds.count(kind) > len(group):
            title = f"{names[0]} and repeats"
        for i, name, (each, _, training) in zip(group, names, members, strict=True):
            seed = training.seed if training else ""
            name = f"{name} (seed {seed})" if shared else name
            found[i] = replace(each, name=name, repeat_of=title, training_seed=seed)
    return found


def open_candidate(name: str, source: str) -> Candidate:
    """Return a model, or the images of a folder or data set."""
    if is_image_set(source):
        return Candidate(name, source, images=read_image_folder(source))
    return Candidate(name, source, model=read_model(source))


def is_image_set(source: str) -> bool:
    """Return whether a source names images and not a model."""
    path = Path(source)
    if str(source).startswith(DATASET_PREFIXES):
        return True
    if not path.is_dir() or any(
        (folder / "model_index.json").is_file() for folder in (path, path / "pipeline")
    ):
        return False
    if any((path / name).is_file() for name in DATASET_FILES):
        return True
    if (path / "config.json").is_file() or (path / "run.json").is_file():
        return False  # a run that is not finished
    return holds_images(path) or any(
        holds_images(each) for each in path.rglob("*") if each.is_dir()
    )


def holds_images(folder: Path) -> bool:
    """Return whether images lie in a folder, not counting its subfolders."""
    return any(
        path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        for path in folder.iterdir()
    )


def refuse_other_splits(candidates: Sequence[Candidate], summary: dict) -> None:
    """Raise `ValueError` for a model that may have been trained on the held-out micrographs.

    The embedded micrographs of one source are none of another source.
    """
    for each in candidates:
        trained = each.model.data or {} if each.model is not None else {}
        source = str(each.model.config.get("data")) if each.model and each.model.config else ""
        if source.startswith("synthetic") and source != summary["source"]:
            continue
        split, cut = trained.get("split_hash"), trained.get("fingerprint")
        if split is not None and split != summary["split_hash"]:
            raise ValueError(
                f"{each.name} was trained on another split ({trained.get('name')}, {split}) than "
                f"this one ({summary['name']}, {summary['split_hash']}), and may have been trained "
                "on its held-out micrographs. Use the --data and --tiles of its training, and "
                "compare only models of one split."
            )
        if cut is not None and cut != summary["fingerprint"]:
            raise ValueError(
                f"{each.name} was trained on tiles of another resolution, downsampling or "
                "intensity than these. Use the --tiles of its training, and compare only models "
                "of one tiling."
            )


def clean_name(name: str) -> str:
    """Return a name on one line, without control characters."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", str(name)).split())
