"""The recipes of the study's GAN experiments and of augmentation, at their smallest."""

import json

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def gan(load_recipe):
    return load_recipe("2024_gan_vs_ldm/gan.py")


def test_the_studys_numbers_and_its_best_training(gan):
    best = min(
        (point for points in gan.EXPERIMENTS.values() for point in points if point.study_fid),
        key=lambda p: p.study_fid,
    )
    assert (best.study_fid, best.kimg, best.max_channels, best.mapping_depth) == (
        58.96,
        1200,
        1024,
        4,
    )
    config = gan.make_config(best, gan.parse_arguments(["kimg", "--scale", "study"]))
    paper = gan.make_gan("paper")
    for name in ("generator", "discriminator", "training"):
        assert getattr(config, name) == getattr(paper, name)
    turning = gan.make_config(
        gan.EXPERIMENTS["mapping_depth"][6], gan.parse_arguments(["kimg", "--scale", "study"])
    )
    assert (turning.generator.architecture, turning.generator.max_channels) == ("stylegan3-r", 1024)
    assert turning.training.blur_initial_sigma_px == 10


def test_an_experiment_is_one_file_and_goes_on(gan, arguments, monkeypatch, capsys):
    monkeypatch.setitem(gan.EXPERIMENTS, "kimg", gan.EXPERIMENTS["kimg"][:2])
    arguments = gan.parse_arguments(["kimg", "--scale", "test", *arguments])
    path = gan.run_experiment(arguments)
    result = json.loads(path.read_text())
    first, second = result["points"]
    assert (first["study"], first["settings"]["kimg"], second["settings"]["kimg"]) == (
        141.41,
        200,
        400,
    )
    assert first["difference"] == pytest.approx(first["ours"] - 141.41)
    assert not first["comparable"]
    assert first["num_images_seen"] == 16
    assert "ours tell our points from each other only" in capsys.readouterr().out
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > picture.height
    before = path.read_text()
    monkeypatch.setattr(gan, "train_gan", None)  # nothing is trained twice
    assert gan.run_experiment(arguments).read_text() == before
    arguments.extractor = "inception"
    with pytest.raises(ValueError, match="other extractor"):
        gan.run_experiment(arguments)


def test_a_point_that_another_experiment_has_trained_is_taken_from_there(
    gan, arguments, monkeypatch
):
    last = gan.EXPERIMENTS["max_feature_maps"][-1]
    monkeypatch.setitem(gan.EXPERIMENTS, "max_feature_maps", (last,))
    monkeypatch.setitem(gan.EXPERIMENTS, "kimg", gan.EXPERIMENTS["kimg"][3:4])
    by_kimg = json.loads(
        gan.run_experiment(gan.parse_arguments(["kimg", "--scale", "test", *arguments])).read_text()
    )
    monkeypatch.setattr(gan, "train_gan", None)
    path = gan.run_experiment(
        gan.parse_arguments(["max_feature_maps", "--scale", "test", *arguments])
    )
    (point,) = json.loads(path.read_text())["points"]
    assert point == {**by_kimg["points"][0], "from": "kimg"}
    elsewhere = gan.find_elsewhere(
        point["settings"],
        17,
        gan.parse_arguments(["max_feature_maps", "--scale", "test", *arguments]),
    )
    assert elsewhere is None  # of another length


def test_a_slow_experiment_trains_all_its_points_alike(gan):
    arguments = gan.parse_arguments(["mapping_depth", "--scale", "small"])
    configs = [gan.make_config(point, arguments) for point in gan.EXPERIMENTS["mapping_depth"]]
    assert (
        len({(config.training.num_images, config.training.batch_size) for config in configs}) == 1
    )
    channels = {config.generator.architecture: config.generator.max_channels for config in configs}
    assert channels["stylegan3-r"] == 2 * channels["stylegan3-t"] == 2 * channels["stylegan2"]
    assert len({config.out for config in configs}) == 9


def test_augmentation_is_the_only_difference_and_both_curves_are_kept(load_recipe, tmp_path):
    ada = load_recipe("ada/run.py")
    arguments = ada.parse_arguments(
        [
            "--preset",
            "test",
            "--num-images",
            "32",
            "--evaluate-every",
            "16",
            "--num-evaluation-images",
            "8",
            "--num-train",
            "1",
            "--num-held-out",
            "3",
            "--downsample",
            "4",
            "--runs",
            str(tmp_path / "runs"),
            "--results",
            str(tmp_path),
            "--cache-dir",
            str(tmp_path / "cache"),
        ]
    )
    result = ada.run_experiment(arguments)
    assert json.loads((tmp_path / "ada.json").read_text()) == result
    assert [[point[0] for point in result["curves"][mode]] for mode in ada.MODES] == [[16, 32]] * 2
    assert all(point[2] == 0 for point in result["curves"]["none"])
    assert result["best"]["none"] == min(point[1] for point in result["curves"]["none"])
    assert (result["num_micrographs"], result["num_training_tiles"]) == (4, 4)
    without, adaptive = (ada.make_config(mode, arguments) for mode in ada.MODES)
    assert without.training.augmentation.mode == "none"
    assert without.discriminator == adaptive.discriminator
    with Image.open(tmp_path / "ada.png") as picture:
        assert picture.size == (720, 480)
