"""The recipe of the package's models and the measure of their worth, at their smallest."""

import json

import pytest
from PIL import Image

import em_pretrained
from em_generation.loading import load_pipeline, read_model
from support.models import draw

NAMES = {"em-ldm-64": "denoiser", "em-stylegan2-64": "stylegan"}


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("pretrained/recipe.py")


@pytest.fixture(scope="module")
def worth(load_recipe):
    return load_recipe("pretrained/worth.py")


def test_the_data_are_not_the_demos(recipe):
    for make in (recipe.make_ldm, recipe.make_stylegan2):
        assert make().tiles.seed == make("test").tiles.seed == 0 != recipe.MICROGRAPH_SEED


def read_width(path):
    with Image.open(path) as file:
        return file.width


@pytest.mark.slow  # five trainings and an evaluation
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_made_judged_and_is_a_start(
    recipe, worth, name, arguments, tmp_path, monkeypatch, capsys
):
    box = tmp_path / "box"
    words = [name, "--preset", "test", "--num-images", "12", "--box", str(box), *arguments]
    folder = recipe.make_model(recipe.parse_arguments(words))
    assert folder == box / name
    card = (folder / "README.md").read_text()
    for part in (
        "license: apache-2.0",
        f'load_pipeline("{name}")',
        "synthetic",
        "Evaluation",
    ):
        assert part in card
    assert "trust_remote_code" not in card
    record = json.loads((folder / "run.json").read_text())
    assert (record["name"], record["config"]["data"]) == (name, recipe.DATA)
    assert record["config"]["tiles"]["seed"] == recipe.MICROGRAPH_SEED
    report = json.loads((tmp_path / "results" / name / "report.json").read_text())
    assert report["models"][0]["info"]["weights_sha256"] == read_model(str(folder)).weights_sha256
    assert read_width(tmp_path / "results" / name / "images.png") >= 512
    assert (tmp_path / "results" / name / f"{NAMES[name]}.jsonl").is_file()
    assert (folder / "discriminator").is_dir() == (name == "em-stylegan2-64")

    monkeypatch.setattr("em_pretrained.box.FOLDER", box)
    assert em_pretrained.list_models() == [name]
    assert draw(load_pipeline(name), 0).shape == (1, 32, 32, 1)
    section = {"em-ldm-64": "denoiser", "em-stylegan2-64": "training"}[name]
    flags = f"--{section}.log-every 8"
    words = ["synthetic", "--name", "set", "--model", name, "--preset", "test", "--flags", flags]
    words += ["--seeds", "0", "1", "--evaluate-every", "32", "--num-images", "6"]
    words += ["--arms", "scratch", "both", *arguments]
    result = worth.measure(worth.parse_arguments(words))
    assert set(result["curves"]) == {"scratch", "both"}
    for by_seed in result["curves"].values():
        for curve in by_seed.values():
            assert [point[0] for point in curve] == [32, 64]
            assert 0 < curve[0][1] < curve[1][1]
    path = tmp_path / "results" / f"set-{'ldm' if name == 'em-ldm-64' else 'stylegan'}"
    assert json.loads(path.with_suffix(".json").read_text())["summary"] == result["summary"]
    assert read_width(path.with_suffix(".png")) > 500
    assert worth.measure(worth.parse_arguments(words))["curves"] == result["curves"]


def test_what_a_start_is_worth_in_numbers(worth):
    """The run from scratch ends at 100 after 10 minutes; the start is there after 2 and after 4."""
    scratch = {"0": [[1, 5.0, 150], [2, 10.0, 110]], "1": [[1, 5.0, 120], [2, 10.0, 90]]}
    both = {"0": [[1, 2.0, 100], [2, 6.0, 80]], "1": [[1, 2.0, 140], [2, 4.0, 60]]}
    never = {"0": [[1, 2.0, 101]], "1": [[1, 1.0, 10]]}
    summary = worth.summarise({"scratch": scratch, "both": both, "never": never})
    assert summary["scratch"]["last_distance"] == 100
    assert summary["both"]["last_distance"] == 70
    assert summary["both"]["minutes_to_scratch"] == 3
    assert summary["both"]["times_fewer_minutes"] == pytest.approx(10 / 3)
    assert summary["never"]["minutes_to_scratch"] is None
    assert summary["never"]["times_fewer_minutes"] is None
    with pytest.raises(ValueError, match="choose some of scratch, both"):
        worth.parse_arguments(
            ["x", "--name", "x", "--model", "em-stylegan2-64", "--arms", "decoder"]
        )


def test_measurements_take_no_training_time(worth):
    """Ten images a second; the two measurements take a minute each."""
    distance = {"held_out_frechet_distance": 1.0}
    lines = [
        {"num_images_seen": 10, "train_seconds": 1.0},
        {"num_images_seen": 20, "train_seconds": 2.0},
        {"num_images_seen": 30, "train_seconds": 63.0} | distance,
        {"num_images_seen": 40, "train_seconds": 64.0},
    ]
    assert worth.time_image(lines) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="smaller log-every"):
        worth.time_image(lines[1:3])
