"""The built wheel holds the whole project, and its commands run in an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = ["em-look", "em-train-ldm", "em-train-gan", "em-train-cyclegan", "em-train-lora"]
COMMANDS += ["em-generate", "em-evaluate", "em-publish"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
PACKAGES = [*sorted(path.parent.name for path in ROOT.glob("em_*/__init__.py")), "model_cards"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build it from a copy, since setuptools leaves a build/ behind."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = tmp_path_factory.mktemp("built")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source]
    subprocess.run([*PIP, "wheel", *options], check=True)
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel]
    subprocess.run([*PIP, "install", *options], check=True)
    return target


@pytest.fixture
def run(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def call(*words):
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    return call


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    files = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert files <= held
    others = {name.split("/")[0] for name in held - files}
    assert {name.partition("-")[0] for name in others} == {"em_synthesis"}


def test_a_command_trains_and_publishes_in_an_empty_folder(run, installed, tmp_path):
    where = run("-c", "import em_commands, em_hub, model_cards; print(em_hub.__file__)")
    assert where.stdout.startswith(str(installed)), where.stderr
    trained = run(installed / "bin/em-train-gan", "test", "--out", "run")
    assert trained.returncode == 0, trained.stderr[-3000:]
    published = run(installed / "bin/em-publish", "run", "you/em-gan", "--dry-run", "repository")
    assert published.returncode == 0, published.stderr[-3000:]
    assert "micrograph" in (tmp_path / "repository/README.md").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_installed(installed, command):
    script = (installed / "bin" / command).read_text()
    assert f"em_commands.{command.removeprefix('em-').replace('-', '_')}" in script
