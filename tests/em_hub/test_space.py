"""The demo as a Space: what the Hub needs to run it, pushed over a real connection, and started
from what was pushed.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, RepoCard, snapshot_download
from packaging.requirements import Requirement

from em_hub.space import SpaceConfig, list_packages, publish_space

ROOT = Path(__file__).parents[2]


def publish(repo="demo", **options):
    options = {"models": ("you/em-ldm@v1", "you/other", "you/em-gan")} | options
    return publish_space(SpaceConfig(repo, **options), say=lambda text: None)


def run_start(folder, **variables):
    """Run the Space's own file in an interpreter that finds our packages in the Space alone, with a
    page that only tells.
    """
    (folder / "app.py").write_text("import os; print(os.environ['EM_MODELS'])")
    keep = {key: value for key, value in os.environ.items() if not key.startswith("EM_")}
    command = [sys.executable, "-S", "space.py"]
    result = subprocess.run(
        command, cwd=folder, env=keep | variables, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_a_space_is_pushed_whole_and_again(hub, tmp_path):
    assert publish(private=True) == f"{hub.url}/spaces/you/demo"
    assert hub.repos["spaces", "you/demo"].private
    first = set(hub.files("you/demo", kind="spaces"))
    assert {
        "README.md",
        "requirements.txt",
        "app.py",
        "space.py",
        "LICENSE",
        "em_generation/demo.py",
    } <= first
    assert not any("__pycache__" in path or path.startswith(("tests/", "runs/")) for path in first)
    for path in ("app.py", "em_generation/demo.py", "em_evaluation/templates/report.html.j2"):
        assert hub.read("you/demo", path, kind="spaces") == (ROOT / path).read_bytes()
    api = HfApi()
    for path in ("em_hub/gone.py", "notes.md"):
        api.upload_file(
            path_or_fileobj=b"x", path_in_repo=path, repo_id="you/demo", repo_type="space"
        )
    publish(title="Ours")
    assert set(hub.files("you/demo", kind="spaces")) == first | {"notes.md"}
    folder = Path(snapshot_download("you/demo", repo_type="space", local_dir=tmp_path / "space"))
    assert run_start(folder) == "you/em-ldm@v1 you/other you/em-gan"
    # the settings' models, and none beside them
    assert run_start(folder, EM_MODELS="lab/another") == "lab/another"


def test_the_front_matter_and_the_requirements_are_what_the_hub_reads(tmp_path, hub):
    out = Path(publish(dry_run=str(tmp_path / "space")))
    card = RepoCard.load(out / "README.md")
    RepoCard(str(card)).validate(repo_type="space")
    data = card.data.to_dict()
    assert (data["sdk"], data["app_file"], data["license"]) == ("gradio", "space.py", "apache-2.0")
    assert re.fullmatch(r"\d+\.\d+\.\d+", data["sdk_version"])
    assert data["models"] == ["you/em-ldm", "you/other", "you/em-gan"]
    names = {Requirement(line).name for line in (out / "requirements.txt").read_text().splitlines()}
    assert {"torch", "diffusers", "huggingface-hub"} <= names
    assert not names & {"gradio", "pytest", "lpips"}
    assert str(ROOT) not in "".join(path.read_text() for path in out.glob("*.*"))
    with pytest.raises(ValueError, match="not empty"):
        publish(dry_run=str(out))


PROGRAM = """
import runpy, sys
packages, out, names = {packages!r}, {out!r}, {names!r}
sys.path[:0], sys.argv = ["."], ["space.py"]
sys.path += packages
try:
    runpy.run_path("space.py")
finally:
    files = [sys.modules[name].__file__ for name in names if name in sys.modules]
    assert len(files) > 3 and all(file.startswith(out) for file in files), files
"""


@pytest.mark.slow  # imports everything in another interpreter
@pytest.mark.skipif(
    importlib.util.find_spec("gradio") is not None,
    reason="gradio is installed, and the page would open",
)
def test_the_page_starts_from_the_space_alone(tmp_path):
    out = Path(publish(dry_run=str(tmp_path / "space")))
    packages = [path for path in sys.path if path.endswith("site-packages")]
    program = PROGRAM.format(packages=packages, out=str(out), names=list_packages())
    command = [sys.executable, "-I", "-S", "-c", program]
    result = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert "error: The demo needs gradio" in result.stderr.splitlines()[0], result.stderr[-2000:]
    assert result.returncode == 2, result.stderr[-2000:]


def test_what_is_no_space_of_ours_is_refused(tmp_path, hub):
    with pytest.raises(ValueError, match="A Space needs a model"):
        publish(models=())
    with pytest.raises(
        ValueError, match="runs/demo/x/ldm is not a Hub id, and a Space sees no folder of yours"
    ):
        publish(models=("runs/demo/x/ldm",))
    HfApi().create_repo("you/demo", repo_type="space", space_sdk="gradio")
    HfApi().upload_file(
        path_or_fileobj=b"x", path_in_repo="main.py", repo_id="you/demo", repo_type="space"
    )
    with pytest.raises(ValueError, match=r"you/demo holds something else"):
        publish()
