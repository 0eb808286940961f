"""The recipe of `make pairs`: the commands that it prints are ones that the commands take."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import em_cyclegan
from em_commands.train_cyclegan import name_sources
from em_diffusion import PRESETS
from em_evaluation.detector_gain import GainConfig
from em_training.flags import parse_preset


@pytest.fixture
def commands(load_recipe, tmp_path, capsys):
    def run(*arguments):
        recipe = load_recipe("labelled_pairs/recipe.py")
        recipe.main(["--runs", str(tmp_path / "runs"), "--dry-run", *arguments])
        lines = capsys.readouterr().out.splitlines()
        return [shlex.split(line) for line in lines if line.startswith("  ")]

    return run


def read_gains(commands):
    gains = [words[2:] for words in commands if words[1] == "em_evaluation.detector_gain"]
    return [tyro.cli(GainConfig, args=words) for words in gains]


def test_labelled_and_unlabelled_micrographs_are_of_other_specimens(commands):
    printed = commands()
    written, before, last = read_gains(printed)
    assert "{num}" in written.write_labelled
    assert before.nums == last.nums == (10, 50)
    assert before.tiles == last.tiles == written.tiles
    assert last.tiles.split == "specimen"
    names = [word.partition("=")[0] for word in last.pairs]
    assert names == ["raw", "way1", "way2", "way3", "way4"]
    train = next(words for words in printed if words[0] == "train_ldm.py")
    config, _ = parse_preset(
        PRESETS, train[1:], command="", default="demo", description="", main_flags=()
    )
    assert config.data == last.data == "synthetic-other"
    assert config.tiles.seed != last.tiles.seed
    assert config.tiles.resolution == last.tiles.resolution
    translate = next(words for words in printed if words[0] == "train_cyclegan.py")
    translation, _ = parse_preset(
        em_cyclegan.PRESETS,
        name_sources(translate[1:], list(em_cyclegan.PRESETS)),
        command="",
        default="demo",
        description="",
        main_flags=(),
    )
    assert (translation.source, translation.data) == ("synthetic", config.data)
    assert (translation.tiles.seed, translation.tiles.num_synthetic) == (
        config.tiles.seed,
        config.tiles.num_synthetic,
    )


def test_ways_that_see_labels_have_a_folder_for_each_split(commands):
    printed = commands("--nums", "10", "--splits", "2", "--ways", "1", "2", "3")
    folders = {words[words.index("--out") + 1] for words in printed if words[0] == "generate.py"}
    made = {folder.partition("/runs/")[2] for folder in folders}
    assert made == {"way1", *(f"way{way}/10/{split}" for way in (2, 3) for split in (0, 1))}


def test_other_micrographs_have_no_raw_simulation(commands):
    printed = commands("--data", "some folder", "--tiles", "downsample=4", "split=specimen")
    last = read_gains(printed)[-1]
    assert last.data == "some folder"
    train = next(words for words in printed if words[0] == "train_ldm.py")
    config, _ = parse_preset(
        PRESETS, train[1:], command="", default="demo", description="", main_flags=()
    )
    assert config.tiles == last.tiles  # the same test set
    assert (last.tiles.downsample, last.tiles.split) == (4, "specimen")
    names = [word.partition("=")[0] for word in last.pairs]
    assert names == ["way1", "way2", "way3"]  # way 4 would have the simulator's kinds


def test_other_micrographs_with_joined_kinds_have_the_fourth_way(commands):
    printed = commands("--data", "some folder", "--kinds", "loop=ring+loop_100+loop_111")
    last = read_gains(printed)[-1]
    assert last.pairs[-1].startswith("way4=")
    translate = next(words for words in printed if words[0] == "train_cyclegan.py")
    assert translate[2:4] == ["synthetic", "some folder"]


@pytest.mark.slow
def test_all_ways_reach_the_page(tmp_path):
    words = ["--runs", str(tmp_path), "--nums", "10", "--curve", "--splits", "1", "--seeds", "1"]
    words += ["--num-steps", "5", "--num-images", "256", "--num-mask-images", "128", "--jobs", "1"]
    words += ["--num-translation-images", "64"]
    words += ["--num-pairs", "8", "--num-per-split", "8"]
    root = Path(__file__).parents[2]
    command = [sys.executable, "experiments/labelled_pairs/recipe.py", *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gain" / "results.json").read_text())
    arms = {row["arm"] for row in results["differences"]}
    assert arms == {"weak", "raw", "way1", "way2", "way3", "way4"}
    assert len(results["adherence"]) == 6
    assert (tmp_path / "gain" / "gain.html").is_file()
