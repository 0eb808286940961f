"""Load a saved pipeline as a stranger does, without our packages: run by
test_pipeline_components.py in an isolated interpreter.
"""

import importlib.util
import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline

assert not any(
    importlib.util.find_spec(name) for name in ("em_diffusion", "em_data", "em_training")
)
folder, out = sys.argv[1:]
for name, source in {"first": folder, "again": f"{out}/again"}.items():
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    np.save(
        f"{out}/images_{name}.npy",
        pipe(batch_size=2, generator=generators, output_type="np").images,
    )
    assert type(pipe).__module__.startswith("diffusers_modules.")
    pipe.save_pretrained(f"{out}/again")
