"""Two repositories of different versions in one process: diffusers puts their files into one
folder, under one name.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import HfApi

from support.hub_server import make_environment
from support.models import MAKERS, draw, make_ldm, make_stylegan

# of the same length: file size and second of writing tell the versions apart no more than their
# names do
CHANGES = {
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
        alone[each] = run(
            DiffusionPipeline.from_pretrained(tmp_path / each, trust_remote_code=True), family
        )
    pipelines = {
        each: DiffusionPipeline.from_pretrained(tmp_path / each, trust_remote_code=True)
        for each in names
    }
    for each, pipeline in pipelines.items():
        np.testing.assert_array_equal(run(pipeline, family), alone[each])
        pipeline.save_pretrained(tmp_path / f"{each} again")
        for path in Path(tmp_path / each).rglob("*.py"):
            assert (
                tmp_path / f"{each} again" / path.relative_to(tmp_path / each)
            ).read_text() == path.read_text()
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


# ---------------------------------------------------------------- over the Hub

SEEN = {  # changes that are seen in the images, of the same length, too
    "ldm": ("pipeline_em_ldm.py", "images.float() / 2 + 0.5", "images.float() / 4 + 0.5"),
    "stylegan": CHANGES["stylegan"],
}


def push_versions(tmp_path):
    """Two versions of each family on the Hub: in two repositories, and in one as its main and its
    branch `old`.
    """
    api, names = HfApi(), []
    for family, (path, before, after) in SEEN.items():
        MAKERS[family]().save_pretrained(tmp_path / family)
        for repo in ("old", "new", "both"):
            api.create_repo(f"you/{family}-{repo}")
        api.create_branch(f"you/{family}-both", branch="old")
        old = [f"you/{family}-old@main", f"you/{family}-both@old"]
        new = [f"you/{family}-new@main", f"you/{family}-both@main"]
        for name in (*old, *new):
            code = (tmp_path / family / path).read_text()
            if name == new[0]:
                assert len(before) == len(after)
                assert code.count(before) == 1
                (tmp_path / family / path).write_text(code.replace(before, after))
            repo, revision = name.split("@")
            api.upload_folder(repo_id=repo, folder_path=tmp_path / family, revision=revision)
            names.append(name)
    return names


@pytest.mark.parametrize("family", SEEN)
def test_repositories_of_different_versions_in_one_process(family, tmp_path, hub, monkeypatch):
    """Of one person who trusts them all: each draws by its own code, whichever was loaded last."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    names = [name for name in push_versions(tmp_path) if name.startswith(f"you/{family}-")]
    pipelines = []
    for name in (*names, *reversed(names)):  # again, when the others' code lies where its own lay
        repo, revision = name.split("@")
        pipeline = DiffusionPipeline.from_pretrained(
            repo, revision=revision, trust_remote_code=True
        )
        pipeline.set_progress_bar_config(disable=True)
        pipelines.append((name, pipeline))
    images = [(name in names[2:], draw(pipeline, 0, 1)) for name, pipeline in pipelines]
    expected = dict(images)  # of the old version and of the new one
    assert not np.array_equal(*expected.values())
    for is_new, each in images:
        np.testing.assert_array_equal(each, expected[is_new])


@pytest.mark.slow  # interpreters of their own
def test_a_stranger_runs_each_repositorys_own_code(tmp_path, hub):
    """Isolated from our packages: what each draws beside the others is what it draws in a process
    of its own.
    """
    names = push_versions(tmp_path)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    program = (
        f"import sys, runpy; sys.path += {packages!r}; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0])"
    )
    script = Path(__file__).with_name("stranger_of_versions.py")

    def draw_as_stranger(out, *names):
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program, str(script), str(tmp_path / out), *names],
            cwd=tmp_path,
            env=make_environment(hub, tmp_path / f"home of {out}"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return np.load(tmp_path / out)

    together = draw_as_stranger("together.npz", *names)
    for i, name in enumerate(
        ("you/ldm-old@main", "you/ldm-new@main", "you/stylegan-old@main", "you/stylegan-new@main")
    ):
        alone = draw_as_stranger(f"alone {i}.npz", name)[name]
        same = [each for each in names if np.array_equal(together[each], alone)]
        repo, version = name.split("@")[0].rsplit("-", 1)
        assert same == [name, f"{repo}-both@{'main' if version == 'new' else 'old'}"]
