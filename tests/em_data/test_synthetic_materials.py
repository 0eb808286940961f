import json
from collections import Counter

import numpy as np
import pytest

from em_data.config import DataConfig
from em_data.data import load_data
from em_data.split import choose_groups
from em_data.synthetic import main
from em_data.synthetic_materials import MATERIALS, synthesise_material, synthesise_materials
from em_data.synthetic_micrographs import synthesise_micrograph


@pytest.fixture(scope="module")
def micrographs():
    return list(synthesise_materials(24, seed=3, size=256))


def test_a_seed_is_a_picture_and_another_seed_another(micrographs):
    again = synthesise_material(3_000_004, size=256)
    assert np.array_equal(again.image, micrographs[4].image)
    assert (again.name, again.class_name) == (micrographs[4].name, micrographs[4].class_name)
    assert [d.box_px for d in again.defects] == [d.box_px for d in micrographs[4].defects]
    for i, a in enumerate(micrographs):
        for b in micrographs[:i]:
            assert np.mean(a.image == b.image) < 0.3


def test_materials_take_turns_and_a_specimen_has_one(micrographs):
    names = [each.class_name for each in micrographs]
    assert names[:3] == ["coarse-loops", "fine-loops", "lines"] == sorted(MATERIALS)
    assert set(Counter(names).values()) == {8}
    by_specimen = {}
    for each in micrographs:
        by_specimen.setdefault(each.specimen, []).append(each.class_name)
    assert [len(each) for each in by_specimen.values()] == [4] * 6
    assert all(len(set(each)) == 1 for each in by_specimen.values())


def test_materials_differ_in_their_defects(micrographs):
    """Every micrograph of a material lies beyond every one of the others."""
    found = {name: [] for name in MATERIALS}
    for each in micrographs:
        loops = [d.diameter_nm for d in each.defects if d.kind.startswith("loop")]
        num_lines = sum(d.kind == "line" for d in each.defects)
        found[each.class_name].append((len(loops), np.median([1, *loops]), num_lines))
    coarse, fine, lines = (np.array(each) for each in found.values())
    assert min(fine[:, 0]) > 2 * max(coarse[:, 0]) > 2 * min(coarse[:, 0]) > 2 * max(lines[:, 0])
    assert min(coarse[:, 1]) > 1.5 * max(fine[:, 1])
    assert min(lines[:, 2]) > max(coarse[:, 2].max(), fine[:, 2].max())


def test_no_micrograph_is_one_of_the_standard_set():
    for seed in range(3):
        pictures = synthesise_material(seed, 128), synthesise_micrograph(seed, 128)
        places = [{d.metadata["center_px"] for d in each.defects} for each in pictures]
        assert places[0]
        assert not places[0] & places[1]


@pytest.mark.parametrize(("split", "fraction"), [("micrograph", 0.1), ("specimen", 0.25)])
def test_both_sides_of_the_split_have_every_class(tmp_path, split, fraction):
    config = DataConfig(
        resolution=32,
        num_synthetic=48,
        micrograph_size=32,
        split=split,
        held_out_fraction=fraction,
        cache_dir=str(tmp_path),
    )
    data = load_data("synthetic-materials", config, log=lambda line: None)
    for side in (data.train, data.held_out):
        micrographs = [side.cut.micrographs[i] for i in side.micrograph_ids]
        assert {each["class_name"] for each in micrographs} == set(MATERIALS)


def test_the_only_group_of_a_class_is_trained_on():
    classes = {"a1": "a", "b1": "b", "b2": "b", "b3": "b", "c1": "c"}
    for seed in range(20):
        config = DataConfig(seed=seed, held_out_fraction=0.4)
        assert choose_groups(sorted(classes), config, classes) < {"b1", "b2", "b3"}


@pytest.mark.parametrize(("seed", "size"), [(-1, 64), (0, 8)])
def test_impossible_pictures_are_refused(seed, size):
    with pytest.raises(ValueError, match="a synthetic micrograph needs"):
        synthesise_material(seed, size)


def test_the_command_writes_them_with_labels(tmp_path, capsys):
    main(["--num", "3", "--size", "96", "--materials", "--out", str(tmp_path)])
    assert "3 micrographs" in capsys.readouterr().out
    coco = json.loads((tmp_path / "labels" / "coco.json").read_text())
    assert len(coco["images"]) == 3
