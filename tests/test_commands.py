"""The root scripts as a user calls them: help, mistakes, a whole road, kills."""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from em_evaluation.numbers import format_interval
from em_evaluation.wording import find_metric
from em_training import list_checkpoints, load_checkpoint

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def run(*arguments, check=True, environment=None):
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT | (environment or {}),
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def weights_of(run_dir):
    return {
        path.parent.name: load_file(path)
        for path in sorted(Path(run_dir, "pipeline").rglob("*.safetensors"))
    }


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for part in a:
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), f"{part}: {name}"


LARGEST = {"train_lora.py": "klein"}  # preset of a training that has no `paper`
TRAININGS = ["train_ldm.py", "train_gan.py", "train_cyclegan.py", "train_lora.py"]


@pytest.mark.parametrize("script", [*TRAININGS, "generate.py", "evaluate.py"])
def test_help_explains_the_flags(script):
    text = run(script, "--help").stdout
    assert len(text.splitlines()) > 15
    assert "micrograph" in text or "images" in text


@pytest.mark.parametrize("script", TRAININGS)
def test_help_of_a_preset_fits_on_two_screens(script):
    presets = "demo", "small", LARGEST.get(script, "paper")
    for preset in presets:
        lines = run(script, preset, "--help", environment={"COLUMNS": "80"}).stdout.splitlines()
        assert len(lines) <= 2 * 23
        assert max(map(len, lines)) <= 80
        text = "\n".join(lines)
        for flag in ("data", "out", "tiles.resolution", "tiles.downsample", "precision", "seed"):
            assert f"--{flag} " in text
        assert "--push-to-hub REPO" in text
    assert "--tiles.percentiles" in run(script, "small", "--help-all").stdout


@pytest.mark.parametrize("script", ["train_ldm.py", "train_gan.py"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["test", "--tiles.sise", "64"],
            r"no flag --tiles.sise. Did you mean:\n  --tiles.resoluti",
        ),
        (["test", "--resolution=64"], r"no flag --resolution. Did you mean:\n  --tiles.resolution"),
        (["--preset", "small"], r"the preset is the first word, as in `python train_\w+.py demo"),
        (["test", "mine"], r"did you mean --data mine\?"),
        (["smal"], r"no preset 'smal'. Did you mean small\?"),
        (
            ["test", "--tiles.split", "foo"],
            "--tiles.split is foo; choose one of micrograph, specimen, leaky",
        ),
        (["test", "--tiles.seed", "-1"], r"tiles.seed is -1, but must be at least 0. Use --tiles."),
        (["test", "--tiles.resolution", "0"], r"tiles.resolution is 0, but must be greater than 0"),
        (["test", "--seed", "x"], r"--seed is 'x', but must be a whole number\. See"),
        (["test", "--tiles.held-out-fraction", "x"], r"is .x., but must be a number"),
    ],
)
def test_a_typo_is_told_at_once_with_the_nearest_flag(script, words, message):
    """In a few lines, and without importing torch."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}', *{words!r}]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    result = run("-c", code, check=False)
    assert result.returncode == 2
    assert re.search(message, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) <= 8
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("script", ["train_ldm.py", "train_gan.py"])
def test_mistakes_are_one_line(script, tmp_path):
    result = run(
        script, "test", "--data", tmp_path / "nowhere", "--out", tmp_path / "run", check=False
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "nowhere" in result.stderr.splitlines()[-1]
    assert "EM_TRACEBACK" not in result.stderr
    (tmp_path / "empty").mkdir()
    result = run(
        script, "test", "--data", tmp_path / "empty", "--out", tmp_path / "run", check=False
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_the_whole_road_on_a_folder_of_mixed_micrographs(tmp_path):
    """8-bit, 16-bit and broken files of two sizes, as they come: both models, one report."""
    import tifffile

    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(6):
        levels = rng.normal(128, 30, (96, 128 + 32 * (i % 2))).clip(0, 255)
        if i % 2:
            tifffile.imwrite(data / f"m{i}.tif", (levels * 200).astype(np.uint16))
        else:
            Image.fromarray(levels.astype(np.uint8)).save(data / f"m{i}.png")
    (data / "broken.tif").write_bytes(b"II*\0nothing")
    tiles = [
        "--tiles.resolution",
        "32",
        "--tiles.downsample",
        "1",
        "--tiles.cache-dir",
        tmp_path / "cache",
    ]
    ldm = run("train_ldm.py", "test", "--data", data, "--out", tmp_path / "ldm", *tiles)
    assert "broken.tif" in ldm.stdout
    assert "Device: CPU" in ldm.stderr
    flags = ["--data", data, "--out", tmp_path / "gan", "--generator.channel-base", "256", *tiles]
    last_line = run("train_gan.py", "test", *flags).stderr.splitlines()[-1]
    assert str(tmp_path / "gan" / "pipeline") in last_line
    command = f"generate.py --model {tmp_path / 'gan'} --out {tmp_path / 'gan'}-images"
    assert f"Next: python {command} --num-images 1000" in last_line
    assert "images mean nothing" in ldm.stderr.splitlines()[-2]
    assert json.loads((tmp_path / "ldm" / "run.json").read_text())["preset"] == "test"
    drawn = run(*command.split(), "--num-images", "2").stdout  # the line runs as it is printed
    assert f"Next: judge the model by such images: python evaluate.py --models {tmp_path}" in drawn
    other = run("train_gan.py", "test", "--data", data, "--out", tmp_path / "ldm", check=False)
    assert "ldm holds a run of another kind of model; choose another folder" in other.stderr
    other = run("train_gan.py", "demo", "--data", data, "--out", tmp_path / "gan", check=False)
    assert "The run was made with preset test, this is demo." in other.stderr
    assert re.search(r"; and \d+ more\. Train in", other.stderr)
    index = tmp_path / "gan" / "pipeline" / "model_index.json"
    written = index.stat().st_mtime_ns
    again = run("train_gan.py", "test", *flags)
    assert "already complete" in again.stderr
    assert index.stat().st_mtime_ns == written
    result = run(
        "evaluate.py",
        "--models",
        tmp_path / "ldm",
        tmp_path / "gan",
        "--num-images",
        "12",
        "--out",
        tmp_path / "report",
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["LDM", "StyleGAN2"]
    assert report["dataset"]["num_micrographs"] == 6
    kinds = {level["kind"] for level in report["levels"]}
    assert kinds == {"real", "reconstruction", "surrogates", "noise", "untrained"}
    assert all(model["sample_images_per_second"] > 0 for model in report["models"])
    assert "report.html" in result.stdout
    page = (tmp_path / "report" / "report.html").read_text()
    assert format_interval(find_metric(report, "LDM")) in page
    assert "python train_ldm.py test --data" in page  # how to reproduce
    # judged by another split, some of the held-out micrographs were trained on
    other = ["--tiles", "seed=1", "--out", tmp_path / "other", "--num-images", "12"]
    refused = run("evaluate.py", "--models", tmp_path / "ldm", *other, check=False)
    assert refused.returncode == 2
    assert "another split" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("script", ["train_ldm.py", "train_gan.py"])
def test_kill_9_at_random_moments_loses_at_most_the_work_since_the_last_checkpoint(
    script, tmp_path
):
    """Ten kills each, at least one checkpoint later each time; the end equals the uninterrupted run
    to the bit.
    """
    flags = ["--tiles.cache-dir", tmp_path / "cache"]
    if script == "train_ldm.py":
        lengths = ["--autoencoder.num-images", "1600", "--denoiser.num-images", "3200"]
        stages = ["autoencoder", "denoiser"]
    else:
        lengths = ["--training.num-images", "3200"]
        stages = ["stylegan"]
    run(script, "test", "--out", tmp_path / "whole", *flags, *lengths)

    rng = random.Random(0)
    command = [sys.executable, script, "test", "--out", tmp_path / "killed", *flags, *lengths]
    progress, kills = 0, 0

    def count():
        found = [list_checkpoints(tmp_path / "killed" / stage / "checkpoints") for stage in stages]
        return sum(int(paths[-1].name) for paths in found if paths)

    while kills < 10:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and count() == progress:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None:
            break  # it came to its end
        process.kill()
        process.wait()
        kills += 1
        assert count() > progress  # nothing that was saved was lost, and each start went on
        progress = count()
        for stage in stages:
            for path in list_checkpoints(tmp_path / "killed" / stage / "checkpoints"):
                assert load_checkpoint(path)["num_images_seen"] == int(path.name)
    assert kills >= 5
    run(script, "test", "--out", tmp_path / "killed", *flags, *lengths)
    assert_same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))


def test_what_a_training_will_do_is_said_before_and_after_it(tmp_path, monkeypatch, capsys):
    """Preset and data where none was named, the device, what the preset is made for, the end."""
    from em_commands.training import run_training
    from em_diffusion.family import FAMILY

    monkeypatch.setattr("em_diffusion.train.train_ldm", lambda config: None)

    def train(argv):
        monkeypatch.setattr("sys.argv", ["train_ldm.py", *argv, "--out", str(tmp_path / "run")])
        run_training(FAMILY)
        return capsys.readouterr().err

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    unnamed = train([])
    assert unnamed.startswith("No --data given: training on the embedded micrographs (synthetic).")
    assert "No preset was named: preset demo. Presets: " in unnamed
    assert "Device: CPU" in unnamed
    assert "made for" not in unnamed
    assert f"Next: python generate.py --model {tmp_path / 'run'}" in unnamed.splitlines()[-1]
    small = train(["small", "--data", "x"])
    assert "No preset was named" not in small
    assert "Preset small is made for one GPU of 12 GB, but there is no GPU" in small
    assert "`demo` is made for CPUs" in small
    assert "Next:" not in train(["demo", "--last-stage", "autoencoder"])


def test_only_a_demo_for_cpus_is_recommended_without_a_gpu(monkeypatch, capsys):
    """That of LoRA needs a GPU."""
    from em_commands.training import say_what_is_used
    from em_generation.families import FAMILIES

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for_cpus = []
    for family in FAMILIES:
        presets = family.import_presets()
        say_what_is_used(presets["small"](), "small", presets, is_named=True)
        if "`demo` is made for CPUs" in capsys.readouterr().err:
            for_cpus.append(family.name)
    assert set(for_cpus) == {family.name for family in FAMILIES} - {"lora"}


NO_DATA = ["--data", "/nowhere"], "There is no folder '/nowhere'"
ONE_MICROGRAPH = ["--tiles.num-micrographs", "1"], "There is only one micrograph"
NO_GPU = ["--precision", "fp16"], "fp16 needs a GPU"
NO_START = ["--init-from", "nowhere"], "There is no folder nowhere"


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        *((name, *each) for name in ("ldm", "stylegan") for each in (NO_DATA, NO_GPU, NO_START)),
        ("ldm", *ONE_MICROGRAPH),
        ("cyclegan", *NO_DATA),
        ("cyclegan", ["--source", "synthetic-varied"], "are the same tiles"),
        ("lora", ["--precision", "no", "--base", "/nowhere"], "no such folder"),
    ],
)
def test_a_refused_training_leaves_nothing(name, words, message, tmp_path, monkeypatch):
    from em_commands.training import run_training
    from em_generation.families import find_family

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    cache = ["--tiles.cache-dir", str(tmp_path / "cache")]
    (tmp_path / "with-notes").mkdir()
    (tmp_path / "with-notes" / "notes.txt").touch()
    for out in (tmp_path / "runs" / "mine", tmp_path / "with-notes"):
        with pytest.raises(ValueError, match=message):
            run_training(find_family(name), ["test", *words, "--out", str(out), *cache])
    assert not (tmp_path / "runs").exists()
    assert [path.name for path in (tmp_path / "with-notes").iterdir()] == ["notes.txt"]


def test_an_interrupted_training_keeps_what_it_has_made(tmp_path, monkeypatch):
    from em_commands.training import run_training
    from em_generation.families import find_family

    def stop(config):
        (tmp_path / "run" / "latents").mkdir()
        (tmp_path / "run" / "latents" / "train.npy").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("em_diffusion.train.train_ldm", stop)
    with pytest.raises(KeyboardInterrupt):
        run_training(find_family("ldm"), ["test", "--out", str(tmp_path / "run")])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"latents", "preset.txt"}
