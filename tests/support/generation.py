"""Configurations and images of `generate.py` in tests."""

from dataclasses import fields
from pathlib import Path

import numpy as np
from PIL import Image

from em_generation.families import find_family
from em_generation.generate import GenerationConfig


def family_of(model):
    return find_family("ldm" if "ldm" in Path(model).name else "stylegan")


def config_for(model, out, **changes):
    """A configuration; changes that are no fields of it are options of the model's family."""
    family, own = family_of(model), {field.name for field in fields(GenerationConfig)}
    options = {key: value for key, value in changes.items() if key not in own}
    if family.name == "ldm":
        options = {"num_inference_steps": 2} | options
    values = {"num_images": 7, "batch_size": 3, "precision": "no"}
    values |= {key: value for key, value in changes.items() if key in own}
    return GenerationConfig(str(model), str(out), options=family.options(**options), **values)


def read(folder):
    return np.stack(
        [np.asarray(Image.open(p), dtype=int) for p in sorted(Path(folder).glob("[0-9]*.png"))]
    )
