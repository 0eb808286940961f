"""Load a saved pipeline as a stranger does, without our packages: run by test_pipeline.py as
`python -I load_elsewhere.py FOLDER OUT`.
"""

import importlib.util
import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline

assert not any(importlib.util.find_spec(name) for name in ("em_stylegan", "em_data", "em_training"))
folder, out = sys.argv[1:]
for source in (folder, f"{out}/again"):
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    images = pipe(batch_size=2, generator=generators, output_type="np").images
    np.save(f"{out}/images_{'first' if source == folder else 'again'}.npy", images)
    assert type(pipe).__module__.startswith("diffusers_modules.")
    pipe.save_pretrained(f"{out}/again")
