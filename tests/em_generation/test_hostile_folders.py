"""Runs in folders with hostile names, with links and with pipes, given to every command."""

import importlib
import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from em_generation.loading import read_model
from em_training.cli import run_command
from support.models import MAKERS

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="such names and pipes are POSIX's"),
    pytest.mark.timeout(600),
    # gradio leaves event loops behind
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
NAMES = ["a\x1b[31mb\nc", "$x$_{y}", "<b>`c`|d]", "\u202ereversed" + "a" * 180]
COMMANDS = {  # module: (kind of model, words)
    "em_commands.generate": ("ldm", ["--model", "{model}", "--out", "{out}", "--num-images", "1"]),
    "em_commands.publish": (
        "ldm",
        ["{model}", "me/x", "--dry-run", "{out}", "--num-samples", "1"],
    ),
    "em_stylegan.interpolate": (
        "stylegan",
        ["truncation", "{model}", "{out}/t.png", "--num-rows", "1", "--psi", "0.5"],
    ),
    "em_stylegan.project": (
        "stylegan",
        ["{micrograph}", "{model}", "--out", "{out}", "--num-steps", "1"],
    ),
    "em_diffusion.select_autoencoder": (
        "ldm",
        ["--candidates", "{model}", "--out", "{out}", "--num-images", "8"]
        + ["--tiles.resolution", "16", "--tiles.num-synthetic", "3"]
        + ["--tiles.micrograph-size", "64", "--tiles.cache-dir", "{out}/cache"],
    ),
    "app": ("stylegan", ["--models", "{model}"]),
}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call a command; return (exit code, all that it has printed)."""

    def run(command, model, micrograph=None):
        if micrograph is None:
            micrograph = tmp_path / "micrograph.png"
            levels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
            Image.fromarray(levels).save(micrograph)
        before = list_others(tmp_path)
        names = {"model": model, "out": tmp_path / "out", "micrograph": micrograph}
        words = [word.format(**names) for word in COMMANDS[command][1]]
        monkeypatch.setattr("sys.argv", [f"{command}.py", *words])
        if command == "app":
            gradio = pytest.importorskip("gradio")
            monkeypatch.setattr(gradio.Blocks, "launch", lambda *_, **__: None)
        capsys.readouterr()
        start, code = time.monotonic(), 0
        try:
            run_command(importlib.import_module(command).main)
        except SystemExit as end:
            code = end.code
        text = "".join(capsys.readouterr())
        assert "Traceback" not in text, text
        assert time.monotonic() - start < 300
        assert list_others(tmp_path) == before
        return code, text

    return run


def save(command, folder):
    MAKERS[COMMANDS[command][0]]().save_pretrained(folder)
    return folder


def list_others(folder):
    """All paths below a folder and beside it but those of results, out and out-preview.png."""
    paths = [*folder.rglob("*"), *folder.parent.iterdir()]
    return {path for path in paths if not str(path).startswith(str(folder / "out"))}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_hostile_folder_name_is_harmless(call, tmp_path, command, name):
    model = save(command, tmp_path / name)
    if command != "em_commands.publish":  # whose card needs more facts
        (model / "run.json").write_text(json.dumps({"name": f"../../{name}"}))
    code, text = call(command, model)
    assert code == 0, text
    assert "\x1b" not in text
    assert "\u202e" not in text
    if command == "em_commands.publish":
        card = (tmp_path / "out" / "README.md").read_text()
        assert "<b>" not in card.split("---", 2)[2]  # below the metadata
        assert "\x1b" not in card
        assert len([line for line in card.splitlines() if line.startswith("# ")]) == 1


def replace_by_pipe(path):
    os.mkfifo(path)


def replace_by_endless_device(path):
    path.symlink_to("/dev/zero")


def replace_by_folder(path):
    path.mkdir()


def replace_by_link_to_itself(path):
    path.symlink_to(path.name)


REPLACED = [
    replace_by_pipe,
    replace_by_endless_device,
    replace_by_folder,
    replace_by_link_to_itself,
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("replace", REPLACED[:2], ids=lambda each: each.__name__)
def test_what_is_no_file_is_refused_and_never_read(call, tmp_path, command, replace):
    model = save(command, tmp_path / "model")
    (path,) = model.glob("vqvae/config.json" if (model / "vqvae").is_dir() else "*/config.json")
    path.unlink()
    replace(path)
    code, text = call(command, model)
    assert code == 2, text
    assert "config.json" in text or command == "em_diffusion.select_autoencoder"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("replace", REPLACED, ids=lambda each: each.__name__)
def test_any_file_of_a_model_that_is_no_file_is_refused(tmp_path, kind, replace):
    MAKERS[kind]().save_pretrained(tmp_path / "model")
    files = [*tmp_path.glob("model/*/*.json"), *tmp_path.glob("model/*/*.safetensors")]
    for path in [tmp_path / "model" / "model_index.json", *files]:
        path.rename(tmp_path / "kept")
        replace(path)
        with pytest.raises((ValueError, OSError)):
            read_model(str(tmp_path / "model")).load()
        if path.suffix == ".safetensors":
            with pytest.raises((ValueError, OSError)):
                read_model(str(tmp_path / "model")).weights_sha256  # noqa: B018
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        (tmp_path / "kept").rename(path)


@pytest.mark.parametrize("replace", REPLACED, ids=lambda each: each.__name__)
def test_a_micrograph_that_is_no_file_is_not_projected(call, tmp_path, replace):
    replace(tmp_path / "m\x1b[31m.png")
    model = save("em_stylegan.project", tmp_path / "model")
    code, text = call("em_stylegan.project", model, tmp_path / "m\x1b[31m.png")
    assert code == 2
    assert "\x1b" not in text
    assert "m\\x1b[31m.png" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_a_huge_configuration_is_not_read(call, tmp_path, command):
    model = save(command, tmp_path / "model")
    for path in model.rglob("config.json"):
        with path.open("wb") as file:
            file.truncate(2**36)  # a sparse file
    code, text = call(command, model)
    assert code == 2
    assert "more than 67,108,864 bytes" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_links_of_a_model_are_followed_to_files(call, tmp_path, command):
    """As in the cache of the Hub; nothing is written through them."""
    model = save(command, tmp_path / "model")
    for i, path in enumerate(path for path in model.rglob("*") if path.is_file()):
        path.rename(tmp_path / f"blob-{i}")
        path.symlink_to(tmp_path / f"blob-{i}")
    before = {path: path.read_bytes() for path in tmp_path.glob("blob-*")}
    code, text = call(command, model)
    assert code == 0, text
    assert {path: path.read_bytes() for path in before} == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
