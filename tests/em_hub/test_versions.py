"""Two repositories of different versions in one process: diffusers puts their files into one folder, under one name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from models import draw, make_ldm, make_stylegan

CHANGES = {  # of the same length: file size and second of writing tell the versions apart no more than their names do
    "ldm": ("pipeline_em_ldm.py", '("pil", "np", "pt", "latent")', '("pil", "np", "p2", "latent")'),
    "stylegan": ("generator/em_stylegan2_generator.py", "x.square()", "x.pow(4.0)"),
}


@pytest.mark.parametrize("order", ["old then new", "new then old"])
@pytest.mark.parametrize("family", ["ldm", "stylegan"])
def test_each_runs_and_saves_its_own_code(family, order, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    name, before, after = CHANGES[family]
    (make_ldm if family == "ldm" else make_stylegan)().save_pretrained(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    code = (tmp_path / "new" / name).read_text()
    assert len(before) == len(after)
    assert before in code
    (tmp_path / "new" / name).write_text(code.replace(before, after))

    names = ["old", "new"] if order == "old then new" else ["new", "old"]
    alone = {}
    for each in names:  # what each does while the other is not there
        alone[each] = run(DiffusionPipeline.from_pretrained(tmp_path / each, trust_remote_code=True), family)
    pipelines = {each: DiffusionPipeline.from_pretrained(tmp_path / each, trust_remote_code=True) for each in names}
    for each, pipeline in pipelines.items():
        np.testing.assert_array_equal(run(pipeline, family), alone[each])
        pipeline.save_pretrained(tmp_path / f"{each} again")
        for path in Path(tmp_path / each).rglob("*.py"):
            assert (tmp_path / f"{each} again" / path.relative_to(tmp_path / each)).read_text() == path.read_text()
    assert not np.array_equal(alone["old"], alone["new"])


def run(pipeline, family):
    """What tells the versions apart: images, or which output types are known."""
    if family == "stylegan":
        return draw(pipeline, 0, 1)
    known = []
    for kind in ("np", "pt", "p2"):
        try:
            pipeline(num_inference_steps=1, output_type=kind)
            known.append(True)
        except ValueError:
            known.append(False)
    return np.array(known)
