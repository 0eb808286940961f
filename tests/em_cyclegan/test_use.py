"""A translation in every command: images by number, labels, report, card, demo page, a stranger."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from PIL import Image

from em_commands import generate as command
from em_commands.train_cyclegan import name_sources
from em_cyclegan import PRESETS, EMTranslationPipeline, train_cyclegan
from em_cyclegan.drawing import TranslationDrawer, read_tiling
from em_cyclegan.family import TranslationOptions
from em_data import load_data, read_image_folder
from em_generation import demo
from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_generation.generate import GenerationConfig, generate_images
from em_generation.loading import read_model
from em_generation.reproduce import list_training
from em_hub.publish import PublishConfig, publish_run
from em_training.flags import UsageError
from support import hub_server
from support.hub_server import make_environment


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A private cache of tiles for this module."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("cache")
    patch.setenv("XDG_CACHE_HOME", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    config = PRESETS["test"]()
    out = tmp_path_factory.mktemp("runs") / "translation"
    training = replace(config.training, num_images=8, sample_every=0)
    return train_cyclegan(replace(config, out=str(out), training=training))


@pytest.fixture(scope="module")
def model(run):
    return read_model(str(run))


def start(model, seed=0, **options):
    lines = []
    drawer = model.start(
        model.load(), TranslationOptions(**options), seed=seed, batch_size=4, say=lines.append
    )
    return drawer, lines


def test_the_kind_is_read_off_the_pipeline(model, run):
    assert (model.family.name, model.kind, model.title) == ("cyclegan", "cyclegan", "CycleGAN")
    model.family.import_pipeline()(model.load().generator_a_to_b).save_pretrained(run / "one-way")
    assert read_model(str(run / "one-way")).title == "CUT"


def test_image_i_is_tile_i_of_the_source(model):
    drawer, _ = start(model, seed=3)
    count = drawer.tiles.num_tiles
    assert drawer.tiles.num_views == 8 * count
    views = [drawer.find_view(number) for number in range(2 * count)]
    assert sorted(view // 8 for view in views[:count]) == list(range(count))
    assert {view % 8 for view in views[:count]} == {0}
    assert {view % 8 for view in views[count:]} == {1}
    assert views[:count] != sorted(views[:count])
    assert [start(model, seed=4)[0].find_view(number) for number in range(count)] != views[:count]
    images = drawer.draw(list(range(20)))
    torch.testing.assert_close(drawer.draw([7, 19]), images[[7, 19]], rtol=1e-4, atol=1e-5)
    plain, _ = start(model, seed=3, untranslated=True)
    expected = drawer.tiles.batch(views[:20])
    assert torch.equal(plain.draw(list(range(20))), expected)
    assert torch.equal(images, model.load().translate(expected))


def test_images_that_repeat_are_said_once(model):
    drawer, lines = start(model)
    end = drawer.tiles.num_views
    drawer.draw([end - 1])
    assert not lines
    drawer.draw([end, end + 1])
    assert [f"repeat after {end:,}" in line for line in lines] == [True]


def test_labels_are_those_of_the_tile(model):
    drawer, _ = start(model)
    images, layouts = drawer.draw_layouts([0, 1, 2])
    assert torch.equal(images, drawer.draw([0, 1, 2]))
    assert any(layouts)
    for number, defects in enumerate(layouts):
        view = drawer.find_view(number)
        mask = drawer.tiles.masks([view])[0]  # [K, R, R]
        drawn = torch.zeros_like(mask)
        for defect in defects:
            x0, y0, x1, y1 = defect.box_px
            area = drawn[drawer.kinds.index(defect.kind), y0:y1, x0:x1]
            area[torch.from_numpy(defect.mask)] = 1
        assert torch.equal(drawn, mask)


@pytest.fixture(scope="module")
def bare_source(tmp_path_factory):
    """A folder with two micrographs without labels."""
    folder = tmp_path_factory.mktemp("sources") / "bare"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 256, (256, 256), np.uint8)).save(folder / f"{name}.png")
    return str(folder)


def test_a_source_without_labels_has_none(model, bare_source):
    drawer, _ = start(model, source=bare_source)
    assert drawer.draw([0]).shape == (1, 1, 32, 32)
    assert drawer.describe()["source"] == "bare"  # without its path
    with pytest.raises(ValueError, match="source bare has no labels"):
        drawer.draw_layouts([0])


def test_generate_writes_translations_and_the_tiles_before(run, tmp_path, capsys):
    sets = {}
    for name, flags in (("after", []), ("before", ["--untranslated"])):
        words = ["--model", str(run), "--out", str(tmp_path / name), "--num-images", "5", *flags]
        config, model = command.parse(words)
        record = generate_images(config, model)
        assert record["settings"]["untranslated"] is (name == "before")
        sets[name] = read_image_folder(tmp_path / name).batch(range(5))
        bar = {"after": "drawing by CycleGAN", "before": "writing tiles of the source"}
        assert bar[name] in capsys.readouterr().err
    drawer, _ = start(read_model(str(run)))
    torch.testing.assert_close(sets["after"], drawer.draw(list(range(5))), atol=0.005, rtol=0)
    tiles = drawer.tiles.batch([drawer.find_view(i) for i in range(5)])
    torch.testing.assert_close(sets["before"], tiles, atol=0.005, rtol=0)
    assert command.say_evaluation(config).endswith("--sampling untranslated=true")
    with pytest.raises(ValueError, match="--source: only models of the family CycleGAN"):
        command.parse(["--model", "em-ldm-64", "--out", "x", "--source", "synthetic"])


def copy_without(run, tmp_path, **changes):
    """A run's pipeline with a run.json whose configuration is changed, None for a field without."""
    content = json.loads((run / "run.json").read_text())
    for key, value in changes.items():
        content["config"].pop(key)
        content["config"] |= {} if value is None else {key: value}
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "pipeline").symlink_to(run / "pipeline")
    return read_model(str(folder))


def test_a_source_that_is_gone_is_a_clear_error(run, tmp_path):
    gone = copy_without(run, tmp_path, source=str(tmp_path / "gone"))
    with pytest.raises(
        ValueError, match=r"gone, the source of the training, cannot be read: .*--s"
    ):
        start(gone)
    assert start(gone, source="synthetic")[0].draw([0]).shape == (1, 1, 32, 32)
    with pytest.raises(ValueError, match="nowhere cannot be read: There is no folder"):
        start(gone, source="nowhere")


def test_a_model_without_its_run_needs_a_source(run, bare_source):
    bare = read_model(str(run / "pipeline"))
    with pytest.raises(ValueError, match="not known on this machine which micrographs"):
        start(bare)
    drawer, lines = start(bare, source=bare_source)
    assert drawer.tiles.resolution == 256
    assert "tiles of 256 px are used" in lines[0]


def test_a_repository_of_others_names_no_folder_of_this_machine(model, tmp_path):
    foreign = replace(model, folder=None, config=model.config | {"source": str(tmp_path)})
    assert "source" not in foreign.find_sources()
    assert foreign.find_sources()["tiles"] == model.config["tiles"]
    assert replace(model, folder=None).find_sources()["source"] == "synthetic"
    assert model.find_sources() == model.config


def test_a_run_of_others_does_not_decide_how_much_is_drawn(model):
    lines = []
    run = {"tiles": model.config["tiles"] | {"num_synthetic": 10_000_000}}
    tiling = read_tiling(run, lines.append)
    assert tiling.num_synthetic is None
    assert tiling.resolution == model.config["tiles"]["resolution"]
    assert lines == [
        "The run asks for 655,360,000,000 synthetic pixels; the default number is drawn"
    ]


def test_other_pixel_sizes_are_said(model):
    pipeline = model.load()
    pipeline.register_to_config(pixel_size_nm=17.0)
    lines = []
    TranslationDrawer(pipeline, TranslationOptions(), run=model.config, say=lines.append)
    assert "the model was trained on 17 nm" in lines[0]


def test_it_is_evaluated_beside_its_source(run, model, tmp_path, capsys):
    plain = tmp_path / "simulated"
    options = TranslationOptions(untranslated=True)
    generate_images(GenerationConfig(str(run), str(plain), num_images=12, options=options))
    config = EvaluationConfig(
        models=(str(run), str(plain)),
        out=str(tmp_path / "report"),
        num_images=12,
        levels=("noise",),
        microscopy=False,
        memorisation=False,
    )
    assert evaluate_runs(config).exists()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [each["name"] for each in report["models"]] == ["CycleGAN", "simulated"]
    assert report["dataset"]["name"] == "synthetic-varied"  # the target's held-out tiles
    assert report["models"][0]["info"]["source"] == "synthetic"
    assert "loss_cycle" in report["models"][0]["curves"]["cyclegan"][0]
    assert "CycleGAN" in capsys.readouterr().out
    (words,) = list_training(model)
    assert words.startswith("python train_cyclegan.py test --data synthetic-varied")


def test_it_is_shown_in_the_demo(run):
    shown = demo.load_demo_model(str(run))
    drawing = demo.draw(shown, 3, 2)
    assert drawing.images.shape == (2, 1, 32, 32)
    assert shown.controls == ()
    with pytest.raises(ValueError, match="has no walk"):
        demo.walk(shown, 3, 5)


def test_card(run, tmp_path):
    out = publish_run(
        PublishConfig(str(run), "you/em-cyclegan", dry_run=str(tmp_path / "repo"), num_samples=4),
        say=lambda text: None,
    )
    card = (Path(out) / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card
    assert "Electron micrographs by a CycleGAN" in card
    assert re.search(r"Translates grey electron micrographs of the source synthetic at .* nm", card)
    assert "trained on the set synthetic-varied" in card
    assert "Tiles of the source, translated; not selected." in card
    assert "images = pipe(image).images" in card
    assert "generators = [" not in card
    assert "Each image depends on its own generator" not in card
    assert (Path(out) / "samples.png").exists()
    assert json.loads((Path(out) / "run.json").read_text())["config"]["source"] == "synthetic"
    again = replace(read_model(out), folder=None)
    assert start(again)[0].draw([0]).shape == (1, 1, 32, 32)


def test_a_card_without_its_source_has_no_picture(run, tmp_path):
    gone = copy_without(run, tmp_path, source=str(tmp_path / "gone"))
    config = PublishConfig(gone.source, "you/x", dry_run=str(tmp_path / "repo"), num_samples=4)
    with pytest.raises(ValueError, match="--num-samples 0 leaves out the card's picture"):
        publish_run(config, say=lambda text: None)
    config = replace(config, dry_run=str(tmp_path / "without"), num_samples=0)
    out = Path(publish_run(config, say=lambda text: None))
    assert "source" not in json.loads((out / "run.json").read_text())["config"]
    assert str(tmp_path) not in (out / "run.json").read_text() + (out / "README.md").read_text()


@pytest.mark.slow
def test_a_stranger_translates_as_the_owner_does(run, tmp_path, monkeypatch):
    """Over a real connection, in an interpreter that does not find our packages."""
    image = np.random.default_rng(0).integers(0, 256, (24, 32), np.uint8)
    np.save(tmp_path / "image.npy", image)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    program = f"""
import importlib.util, sys
sys.path += {packages!r}
assert not importlib.util.find_spec("em_cyclegan")
import numpy as np, torch
from diffusers import DiffusionPipeline
image = np.load("image.npy")
for repo in ("you/em-cyclegan", "you/again"):
    pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
    assert type(pipe).__module__.startswith("diffusers_modules.")
    images = [pipe(image, each, output_type="np").images for each in ("a_to_b", "b_to_a")]
    np.save(repo.replace("/", "-"), np.concatenate(images))
    if repo == "you/em-cyclegan":
        narrow = DiffusionPipeline.from_pretrained(
            repo, trust_remote_code=True, variant="bf16", torch_dtype=torch.bfloat16
        )
        assert narrow.generator_b_to_a.dtype == torch.bfloat16
        assert np.abs(narrow(image, output_type="np").images - images[0]).max() < 0.1
        pipe.push_to_hub("you/again")
"""
    with hub_server.HubServer() as server, monkeypatch.context() as machine:
        machine.setattr(constants, "ENDPOINT", server.url)
        machine.setattr(constants, "HF_HUB_DISABLE_XET", True)
        config = PublishConfig(str(run), "you/em-cyclegan", token="write-token", num_samples=2)
        publish_run(config, say=lambda text: None)
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program],
            cwd=tmp_path,
            env=make_environment(server, tmp_path / "hf", HF_TOKEN="write-token"),
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    own = EMTranslationPipeline.from_pretrained(run / "pipeline")
    expected = [own(image, each, output_type="np").images for each in ("a_to_b", "b_to_a")]
    for name in ("you-em-cyclegan", "you-again"):
        images = np.load(tmp_path / f"{name}.npy")
        np.testing.assert_allclose(images, np.concatenate(expected), atol=1e-6)


def test_loading_by_diffusers_needs_trust(run):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(run / "pipeline")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["demo"], ["demo"]),
        ([], []),
        (["--help"], ["--help"]),
        (
            ["test", "a", "b", "--x", "1"],
            ["test", "--source", "a", "--data", "b", "--x", "1"],
        ),
        (["a", "b"], ["demo", "--source", "a", "--data", "b"]),
        (["test", "--source", "a"], ["test", "--source", "a"]),
        (["smal"], ["smal"]),
        (["tets", "a", "b"], ["tets", "a", "b"]),
    ],
)
def test_source_and_target_are_words(words, expected):
    assert name_sources(words, list(PRESETS)) == expected


@pytest.mark.parametrize("words", [["test", "mine"], ["a", "b", "c"], ["test", "a", "b", "c"]])
def test_one_word_or_three_are_refused(words):
    with pytest.raises(UsageError, match="Give SOURCE and TARGET, not"):
        name_sources(words, list(PRESETS))


def test_a_preset_that_was_trained_loads_its_data(run, model):
    """The tiles of the drawer are those of the training, both sides of the split."""
    drawer, _ = start(model)
    config = PRESETS["test"]()
    data = load_data("synthetic", config.tiles, log=lambda line: None)
    assert drawer.tiles.cut.key == data.train.cut.key
    assert drawer.tiles.num_tiles == data.train.num_tiles + data.held_out.num_tiles


def test_pairs_are_translations_with_the_labels_of_the_source(run, tmp_path):
    out = tmp_path / "pairs"
    words = ["--model", str(run), "--out", str(out), "--num-images", "4", "--pairs", "mask"]
    record = generate_images(*command.parse([*words, "--labels", "coco", "masks"]))
    assert record["settings"]["source"] == "synthetic"
    coco = json.loads((out / "labels" / "coco.json").read_text())
    names = {each["id"]: each["name"] for each in coco["categories"]}
    drawer, _ = start(read_model(str(run)))
    images, layouts = drawer.draw_layouts([0, 1, 2, 3])
    assert sum(map(len, layouts)) == len(coco["annotations"]) > 0
    for number, defects in enumerate(layouts):
        (image,) = (each for each in coco["images"] if each["file_name"] == f"{number:06d}.png")
        kinds = [
            names[each["category_id"]]
            for each in coco["annotations"]
            if each["image_id"] == image["id"]
        ]
        assert sorted(kinds) == sorted(each.kind for each in defects)
        mask = np.asarray(Image.open(out / "masks" / f"{number:06d}.png"))
        expected = drawer.tiles.masks([drawer.find_view(number)])[0].amax(dim=0)
        np.testing.assert_array_equal(mask > 0, expected > 0)
    written = read_image_folder(out / "images").batch(range(4))
    torch.testing.assert_close(written, images, atol=0.005, rtol=0)
