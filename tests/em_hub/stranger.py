"""What a person does who has diffusers and never heard of this project: run by test_round_trip.py
in an isolated interpreter.

`python -I -S stranger.py OUT REPO@COMMIT...`: loads each repository by its id and at its commit,
draws, pushes it again from the copy under another name, and loads that."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

assert not any(
    importlib.util.find_spec(name) for name in ("em_diffusion", "em_stylegan", "em_data", "em_hub")
)
out, *names = sys.argv[1:]


def draw(*arguments, **options):
    pipe = DiffusionPipeline.from_pretrained(*arguments, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe).__module__
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe, pipe(batch_size=2, generator=generators, output_type="np").images


for name in names:
    repo, commit = name.split("@")
    images = {}
    pipe, images["main"] = draw(repo)
    _, images["pinned"] = draw(repo, revision=commit)
    _, images["narrow"] = draw(repo, variant="bf16", torch_dtype=torch.bfloat16)
    pipe.push_to_hub(f"{repo}-again")
    _, images["again"] = draw(f"{repo}-again")
    api = HfApi()
    for path in (each for each in api.list_repo_files(repo) if each.endswith(".py")):
        first, again = (
            Path(api.hf_hub_download(each, path)).read_text() for each in (repo, f"{repo}-again")
        )
        assert first == again, path
    np.savez(f"{out}/{repo.split('/')[1]}.npz", **images)
