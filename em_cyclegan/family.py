"""Unpaired translation as a `Family`: what the commands need to know about it."""

from dataclasses import dataclass
from pathlib import Path

from em_training.config import read_json_object
from em_training.family import Card, Family

TITLES = {"cyclegan": "CycleGAN", "cut": "CUT"}


@dataclass(frozen=True)
class TranslationOptions:
    """Sampling options of translations."""

    source: str | None = None
    """Micrographs to translate, cut as the source of the training was: a folder, "synthetic", or
    any other source of the training commands. Default: the source of the training. Image i shows
    tile i, in an order that the seed decides."""
    untranslated: bool = False
    """Write the tiles as they are, for comparison with their translations."""


def read_kind(folder: Path) -> str:
    """Return "cyclegan", or "cut" for a model without a way back."""
    back = read_json_object(folder / "model_index.json").get("generator_b_to_a")
    return "cyclegan" if isinstance(back, list) and back[:1] != [None] else "cut"


def describe_card(pipeline) -> dict:
    """Return what only this family's card needs."""
    generator = pipeline.generator_a_to_b.config
    return {
        "num_blocks": generator.num_blocks,
        "has_way_back": pipeline.generator_b_to_a is not None,
    }


FAMILY = Family(
    name="cyclegan",
    titles=TITLES,
    pipeline="em_cyclegan.pipeline_em_translation:EMTranslationPipeline",
    options=TranslationOptions,
    stages=("cyclegan",),
    card=Card(
        "cyclegan.md.j2",
        "em_cyclegan",
        "cyclegan",
        "CycleGAN",
        describe_card,
        task="image-to-image",
        samples_by_drawer=True,
    ),
    drawer="em_cyclegan.drawing:TranslationDrawer",
    read_kind=read_kind,
    draws_layouts=True,
    reads_run=True,
    script="train_cyclegan.py",
    presets="em_cyclegan.presets:PRESETS",
    train="em_cyclegan.train:train_cyclegan",
)
