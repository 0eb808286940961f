"""One set of labels of a folder: which images have labels, and how they are read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from em_data.labels.placing import BadLabels
from em_data.micrograph import Defect, Micrograph
from em_data.split import name_some


@dataclass(eq=False)
class LabelSet:
    """Labels of one form in one place.

    Args:
        name: Name for --tiles.labels: a file, a folder or a pattern of names, below the data.
        form: What it holds, such as "COCO".
        files: {image: files of its labels}, all relative to the folder of the data.
        read: Returns the defects of an image; it may raise `BadLabels`.
        notes: Sentences on labels that are not used.
        recipe: What else decides the defects, such as the names of the kinds.
        look_closer: Returns a `form` that needs a look into the files.
    """

    name: str
    form: str
    files: dict[Path, list[Path]]
    read: Callable[[Path, Micrograph], list[Defect]]
    notes: list[str] = field(default_factory=list)
    recipe: str = ""
    look_closer: Callable[[], str] | None = None

    def describe(self) -> str:
        """Return its name and its form."""
        return f"{self.name} ({self.form}, {len(self.files)} images)"


def attach_labels(labels: LabelSet, path: Path, micrograph: Micrograph, fails: bool) -> None:
    """Add the defects of an image to its micrograph, if it has labels.

    Labels that cannot be used are named in the micrograph's notices, or raise a `ValueError` if
    `fails`.
    """
    if path not in labels.files:
        return
    try:
        micrograph.defects = labels.read(path, micrograph)
    except BadLabels as error:
        if fails:
            raise ValueError(f"{micrograph.name}: its labels in {labels.name}: {error}") from error
        micrograph.metadata["notices"].append(f"labels not used: {error}")


def say_unmatched(what: str, names, some: int = 5) -> list[str]:
    """Return a sentence with the number of labels that belong to no image, if there are any."""
    names = [str(name) for name in names]
    return [f"{len(names)} {what}: {name_some(names, some)}"] if names else []
