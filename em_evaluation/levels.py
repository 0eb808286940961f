"""Reference levels: sets of images whose meaning is known, measured beside the models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from em_data.intensity import to_uint8
from em_evaluation.images import ImageSet, ModelImages, read_images, transform_images
from em_evaluation.surrogates import fraction_outside, phase_randomised_surrogates

LevelName = Literal["real", "reconstruction", "surrogates", "noise"]
LEVELS = get_args(LevelName)  # what may be asked for
Kind = Literal[LevelName, "untrained", "transferred"]


@dataclass(frozen=True)
class ReferenceLevel:
    """One reference level of a report.

    key: its name among the sets of a report. kind: what it is. model: the model that brought it,
    or None if it belongs to all. part: the part of the model that the images passed.
    title, description: for people. images: what is measured.
    """

    key: str
    kind: Kind
    title: str
    description: str
    images: ImageSet = field(repr=False)
    model: str | None = None
    part: str | None = None

    def to_json(self) -> dict:
        """Return all but the images."""
        names = ("key", "kind", "model", "part", "title", "description")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Sets:
    """The images that are compared, at equal numbers."""

    held_out: ImageSet
    train: ImageSet | None
    generated: dict[str, ImageSet]
    levels: tuple[ReferenceLevel, ...]

    @property
    def judged(self) -> dict[str, ImageSet]:
        return self.generated | {level.key: level.images for level in self.levels}

    @property
    def real(self) -> str | None:
        """The key of the reference level "real"."""
        return next((level.key for level in self.levels if level.kind == "real"), None)


def make_levels(
    names: Sequence[str],
    models: Sequence[ModelImages],
    real: ImageSet | None,
    base: ImageSet,
    num_images: int,
    seed: int,
) -> list[ReferenceLevel]:
    """Return the reference levels that `names` ask for and those that the models bring.

    Args:
        names: Some of `LEVELS`.
        models: Models; each may bring reconstructions and images from before its training.
        real: Real images that are not the reference; None leaves out the level "real".
        base: Real images from which reconstructions, surrogates and noise are made.
        num_images: Images of each set.
        seed: Seed of surrogates and noise.
    """
    levels = []
    if "real" in names and real is not None:
        meaning = "other real images: what a perfect model scores"
        levels.append(ReferenceLevel("real", "real", "real images", meaning, real))
    if "reconstruction" in names:
        levels += [
            make_reconstruction(model.name, part, apply, base)
            for model in models
            for part, apply in model.reconstructions.items()
        ]
    if "surrogates" in names:
        levels.append(make_surrogates(base, seed))
    if "noise" in names:
        levels.append(make_noise(base, seed))
    for model in models:
        levels += make_starts(model, num_images)
    return levels


def make_reconstruction(model: str, part: str, apply: Callable, base: ImageSet) -> ReferenceLevel:
    """Send real images through a part of a model, such as its autoencoder."""
    name, images = f"{part} of {model}", transform_images(base, apply)
    meaning = f"real images through the {part} and back: the model can hardly score better"
    return ReferenceLevel(name, "reconstruction", name, meaning, images, model, part)


def make_surrogates(base: ImageSet, seed: int) -> ReferenceLevel:
    """Make images with the power spectrum of real ones and random phases."""
    surrogates = phase_randomised_surrogates(base.batch(range(len(base))), seed)
    clipped = 100 * fraction_outside(surrogates)
    description = (
        "real images with random phases: the right texture without any structure, the level to "
        f"beat ({clipped:.2f} % of the pixels clipped)"
    )
    images = ImageSet(to_uint8(surrogates), base.groups)
    return ReferenceLevel("surrogates", "surrogates", "texture only", description, images)


def make_noise(base: ImageSet, seed: int) -> ReferenceLevel:
    """Draw white noise with the mean and the variance of real images."""
    levels = base.levels
    noise = np.random.default_rng([seed, 3]).normal(levels.mean(), levels.std(), levels.shape)
    images = ImageSet(noise.round().clip(0, 255).astype(np.uint8))
    description = "white noise with the mean and the variance of real images"
    return ReferenceLevel("noise", "noise", "noise only", description, images)


def make_starts(model: ModelImages, num_images: int) -> list[ReferenceLevel]:
    """Return the levels of a model before training: random weights, or those it started from."""
    starts: list[tuple[Kind, str, Any]] = [
        ("untrained", "with random weights, before training", model.untrained),
        ("transferred", "with the weights it started from, before training", model.transferred),
    ]
    return [
        ReferenceLevel(
            f"{model.name} ({kind})",
            kind,
            f"{model.name} before training ({kind})",
            f"images of {model.name} {when}",
            read_images(images, num_images),
            model.name,
        )
        for kind, when, images in starts
        if images is not None
    ]
