"""Images of each class of a model, for the evaluation per class."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from em_evaluation.evaluator import RealImages
from em_evaluation.images import ClassImages
from em_generation.loading import Model


def list_classes(real: RealImages) -> tuple[str, ...]:
    """Return the classes of the micrographs; () if they have none on both sides of the split."""
    sides = [getattr(side, "class_names", ()) for side in (real.train, real.held_out)]
    return sides[0] if all(sides) else ()


def draw_class_images(
    model: Model,
    options: Any,
    known: Sequence[str],
    scales: Sequence[float],
    draw: Callable[[Any, str, int], Any],
    num_images: int,
) -> ClassImages | None:
    """Draw about `num_images` images of the model's classes in turn, as many of each.

    Args:
        model: Asked for those of its classes that are `known`.
        options: Sampling options of its family.
        known: Classes of the data.
        scales: Guidance scales to draw such images at, if the family guides.
        draw: (options, name of a kind of images, number) -> images.

    Returns:
        None for a model with fewer than two known classes, or whose family takes none.
    """
    fields = {field.name for field in dataclasses.fields(model.family.options)}
    names = tuple(name for name in model.class_names if name in known)
    if "classes" not in fields or len(names) < 2:
        return None
    number = max(1, num_images // len(names)) * len(names)
    options = dataclasses.replace(options, classes=names)
    guided = {}
    if "guidance_scale" in fields:
        for scale in scales:
            at_scale = dataclasses.replace(options, guidance_scale=scale)
            guided[scale] = draw(at_scale, f"classes-guidance-{scale:g}", number)
    return ClassImages(names, draw(options, "classes", number), guided)
