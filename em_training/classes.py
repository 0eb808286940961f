"""Classes of generated images by name, for the drawers of all families."""

from collections.abc import Sequence
from typing import Any

from em_training.family import Control


def assign_classes(
    pipeline: Any, classes: Sequence[str], numbers: Sequence[int]
) -> list[int] | None:
    """Return the class of each of the images `numbers`: `classes` in turn, by the image's number.

    Args:
        pipeline: Has `labels`, {name: number of the class}, and `num_classes`.
        classes: Names or numbers of classes, as --classes has them; empty for no choice.
        numbers: Numbers of images.

    Returns:
        Numbers of classes, or None for no choice.

    Raises:
        ValueError: The model does not have such a class.
    """
    if not classes:
        return None
    ids = [find_class(pipeline, name) for name in classes]
    return [ids[number % len(ids)] for number in numbers]


def name_classes(pipeline: Any, classes: Sequence[str], numbers: Sequence[int]) -> list[str] | None:
    """Return the name of the class of each image, its number as text if it has none.

    Arguments and errors are those of `assign_classes`.
    """
    ids = assign_classes(pipeline, classes, numbers)
    names = {number: name for name, number in pipeline.labels.items()} if ids else {}
    return None if ids is None else [names.get(each, str(each)) for each in ids]


def find_class(pipeline: Any, name: str, flag: str = "--classes") -> int:
    """Return the number of a class from its name, or from its number as text."""
    labels, num_classes = pipeline.labels, pipeline.num_classes
    if name in labels:
        return labels[name]
    if name.isdecimal() and int(name) < num_classes:
        return int(name)
    if not num_classes:
        raise ValueError(f"{flag} is {name}, but the model has no classes. Leave it out.")
    known = ", ".join(labels) if labels else f"the numbers 0 to {num_classes - 1}"
    raise ValueError(f"{flag} has {name}, but the model's classes are {known}.")


def list_class_controls(pipeline: Any, default: str) -> tuple[Control, ...]:
    """Return the demo's choice of a class, for a model with classes.

    default: What the model draws without a choice, such as "any".
    """
    if not pipeline.num_classes:
        return ()
    names = list(pipeline.labels) or [str(number) for number in range(pipeline.num_classes)]
    choices: dict[str, tuple[str, ...]] = {default: ()}
    if len(names) > 1:
        choices["each in turn"] = tuple(names)
    choices |= {name: (name,) for name in names}
    return (
        Control(
            "classes", "Class", "choice", default, help="Class of the images.", choices=choices
        ),
    )
