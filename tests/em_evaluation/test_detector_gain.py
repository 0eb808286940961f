"""The gain: the protocol, paired differences, label equivalents, and the command end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest

from em_data.config import DataConfig
from em_data.labels import write_labelled
from em_data.synthetic_other import synthesise_other_micrograph
from em_evaluation.adherence import AdherenceConfig, measure_adherence
from em_evaluation.detector.adherence_measure import choose_worst
from em_evaluation.detector.arms import list_tasks
from em_evaluation.detector.gain_statistics import (
    analyse,
    find_equivalent,
    make_draws,
    make_interval,
    resample,
)
from em_evaluation.detector.gain_trainings import Materials
from em_evaluation.detector.keep_images import keep_images
from em_evaluation.detector.labelled_tiles import parse_kinds
from em_evaluation.detector.scores import Scores
from em_evaluation.detector.segmenter import SegmenterConfig
from em_evaluation.detector_gain import GainConfig, measure_gain, parse_folders


def make_scores(recall, seed, num_groups=12, num_true=40):
    """Return scores of one kind with about this recall and nothing invented."""
    rng = np.random.default_rng(seed)
    right = rng.binomial(num_true, recall, num_groups)
    sums = np.zeros((num_groups, 1, 5))
    sums[:, 0, 0] = sums[:, 0, 1] = right
    sums[:, 0, 2] = num_true
    sums[:, 0, 3], sums[:, 0, 4] = 10 * right, 10 * num_true
    rows = [(g, 0, 0.9, 1) for g in range(num_groups) for _ in range(right[g])]
    groups = tuple(f"s{g}" for g in range(num_groups))
    return Scores(groups, ("loop",), sums, np.array(rows, float), np.ones(num_groups))


def make_cell(recall, seed=0, num_splits=5, num_seeds=3):
    return {
        (split, each): make_scores(recall, [seed, split, each])
        for split in range(num_splits)
        for each in range(num_seeds)
    }


def test_interval_holds_the_value_and_shrinks_with_trainings():
    def width(num_splits, num_seeds):
        draws = make_draws(12, num_splits, num_seeds)
        cell = make_cell(0.7, num_splits=num_splits, num_seeds=num_seeds)
        values = resample(cell, draws)["f1"]
        interval = make_interval(values)
        assert interval.low < interval.value < interval.high
        assert values[0] == pytest.approx(2 * 0.7 / 1.7, abs=0.02)
        return interval.high - interval.low

    assert width(10, 3) < width(2, 1)


def test_a_real_difference_is_found_and_none_is_not_invented():
    cells = {("strong", 10): make_cell(0.6), ("strong", 50): make_cell(0.8, 1)}
    cells |= {("way1", 10): make_cell(0.7, 2), ("way3", 10): make_cell(0.6, 3)}
    result = analyse(cells, 5, 3)
    way1, way3 = (row for row in result["differences"])
    assert way1["arm"] == "way1"
    assert 0 < way1["f1"]["low"] < way1["f1"]["value"]
    assert way3["f1"]["low"] < 0 < way3["f1"]["high"]
    assert way1["size_error"]["value"] == pytest.approx(0, abs=1e-9)
    worth = result["equivalents"][0]
    assert 0 < worth["low"] < worth["value"] < worth["high"] < 40
    assert not worth["at_least"]


def test_label_equivalent_is_read_off_the_curve():
    ones = np.ones(9)
    curve = {10: 0.5 * ones, 20: 0.6 * ones, 80: 0.7 * ones, 160: 0.7 * ones}
    half = find_equivalent(0.65 * ones, 10, curve)
    assert half["value"] == pytest.approx(np.sqrt(20 * 80) - 10)  # half way on the logarithm
    assert half["at_least"] == half["at_most"] == []
    assert find_equivalent(0.5 * ones, 10, curve)["value"] == pytest.approx(0)
    assert find_equivalent(0.9 * ones, 10, curve)["at_least"] == ["value", "low", "high"]
    assert find_equivalent(0.2 * ones, 20, curve)["at_most"] == ["value", "low", "high"]


def test_splits_and_seeds_are_shared_by_all_arms():
    tasks = list_tasks((5, 10), 30, ["way1"], ["way1"], 2, 3, (20,))
    by_arm = {}
    for task in tasks:
        by_arm.setdefault(task.arm.key, set()).add((task.num, task.split, task.seed))
    assert by_arm["weak"] == by_arm["way1"]
    assert by_arm["strong"] - by_arm["weak"] == {(20, s, e) for s in (0, 1) for e in range(3)}
    assert by_arm["all"] == {(30, 0, seed) for seed in range(3)}
    assert by_arm["only way1"] == {(0, 0, seed) for seed in range(3)}
    assert len(tasks) == len(set(tasks)) == 3 * (2 * 2 * 3 + 2 + 1 + 1)


def test_folders_of_pairs_have_names():
    assert parse_folders(["way1=a/b", "way2=c/{num}"]) == {"way1": "a/b", "way2": "c/{num}"}
    for wrong in (["a/b"], ["way1="], ["way1=a", "way1=b"]):
        with pytest.raises(ValueError, match="NAME=FOLDER"):
            parse_folders(wrong)


def make_config(tmp_path, **changes):
    tiles = DataConfig(
        resolution=64,
        micrograph_size=64,
        num_synthetic=20,
        split="specimen",
        held_out_fraction=0.4,
        cache_dir=str(tmp_path / "cache"),
    )
    return GainConfig(
        out=str(tmp_path / "gain"),
        nums=(2, 4, 99),
        splits=2,
        seeds=1,
        kinds=("loop=loop_111+loop_100", "dot"),
        segmenter=SegmenterConfig(widths=(8, 16), crop_px=32, num_steps=4, batch_size=2),
        tiles=tiles,
        **changes,
    )


def test_the_command_resumes_and_says_what_is_left_out(tmp_path):
    said = []
    config = make_config(tmp_path, pairs=("raw=synthetic", "way2=" + str(tmp_path / "{num}")))
    page = measure_gain(config, say=said.append)
    text = "\n".join(said)
    assert "N = 99: left out; there are 12" in text
    assert "way 2 (LDM conditioned on masks) at N = 2: left out" in text
    assert "14 trainings: 0 are on the disk, 14 to do" in text  # 3 arms, 2 N, 2 splits; all; only
    results = json.loads((tmp_path / "gain" / "results.json").read_text())
    assert {row["arm"] for row in results["differences"]} == {"weak", "raw"}
    assert results["protocol"]["num_test_specimens"] == 2
    assert [row["name"] for row in results["adherence"]] == [
        "real micrographs of the test",
        "raw simulation",
    ]
    html = page.read_text()
    assert "http" not in html.replace("http://www.w3.org", "")
    assert said[-1].endswith("gain.html")

    said.clear()
    (next((tmp_path / "gain" / "trainings").iterdir())).unlink()
    measure_gain(config, say=said.append)
    assert "14 trainings: 13 are on the disk, 1 to do" in said
    again = json.loads((tmp_path / "gain" / "results.json").read_text())
    assert again["cells"] == results["cells"]


def write_pairs_with_other_names(folder):
    """Write labelled images; both kinds of loops are called hcloop."""
    micrographs = [synthesise_other_micrograph(seed, 64) for seed in range(3_000_000, 3_000_006)]
    for each in micrographs:
        each.defects = [
            replace(defect, kind="hcloop" if defect.kind.startswith("loop") else defect.kind)
            for defect in each.defects
        ]
    write_labelled(micrographs, folder)
    return str(folder)


def test_pairs_may_name_kinds_otherwise_than_micrographs(tmp_path):
    folder = write_pairs_with_other_names(tmp_path / "pairs")
    config = make_config(tmp_path)
    kinds = ("loop=loop_111+loop_100+hcloop",)
    changes = {"nums": (2,), "splits": 1, "kinds": kinds}
    measure_gain(replace(config, **changes), say=lambda text: None)
    said = []
    measure_gain(replace(config, **changes, pairs=("way1=" + folder,)), say=said.append)
    assert "the micrographs have no hcloop" in said
    assert "the pairs way1 have no loop_111 or loop_100" in said
    assert "5 trainings: 3 are on the disk, 2 to do" in said  # those without pairs count
    results = json.loads((tmp_path / "gain" / "results.json").read_text())
    assert results["adherence"][1]["by_kind"]["loop"]["num_true"] > 0

    said.clear()
    adherence = AdherenceConfig(
        folder,
        out=str(tmp_path / "adherence"),
        kinds=kinds,
        segmenter=config.segmenter,
        tiles=config.tiles,
    )
    sets = measure_adherence(adherence, say=said.append)["sets"]
    assert said[-1].endswith("adherence.html")
    assert "the generated images have no loop_111 or loop_100" in said
    assert all(row["by_kind"]["loop"]["num_true"] > 0 for row in sets)
    with pytest.raises(ValueError, match="names 'disc', but no labels"):
        measure_adherence(replace(adherence, kinds=("loop=loop_111+hcloop+disc",)), say=said.append)


def test_writes_the_labelled_micrographs_of_each_split(tmp_path):
    config = make_config(tmp_path, write_labelled=str(tmp_path / "labelled" / "{num}" / "{split}"))
    measure_gain(config, say=lambda text: None)

    def list_names(num, split):
        coco = json.loads((tmp_path / f"labelled/{num}/{split}/labels/coco.json").read_text())
        assert {each["name"] for each in coco["categories"]} >= {"loop", "dot"}
        assert coco["annotations"]
        return {each["file_name"] for each in coco["images"]}

    assert len(list_names(4, 0)) == 4
    assert list_names(2, 0) < list_names(4, 0) != list_names(4, 1)
    with pytest.raises(ValueError, match="not empty"):
        measure_gain(config, say=lambda text: None)


@pytest.mark.slow
def test_processes_give_the_same_numbers(tmp_path):
    alone = make_config(tmp_path)
    beside = make_config(tmp_path, jobs=2)
    measure_gain(alone, say=lambda text: None)
    first = json.loads((tmp_path / "gain" / "results.json").read_text())
    for record in (tmp_path / "gain" / "trainings").iterdir():
        record.unlink()
    measure_gain(beside, say=lambda text: None)
    second = json.loads((tmp_path / "gain" / "results.json").read_text())
    assert first["cells"] == second["cells"]


def test_keeps_the_best_images_with_their_labels(tmp_path):
    micrographs = [synthesise_other_micrograph(seed, 64) for seed in range(4)]
    write_labelled(micrographs, tmp_path / "all")
    names = sorted(
        path.relative_to(tmp_path / "all").as_posix()
        for path in (tmp_path / "all" / "images").rglob("*.png")
    )
    quality = np.array([0.9, 0.1, 0.3, 0.7, 0.4])
    dropped = choose_worst(quality, [*names, names[2]], 0.5)  # the third has two pieces
    assert dropped == {names[1], names[2]}
    assert keep_images(tmp_path / "all", tmp_path / "kept", dropped) == 2
    for room in ("images", "masks"):
        kept = {path.stem for path in (tmp_path / "kept" / room).rglob("*.png")}
        assert kept == {"synthetic-other-000000000", "synthetic-other-000000003"}
    coco = json.loads((tmp_path / "kept" / "labels" / "coco.json").read_text())
    whole = json.loads((tmp_path / "all" / "labels" / "coco.json").read_text())
    ids = {each["id"] for each in coco["images"]}
    assert ids == {1, 4}
    assert coco["annotations"] == [each for each in whole["annotations"] if each["image_id"] in ids]
    with pytest.raises(ValueError, match="exists"):
        keep_images(tmp_path / "all", tmp_path / "kept", set())


def test_the_order_of_kinds_changes_no_training():
    """A record knows which kinds are joined, not their order; so must the weights."""
    kinds = [("a", "b=c+d"), ("b=d+c", "a")]
    found = [
        Materials(None, parse_kinds(words, "abcd"), ("a", "c", "d"), [], [], {}).kinds
        for words in kinds
    ]
    assert found == [("a", "b"), ("a", "b")]
