"""A stranger who loads repositories of several versions into one process, then draws from each: run
by test_versions.py.

`python -I -S stranger_of_versions.py OUT REPO@REVISION...`: OUT gets {name: images}, drawn when all
are loaded, the first loaded last."""

import importlib.util
import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline

assert not any(
    importlib.util.find_spec(name) for name in ("em_diffusion", "em_stylegan", "em_data", "em_hub")
)
out, *names = sys.argv[1:]
pipelines = {}
for name in names:
    repo, revision = name.split("@")
    pipelines[name] = DiffusionPipeline.from_pretrained(
        repo, revision=revision, trust_remote_code=True
    )
    pipelines[name].set_progress_bar_config(disable=True)
images = {}
for name, pipeline in reversed(pipelines.items()):
    assert type(pipeline).__module__.startswith("diffusers_modules."), type(pipeline).__module__
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    images[name] = pipeline(batch_size=2, generator=generators, output_type="np").images
np.savez(out, **images)
