"""What the study's recipes share, and its autoencoder, LDM and comparison experiments at their
smallest.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from em_evaluation.images import ImageSet


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("2024_gan_vs_ldm/recipe.py")


def make_point(name, study, ours, half=1.0):
    return {
        "settings": {"name": name},
        "study": study,
        "ours": ours,
        "low": ours - half,
        "high": ours + half,
    }


def test_the_conclusion_counts_pairs_and_overlaps(recipe, arguments, monkeypatch):
    results = recipe.Results(
        recipe.create_parser("").parse_args(["--scale", "test", *arguments]), "any", "Any"
    )
    for name, study, ours in (
        ("a", 10.0, 5.0),
        ("b", 20.0, 6.0),
        ("c", 30.0, 4.5),
        ("d", None, 50.0),
    ):
        results.add(
            {"name": name},
            study,
            {key: make_point(name, study, ours)[key] for key in ("ours", "low", "high")},
        )
    best, apart, order = results.conclude()
    assert (
        best == "Least distance: c, 4.50 [3.50, 5.50]; intervals that overlap with its own: a; b."
    )
    assert apart == "Our intervals hold 3 of the 6 pairs of points apart."
    assert order.startswith(
        "Of the 3 pairs that the study ranks, ours are in the same order in 1, of which our "
        "intervals hold 0 apart"
    )
    table = results.path.with_suffix(".md").read_text()
    assert "| a | 10.00 | 5.00 [4.00, 6.00] | -5.00 |" in table
    assert "| d | - | 50.00 [49.00, 51.00] | - |" in table
    again = recipe.Results(
        recipe.create_parser("").parse_args(["--scale", "test", *arguments]), "any", "Any"
    )
    assert again.find({"name": "b"})["study"] == 20.0
    assert again.find({"name": "e"}) is None
    monkeypatch.setitem(recipe.SCALES, "test", replace(recipe.SCALES["test"], num_images=9))
    with pytest.raises(ValueError, match="other sizes"):
        recipe.Results(
            recipe.create_parser("").parse_args(["--scale", "test", *arguments]), "any", "Any"
        )


def test_names_hold_what_differs_and_no_paths(recipe):
    points = [{"settings": {"depth": 4, "maps": maps}} for maps in (256, 512)]
    assert recipe.name_points(points) == ["maps 256", "maps 512"]
    assert recipe.name_points(points[:1]) == ["depth 4, maps 256"]
    assert recipe.name_data("damaged-alloys:some/where") == "damaged-alloys"
    assert recipe.name_data("/some/where/set") == "set"


def test_the_reference_is_held_out_and_a_set_is_at_no_distance_from_itself(recipe, arguments):
    from em_diffusion import PRESETS

    arguments = recipe.create_parser("").parse_args(["--scale", "test", *arguments])
    tiles = PRESETS["test"]().tiles
    tiles = type(tiles)(**recipe.choose_tiles(tiles, arguments))
    reference = recipe.Reference(arguments, tiles)
    assert reference.measure(reference.images)["ours"] == pytest.approx(0, abs=0.1)
    inverted = ImageSet(255 - reference.images.levels)
    found = reference.measure(inverted)
    assert found["low"] <= found["ours"] <= found["high"]
    assert found["ours"] > 10
    assert found["num_images_compared"] == 8


def test_table_1_and_figure_5(load_recipe, arguments, tmp_path):
    autoencoders = load_recipe("2024_gan_vs_ldm/autoencoders.py")
    assert autoencoders.STUDY_DISTANCES == {
        "dalle-dvae": 116.64,
        "vqgan-f8-8192": 31.15,
        "vqgan-f16-1024": 82.19,
        "vqgan-f16-16384": 60.26,
    }
    pretrained = autoencoders.parse_arguments(["--scale", "test", *arguments])
    source = autoencoders.train(autoencoders.VARIANTS["test"][0], pretrained)
    asked = ["--candidates", f"vqgan-f16-1024={source}", f"nothing={tmp_path / 'nothing'}"]
    path = autoencoders.run_experiment(
        autoencoders.parse_arguments(["--scale", "test", *arguments, *asked])
    )
    result = json.loads(path.read_text())
    points = {point["settings"]["name"]: point for point in result["points"]}
    assert set(points) == {"vq-f4-64", "kl-f4", "vqgan-f16-1024"}
    assert (
        points["vq-f4-64"]["study"],
        points["kl-f4"]["study"],
        points["vqgan-f16-1024"]["study"],
    ) == (
        31.15,
        None,
        82.19,
    )
    assert points["vq-f4-64"]["ours"] == pytest.approx(
        points["vqgan-f16-1024"]["ours"]
    )  # the same weights by another name
    assert points["kl-f4"]["settings"]["factor"] == 4
    assert points["kl-f4"]["num_images_seen"] == 16
    assert "nothing was not judged" in path.with_suffix(".md").read_text()
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > picture.height


def test_figure_6_trains_the_levels_on_one_autoencoder(load_recipe, arguments):
    ldm = load_recipe("2024_gan_vs_ldm/ldm.py")
    flags = ["unet_levels", "--scale", "test", *arguments]
    path = ldm.run_experiment(ldm.parse_arguments(flags))
    three, four = json.loads(path.read_text())["points"]
    assert (three["settings"], four["settings"]) == ({"num_levels": 3}, {"num_levels": 4})
    assert three["num_parameters"] < four["num_parameters"]
    for point in (three, four):
        assert point["study"] is None
        assert [moment for moment, _ in point["curves"]["held_out_frechet_distance"]] == [8, 16]
        assert point["held_out_loss"] == point["curves"]["held_out_loss"][-1][1]
    configs = [
        ldm.make_config(point, ldm.parse_arguments(flags))
        for point in ldm.EXPERIMENTS["unet_levels"]
    ]
    assert len({config.autoencoder for config in configs}) == 1
    assert configs[0].denoiser.channel_multipliers == (1, 2, 2)
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 2 * picture.height


def test_the_batch_size_changes_nothing_else(load_recipe, arguments, tmp_path):
    ldm = load_recipe("2024_gan_vs_ldm/ldm.py")
    flags = ["batch_size", "--scale", "study", *arguments, "--autoencoder", str(tmp_path)]
    configs = [
        ldm.make_config(point, ldm.parse_arguments(flags))
        for point in ldm.EXPERIMENTS["batch_size"]
    ]
    assert [config.denoiser.batch_size for config in configs] == [8, 16, 32, 64]
    assert len({config.denoiser.num_images for config in configs}) == 1
    assert configs[-1].denoiser.channel_multipliers == (1, 2, 2, 4, 4)
    assert configs[0].tiles.resolution == 256


def test_table_3_and_figure_7(load_recipe, arguments, monkeypatch):
    comparison = load_recipe("2024_gan_vs_ldm/comparison.py")
    ddim, _, stylegan2, alias_free_t, _ = comparison.list_models("study")
    assert (ddim.study["frechet_distance"], ddim.point.batch_size, ddim.num_inference_steps) == (
        36.1,
        64,
        200,
    )
    assert (stylegan2.study["frechet_distance"], stylegan2.point.kimg) == (58.96, 1200)
    assert alias_free_t.study == {"frechet_distance": 90.54}
    models = comparison.list_models("test")
    monkeypatch.setattr(comparison, "list_models", lambda scale: (models[1], models[2]))
    path = comparison.run_experiment(comparison.parse_arguments(["--scale", "test", *arguments]))
    ours, gan = json.loads(path.read_text())["points"]
    assert ours["settings"]["name"] == "LDM, our default sampler"
    assert gan["difference"] == pytest.approx(gan["ours"] - 58.96)
    assert gan["times"]["train_seconds"]["study"] == 18 * 3600
    times = gan["times"]["sample_seconds_50000"]
    assert times["difference"] == pytest.approx(times["ours"] - 480)
    assert "that of 8, multiplied" in path.with_suffix(".md").read_text()
    with Image.open(path.with_suffix(".png")) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.std() > 10


def test_the_damaged_alloys_set_takes_the_same_road(load_recipe, arguments, monkeypatch, tmp_path):
    labels = tmp_path / "set" / "labels"
    labels.mkdir(parents=True)
    for seed, name in enumerate(("a 300kx", "b 70kx", "c 100kx")):
        levels = np.random.default_rng(seed).integers(60, 200, (256, 256), dtype=np.uint8)
        path = tmp_path / "set" / "positive" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(levels).save(path)
        (labels / f"{name}.txt").write_text("1 1 10 20\n")
    gan = load_recipe("2024_gan_vs_ldm/gan.py")
    monkeypatch.setitem(gan.EXPERIMENTS, "kimg", gan.EXPERIMENTS["kimg"][:1])
    flags = ["kimg", "--scale", "test", *arguments, "--data", f"damaged-alloys:{tmp_path / 'set'}"]
    result = json.loads(gan.run_experiment(gan.parse_arguments(flags)).read_text())
    assert result["data"] == "damaged-alloys"
    assert result["points"][0]["num_images_seen"] == 16
    assert str(tmp_path) not in json.dumps(result)
