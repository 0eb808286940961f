"""What evaluate.py judges, by which micrographs, and what it prints; folders of images through the
command.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import em_stylegan
from em_commands.generate import say_evaluation
from em_data import DataConfig, read_image_folder, write_image
from em_data.synthetic_micrographs import synthesise_micrographs
from em_diffusion.family import LDMOptions
from em_generation import candidates as candidates_module
from em_generation.candidates import (
    Candidate,
    clean_name,
    is_image_set,
    name_candidates,
)
from em_generation.evaluate import (
    EvaluationConfig,
    check_writable,
    cut_large,
    evaluate_runs,
    find_data,
    refuse_other_splits,
)
from em_generation.extractors import create_extractors, pair_weights
from em_generation.families import find_family, make_options
from em_generation.generate import GenerationConfig
from em_generation.loading import Model
from em_generation.reproduce import hide_path, list_commands
from em_hub.publish import PublishConfig
from em_stylegan import train_gan
from em_training.flags import parse_flags

ROOT = Path(__file__).parents[2]


def info(name="run", kind="ldm", **changes):
    values = {"pipeline_folder": None, "folder": None, "data": {}, "config": {}} | changes
    return Model("source", name, find_family(kind), kind, **values)


@pytest.fixture
def runs(monkeypatch):
    infos = {
        "a/ldm": info(
            "ldm",
            folder=Path("a/ldm"),
            config={"data": "here", "tiles": {"resolution": 64, "split": "specimen"}},
        ),
        "b/ldm": info("other", data={"name": "set", "split_hash": "1"}),
        "c/gan": info("gan", "stylegan2"),
    }
    monkeypatch.setattr(candidates_module, "read_model", infos.__getitem__)
    return infos


def names(*sources):
    return [each.name for each in name_candidates(sources)]


def test_models_are_named_by_family_while_that_is_clear(runs):
    assert names("a/ldm", "c/gan") == ["LDM", "StyleGAN2"]
    assert names("a/ldm", "b/ldm", "c/gan") == ["ldm", "other", "StyleGAN2"]
    assert names("mine=a/ldm", "c/gan") == ["mine", "StyleGAN2"]
    with pytest.raises(ValueError, match="Two models are called x"):
        name_candidates(("x=a/ldm", "x=c/gan"))
    with pytest.raises(ValueError, match="nothing to judge"):
        name_candidates(())


def test_names_from_outside_are_one_line():
    assert clean_name(" a\nb\x1b[31m\tc ") == "a b [31m c"


def test_data_is_that_of_the_run_unless_flags_say_else(runs):
    models = name_candidates(("a/ldm", "c/gan"))
    config = EvaluationConfig(models=())
    assert find_data(config, models) == ("here", DataConfig(resolution=64, split="specimen"))
    config = EvaluationConfig(
        models=(), data="there", tiles=("resolution=32", "cache_dir=null", "intensity=full")
    )
    assert find_data(config, models) == (
        "there",
        DataConfig(resolution=32, split="specimen", intensity="full"),
    )
    with pytest.raises(ValueError, match="--data MICROGRAPHS or --reference FOLDER"):
        find_data(EvaluationConfig(models=()), name_candidates(("c/gan",)))
    with pytest.raises(ValueError, match="Did you mean 'resolution'"):
        find_data(EvaluationConfig(models=(), tiles=("resolutoin=32",)), models)
    with pytest.raises(ValueError, match="--tiles takes KEY=VALUE, such as resolution=64"):
        find_data(EvaluationConfig(models=(), tiles=("resolution",)), models)


def test_a_model_of_another_split_is_refused(runs):
    models = name_candidates(("b/ldm",))
    refuse_other_splits(models, {"name": "set", "split_hash": "1"})
    with pytest.raises(ValueError, match="another split"):
        refuse_other_splits(models, {"name": "set", "split_hash": "2"})


def test_weights_go_to_the_extractor_that_they_name():
    assert pair_weights(("w=1.pt",), ("inception",)) == {
        "inception": "w=1.pt"
    }  # a path may hold a sign of equality
    assert pair_weights(("dinov2=folder", "inception=w.pt"), ("inception", "dinov2")) == {
        "dinov2": "folder",
        "inception": "w.pt",
    }
    with pytest.raises(ValueError, match="EXTRACTOR=PATH with one of inception, dinov2"):
        pair_weights(("w.pt",), ("inception", "dinov2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extractors": ()}, "one or more names"),
        ({"extractors": ("inception", "inception")}, "each once"),
        ({"resize_mode": "clean"}, "--resize-mode clean belongs to inception"),
        ({"resize_mode": "own"}, "--resize-mode own belongs to dinov2, clip, timm"),
        ({"metrics": ("fid",)}, "Unknown metrics: fid. Choose from frechet_distance"),
        ({"metrics": ("cmmd",)}, "Add the extractor clip"),
    ],
)
def test_mistakes_in_the_flags_show_before_anything_long(changes, message):
    with pytest.raises(ValueError, match=message):
        create_extractors(EvaluationConfig(models=("a",), **changes), 64, "cpu")


@pytest.mark.parametrize("flags", [["--levels", "ceiling"], ["--feature-precision", "fp8"]])
def test_unknown_choices_are_refused_by_the_command(flags):
    done = evaluate("--models", "a", *flags, cwd=ROOT)
    assert done.returncode == 2
    assert flags[1] in done.stderr


def test_extractors_take_their_own_options():
    config = EvaluationConfig(
        models=("a",), input_px=96, feature_precision="bf16", metrics=("kernel_distance",)
    )
    (extractor,) = create_extractors(config, 64, "cpu")
    assert "96 x 96" in extractor.identity
    assert extractor.dtype is torch.bfloat16


def test_comparing_reports_evaluates_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least two reports"):
        evaluate_runs(EvaluationConfig(compare=(str(tmp_path),)))
    with pytest.raises(ValueError, match="in another call"):
        evaluate_runs(EvaluationConfig(models=("a",), compare=("b", "c")))
    with pytest.raises(ValueError, match=r"not a report\.json of evaluate\.py"):
        evaluate_runs(EvaluationConfig(compare=(str(tmp_path), str(tmp_path))))


def test_folders_that_cannot_be_written_are_told_before_the_work(tmp_path, runs):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"file.* cannot be written .* with --out"):
            check_writable(folder, "--out")
    with pytest.raises(ValueError, match=r"Name another folder with --cache-dir"):
        evaluate_runs(
            EvaluationConfig(
                models=("a/ldm",), out=str(tmp_path / "out"), cache_dir=str(tmp_path / "file")
            )
        )


# ---------------------------------------------------------------- folders of images


def cut(seed, num, side=32):
    micrographs = synthesise_micrographs(num, seed, size=2 * side)
    corners = [(y, x) for y in (0, side) for x in (0, side)]
    return [each.image[y : y + side, x : x + side] for each in micrographs for y, x in corners]


def write_images(folder, images, suffix=".png", bits=8):
    folder.mkdir()
    for i, image in enumerate(images):
        path = folder / f"{i:03d}{suffix}"
        if suffix == ".jpg":
            Image.fromarray(image).save(path, quality=95)
        else:
            write_image(torch.from_numpy(image).float() / 127.5 - 1, path, bits=bits)
    return folder


def write_dataset(folder, images):
    rows = {"image": [Image.fromarray(image) for image in images]}
    datasets.Dataset.from_dict(rows).save_to_disk(folder)
    return folder


def evaluate(*words, cwd, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "evaluate.py", *map(str, words)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real images and generated ones in every form that is read."""
    folder = tmp_path_factory.mktemp("folders")
    write_images(folder / "real", cut(0, 16))
    images = cut(1, 8)
    write_images(folder / "png", images)
    write_images(folder / "tiff16", images, ".tif", bits=16)
    write_images(folder / "jpeg", images, ".jpg")
    (folder / "nested").mkdir()
    write_images(folder / "nested" / "part", images)
    write_dataset(folder / "rows", images)
    return folder, images


def test_images_of_every_form_are_read_alike(folders, tmp_path):
    folder, images = folders
    expected = torch.from_numpy(np.stack(images)).float()[:, None] / 127.5 - 1
    for name in ("png", "tiff16", "jpeg", "nested", "rows"):
        assert is_image_set(str(folder / name))
        read = read_image_folder(str(folder / name))
        assert len(read) == 32
        tolerance = 0.2 if name == "jpeg" else 1e-4
        torch.testing.assert_close(read.batch([3, 0]), expected[[3, 0]], atol=tolerance, rtol=0)
    (tmp_path / "config.json").write_text("{}")
    assert not is_image_set(str(tmp_path))  # a training that is not finished


def test_any_folder_is_judged_by_the_command(folders, tmp_path):
    folder, _ = folders
    words = ["--models", "theirs=png", "16 bit=tiff16", "jpeg", "rows", "--reference", "real"]
    words += ["--num-images", "32", "--out", tmp_path / "report", "--cache-dir", tmp_path / "cache"]
    done = evaluate(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["theirs", "16 bit", "jpeg", "rows"]
    rows = report["measurements"][0]["rows"]
    value = rows["theirs"]["held_out"]["frechet_distance"]["value"]
    assert rows["16 bit"]["held_out"]["frechet_distance"]["value"] == pytest.approx(value, rel=1e-3)
    assert rows["rows"]["held_out"] == rows["theirs"]["held_out"]
    assert "real" in rows  # the other half of the reference
    assert report["memorisation"] is None
    assert "Memorisation is not measured: the training images are not known" in done.stdout
    page = (tmp_path / "report" / "report.html").read_text()
    assert "python evaluate.py --models theirs=png" in page
    assert "--reference real" in page
    assert str(tmp_path) not in page.replace(str(tmp_path / "report"), "")
    assert "theirs: fidelity" in done.stdout
    assert str(tmp_path / "report" / "report.html") in done.stdout


def test_a_folder_is_judged_beside_a_run(tmp_path):
    run = replace(em_stylegan.PRESETS["test"](), out=str(tmp_path / "run"))
    run = replace(run, tiles=replace(run.tiles, cache_dir=str(tmp_path / "cache")))
    train_gan(run)
    side = run.tiles.resolution
    write_images(tmp_path / "theirs", cut(3, 4, side))
    words = ["--models", "theirs", "run", "--num-images", "16", "--out", "out"]
    done = evaluate(*words, "--cache-dir", "cache", "--no-microscopy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["theirs", "StyleGAN2"]
    assert report["memorisation"] is None or "theirs" in report["memorisation"]["pixels"]["sets"]
    training, evaluation = report["reproduce"]
    assert training.startswith("python train_gan.py test --data synthetic")
    assert training.endswith("--out run")
    assert evaluation.startswith("python evaluate.py --models theirs=theirs StyleGAN2=run")
    assert str(tmp_path) not in json.dumps(report["reproduce"])
    command = "python publish.py run run --evaluation out --private"
    assert f"Next: publish a model with its numbers: {command}" in done.stdout
    words = shlex.split(command)[2:]
    (publish,) = parse_flags([PublishConfig], words, command="", positional=("run", "repo"))
    assert (publish.repo, publish.evaluation, publish.private) == ("run", "out", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "nothing"], "nothing"),
        (["--models", "png"], "--data MICROGRAPHS or --reference FOLDER"),
        (["--models", "png", "--reference", "nothing"], "nothing"),
        (["--models", "png", "--reference", "small"], "16 x 16 pixels, but not png (32 x 32)"),
        (["--models", "mixed", "--reference", "real"], "16 x 16"),
        (["--models", "png", "png", "--reference", "real"], "Two models are called png"),
    ],
)
def test_what_cannot_be_judged_is_told_in_a_sentence(words, message, folders, tmp_path):
    folder, images = folders
    if not (folder / "small").exists():
        write_images(folder / "small", cut(2, 4, 16))
        write_images(folder / "mixed", [*images[:8], *cut(2, 1, 16)])
    done = evaluate(*words, "--out", tmp_path / "out", "--num-images", "12", cwd=folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_commands_hold_no_private_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert hide_path(str(tmp_path / "runs" / "a")) == "runs/a"
    assert hide_path("/home/somebody/secret/set") == "set"
    assert hide_path("x=/home/somebody/set") == "x=set"
    assert hide_path("../elsewhere/set") == "set"
    assert hide_path("hub:owner/name") == "hub:owner/name"
    config = EvaluationConfig(
        models=("a",), data="/home/somebody/set", microscopy=False, tiles=("resolution=64",)
    )
    (command,) = list_commands(config, [Candidate("my model", "/home/somebody/a", images=[])])
    assert command == (
        "python evaluate.py --models 'my model=a' --data set --num-images 1000 "
        "--tiles resolution=64 --no-microscopy --out runs/evaluation"
    )


def test_a_folder_of_whole_micrographs_is_cut_like_the_tiles_of_a_run(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(folder / f"{i}.png")
    images, said = read_image_folder(folder), []
    config = DataConfig(resolution=16, downsample=2, cache_dir=str(tmp_path / "cache"))
    tiles = cut_large("theirs", str(folder), images, config, said.append)
    assert tiles.batch(range(2)).shape == (2, 1, 16, 16)
    assert "3 images of 64 x 64 px, cut into 12 tiles of 16 px, averaged 2 x 2" in said[-1]
    same = replace(config, resolution=64)
    assert cut_large("theirs", str(folder), images, same, said.append) is images
    too_large = replace(config, resolution=128)
    with pytest.raises(ValueError, match="at least 256 px a side"):
        cut_large("theirs", str(folder), images, too_large, said.append)


def test_the_next_command_after_generation_samples_alike():
    options = LDMOptions(num_inference_steps=20, scheduler="ddim", grain=False)
    config = GenerationConfig("runs/my ldm", "out", options=options)
    words = shlex.split(say_evaluation(config))
    assert words[:2] == ["python", "evaluate.py"]
    (evaluation,) = parse_flags([EvaluationConfig], words[2:], command="evaluate.py")
    assert evaluation.models == ("runs/my ldm",)
    assert make_options([find_family("ldm")], evaluation.sampling)["ldm"] == options
    bare = GenerationConfig("run", "out", options=LDMOptions())
    assert say_evaluation(bare) == "python evaluate.py --models run"
