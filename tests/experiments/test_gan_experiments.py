"""The recipes of the study's GAN experiments and of augmentation, at their smallest."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2] / "experiments"


def load_script(path):
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gan():
    return load_script(ROOT / "2024_gan_vs_ldm" / "gan.py")


def test_the_studys_numbers_and_its_best_training(gan):
    best = min(
        (point for points in gan.EXPERIMENTS.values() for point in points if point.study_fid), key=lambda p: p.study_fid
    )
    assert (best.study_fid, best.kimg, best.max_channels, best.mapping_depth) == (58.96, 1200, 1024, 4)
    config = gan.make_config(best, gan.parse_arguments(["kimg", "--scale", "study"]))
    paper = gan.PRESETS["paper"]()
    for name in ("generator", "discriminator", "training"):
        assert getattr(config, name) == getattr(paper, name)
    turning = gan.make_config(gan.EXPERIMENTS["mapping_depth"][6], gan.parse_arguments(["kimg", "--scale", "study"]))
    assert (turning.generator.architecture, turning.generator.max_channels) == ("stylegan3-r", 1024)
    assert turning.training.blur_initial_sigma_px == 10


def test_an_experiment_is_one_file_and_goes_on(gan, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gan.EXPERIMENTS, "kimg", gan.EXPERIMENTS["kimg"][:2])
    arguments = gan.parse_arguments(
        ["kimg", "--scale", "test", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]
    )  # fmt: skip
    path = gan.run_experiment(arguments)
    result = json.loads(path.read_text())
    first, second = result["points"]
    assert (first["study"], first["settings"]["kimg"], second["settings"]["kimg"]) == (141.41, 200, 400)
    assert first["difference"] == pytest.approx(first["ours"] - 141.41)
    assert not first["comparable"]
    assert first["num_images_seen"] == 16
    assert "compare our points with each other only" in capsys.readouterr().out
    before = path.read_text()
    monkeypatch.setattr(gan, "train_gan", None)  # nothing is trained twice
    assert gan.run_experiment(arguments).read_text() == before
    arguments.extractor = "inception"
    with pytest.raises(ValueError, match="another extractor"):
        gan.run_experiment(arguments)


def test_augmentation_is_the_only_difference_and_both_curves_are_kept(tmp_path):
    ada = load_script(ROOT / "ada" / "run.py")
    arguments = ada.parse_arguments(
        ["--preset", "test", "--num-held-out", "1", "--num-images", "32", "--evaluate-every", "16", "--num-evaluation-images", "8",
         "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]
    )  # fmt: skip
    result = ada.run_experiment(arguments)
    assert json.loads((tmp_path / "ada.json").read_text()) == result
    assert [[point[0] for point in result["curves"][mode]] for mode in ada.MODES] == [[16, 32]] * 2
    assert all(point[2] == 0 for point in result["curves"]["none"])
    assert result["best"]["none"] == min(point[1] for point in result["curves"]["none"])
    assert result["num_micrographs"] == 2
    with Image.open(tmp_path / "ada.png") as picture:
        assert picture.size == (720, 480)
