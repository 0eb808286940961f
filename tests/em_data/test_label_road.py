"""Labels go the whole road to the bit: written, read, cut, turned, published, streamed back."""

from collections import Counter

import numpy as np
import PIL.Image
import pytest

from em_data import DataConfig, Micrograph, load_data
from em_data.labels import draw_whole_mask, write_labelled
from em_data.push import PushConfig, push_folder
from em_data.sources import open_source
from em_data.synthetic_micrographs import synthesise_micrographs
from em_data.views import SYMMETRIES, apply_symmetry

SIDE, CLASSES = 48, ("steel", "iron")


@pytest.fixture
def micrographs() -> list[Micrograph]:
    """Simulated micrographs with overlapping defects, in two classes."""
    micrographs = list(synthesise_micrographs(5, 3, 112))
    for i, each in enumerate(micrographs):
        each.class_name = CLASSES[i % 2]
    return micrographs


def cut_directly(micrographs, kinds):
    """Return {pixels of a view: (masks [K, R, R], areas of its defects, class)} for all views."""
    views = {}
    for micrograph in micrographs:
        shape = micrograph.image.shape
        drawn = [(each.kind, draw_whole_mask(each, shape)) for each in micrograph.defects]
        for row in range(0, shape[0] - SIDE + 1, SIDE):
            for col in range(0, shape[1] - SIDE + 1, SIDE):
                part = np.s_[row : row + SIDE, col : col + SIDE]
                masks, areas = np.zeros((len(kinds), SIDE, SIDE), np.float32), Counter()
                for kind, mask in drawn:
                    masks[kinds.index(kind)][mask[part]] = 1
                    areas[kind, int(mask[part].sum())] += bool(mask[part].any())
                for name in SYMMETRIES["d4"]:
                    pixels = apply_symmetry(micrograph.image[part], name)
                    turned = apply_symmetry(masks, name)
                    views[pixels.tobytes()] = turned, +areas, micrograph.class_name
    return views


@pytest.mark.parametrize("road", ["folder", "hub", "hub-stream"])
def test_masks_and_classes_survive_to_the_bit(road, micrographs, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "labelled"
    write_labelled(micrographs, folder)
    rows = [
        f"{each.specimen}/{each.name.removesuffix('.png')}.png,{each.class_name}"
        for each in micrographs
    ]
    (folder / "classes.csv").write_text("\n".join(["file_name,class", *rows]))
    source = str(folder)
    if road == "folder":
        out = push_folder(PushConfig(source, "you/set", dry_run=str(tmp_path / "set")))
        card = (tmp_path / "set" / "README.md").read_text()
        assert "- classes: iron: 2, steel: 3 (column `class_name`)" in card
        assert "labelled defects of 5 micrographs\n(dot: " in card
        assert out == str(tmp_path / "set")
    else:
        push_folder(PushConfig(source, "you/set"), say=lambda _: None)
        source = f"{road}:you/set"
    config = DataConfig(resolution=SIDE, symmetries="d4", cache_dir=str(tmp_path / "tiles"))
    data = load_data(source, config, log=lambda _: None)
    assert data.train.class_names == tuple(sorted(CLASSES))
    expected = cut_directly(micrographs, data.train.kinds)
    num_defects = 0
    for side in (data.train, data.held_out):
        ids = np.arange(side.num_views)
        all_masks, classes = side.masks(ids).numpy(), side.class_labels(ids)
        tile_ids, symmetries = side.locate(ids)
        for view_id, tile in enumerate(side.raw(tile_ids)):
            pixels = apply_symmetry(tile, side.symmetries[symmetries[view_id]])
            masks, areas, class_name = expected.pop(pixels.tobytes())
            assert np.array_equal(all_masks[view_id], masks)
            defects = side.defects(view_id)
            assert Counter((each.kind, int(each.mask.sum())) for each in defects) == areas
            assert side.class_names[classes[view_id]] == class_name
            num_defects += len(defects)
    assert not expected
    assert num_defects > 100


def test_boxes_and_micrographs_without_labels_come_back(noise, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "set"
    for i, name in enumerate(("a", "b", "c")):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(noise(i, (40, 60))).save(folder / "images" / f"{name}.png")
    (folder / "labels").mkdir()
    (folder / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.1\n1 .1 .1 .3 .1 .3 .4\n")
    (folder / "labels" / "b.txt").write_text("")
    said = []
    push_folder(PushConfig(str(folder), "x", dry_run=str(tmp_path / "out")), say=said.append)
    found = "labels from labels/ (YOLO, 2 images): 2 of 3 micrographs, 2 defects"
    assert f"{found} (class 0: 1, class 1: 1)" in said
    sent, got = (
        [entry.read().defects for entry in open_source(name, DataConfig(), tmp_path).entries]
        for name in (folder, f"datasets:{tmp_path / 'out'}")
    )
    assert got[1:] == sent[1:] == [[], None]
    for a, b in zip(got[0], sent[0], strict=True):
        assert (a.kind, a.box_px, a.metadata) == (b.kind, b.box_px, b.metadata)
        assert (a.mask is None) == (b.mask is None) == (a.kind == "class 0")
        assert a.mask is None or np.array_equal(a.mask, b.mask)
