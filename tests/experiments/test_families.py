"""The comparison of families: its commands are ones that the commands take; times are equal."""

import json

import pytest

from em_generation.families import find_family
from em_training.flags import parse_preset

REPORT = {"dataset": {"name": "some data"}} | {
    key: []
    for key in ("models", "levels", "measurements", "protocol", "repeats", "comparisons_of_repeats")
    + ("verdicts", "environment")
}


@pytest.fixture
def recipe(load_recipe):
    return load_recipe("families/recipe.py")


@pytest.fixture
def trained(recipe, tmp_path, monkeypatch):
    """The commands that the recipe ran; each training leaves a log of a speed of its own."""
    speeds = {"train_ldm.py": 200, "train_gan.py": 50, "train_cyclegan.py": 20, "train_lora.py": 2}
    commands = []

    def call(title, words, arguments):
        commands.append(words)
        if words[0] in speeds:
            family = next(each for each in recipe.FAMILIES.values() if each.script == words[0])
            out = tmp_path / words[words.index("--out") + 1]
            (out / family.stage).mkdir(parents=True, exist_ok=True)
            flags = dict(zip(words[2::2], words[3::2]))
            num, every = (
                int(flags.get(f"--{family.section}.{name}", 1_000))
                for name in ("num-images", "log-every")
            )
            lines = [
                {"num_images_seen": images, "train_seconds": 3 + images / speeds[words[0]]}
                for images in range(every, num + 1, every)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (out / family.stage / "stats.jsonl").write_text(text)

        elif words[0] == "evaluate.py":
            (tmp_path / "report").mkdir(exist_ok=True)
            (tmp_path / "report" / "report.json").write_text(json.dumps(REPORT))

    monkeypatch.setattr(recipe, "call", call)
    words = ["--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    words += ["--minutes", "5", "--seeds", "2", "--jobs", "1"]
    recipe.main(words)
    recipe.main([*words, "--base", "some/base"])  # adds a family to what is there
    return commands


def find_trainings(commands, script):
    return [words for words in commands if words[0] == script and "speed" not in " ".join(words)]


@pytest.mark.parametrize(
    ("name", "script", "length"),
    [
        ("ldm", "train_ldm.py", 60_000),
        ("stylegan", "train_gan.py", 15_000),
        ("cyclegan", "train_cyclegan.py", 6_000),
        ("lora", "train_lora.py", 600),
    ],
)
def test_each_family_trains_as_long_as_its_speed_allows(trained, name, script, length):
    trainings = find_trainings(trained, script)
    family = find_family(name)
    configs = [
        parse_preset(
            family.import_presets(),
            words[1:],
            command="",
            default="demo",
            description="",
            main_flags=(),
        )[0]
        for words in trainings
    ]
    assert {each.seed for each in configs} == {0, 1}
    assert {each.tiles.resolution for each in configs} == {64}
    assert {each.data for each in configs} == {"synthetic-other"}
    assert {each.tiles.symmetries for each in configs} == {"d4"}
    stage = configs[0].denoiser if name == "ldm" else configs[0].training
    assert stage.num_images == length


def test_runs_of_a_family_share_a_name_in_the_report(trained):
    first, report = (words for words in trained if words[0] == "evaluate.py")
    assert not any(word.startswith("LoRA") for word in first)
    models = report[report.index("--models") + 1 : report.index("--out")]
    names = [each.partition("=")[0] for each in models]
    assert names == ["LDM", "StyleGAN2", "CycleGAN", "LoRA"] * 2 + ["simulation"]


def test_the_main_numbers_are_written(trained, tmp_path):
    results = json.loads((tmp_path / "results" / "some data.json").read_text())
    lengths = {"LDM": 60_000, "StyleGAN2": 15_000, "CycleGAN": 6_000, "LoRA": 600}
    assert results["lengths"] == lengths


def test_a_base_adds_lora(recipe, tmp_path):
    arguments = recipe.parse_arguments(["--base", "some/base", "--tiles", "downsample=4"])
    words = recipe.list_words("LoRA", tmp_path, 3, 2_000, arguments)
    family = find_family("lora")
    options = {"command": "", "default": "demo", "description": "", "main_flags": ()}
    config, _ = parse_preset(family.import_presets(), words[1:], **options)
    assert (config.base, config.seed, config.training.num_images) == ("some/base", 3, 2_000)
    assert config.tiles.downsample == 4
