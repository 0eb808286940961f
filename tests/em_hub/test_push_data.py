"""A folder of micrographs to the Hub and back: every grey level, pixel size, box and mask."""

import io
import json

import numpy as np
import PIL.Image
import pytest
import tifffile
import torch
from huggingface_hub import DatasetCard, constants

from em_data import DataConfig, from_uint, load_data, read_image_folder
from em_data.labels import (
    decode_runs,
    draw_instance_mask,
    make_coco,
    make_defects,
    write_labelled,
)
from em_data.push import PushConfig, push_folder
from em_data.sources import open_source
from em_data.synthetic_micrographs import synthesise_micrographs


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def folder(tmp_path):
    """Two specimens, 8 and 16 bits, one pixel size, a label bar's worth of nothing."""
    random = np.random.default_rng(0)
    folder = tmp_path / "micrographs"
    for i in range(4):
        levels = random.integers(0, 2**16 if i % 2 else 2**8, (40, 48)).astype(
            np.uint16 if i % 2 else np.uint8
        )
        path = folder / f"specimen {i // 2}" / f"frame_{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, levels, metadata={"pixel_size_nm": 0.25})
    return folder


def push(folder, repo="you/set", **options):
    return push_folder(PushConfig(str(folder), repo, **options), say=lambda text: None)


def test_every_grey_level_comes_back(folder, hub, tmp_path, monkeypatch):
    assert push(folder, "set", private=True, license="cc-by-4.0") == f"{hub.url}/datasets/you/set"
    assert hub.repos["datasets", "you/set"].private
    config = DataConfig(resolution=16, split="specimen", held_out_fraction=0.5, symmetries="none")
    sent, got = (
        open_source(str(folder), config, tmp_path),
        open_source("hub:you/set", config, tmp_path),
    )
    assert got.name == "set"
    for first, second in zip(sent.entries, got.entries, strict=True):
        a, b = first.read(), second.read()
        assert a.image.dtype == b.image.dtype
        np.testing.assert_array_equal(a.image, b.image)
        assert (a.pixel_size_nm, a.specimen) == (b.pixel_size_nm, b.specimen)
    data = load_data("hub:you/set", config, log=lambda text: None)
    same = load_data(str(folder), config, log=lambda text: None)
    assert data.summary["num_tiles"] == same.summary["num_tiles"] == 4 * 6
    assert data.summary["split_hash"] == same.summary["split_hash"]
    assert data.summary["pixel_size_nm"] == 0.25
    card = DatasetCard(hub.read("you/set", "README.md", kind="datasets").decode())
    assert card.data.license == "cc-by-4.0"
    assert "4 electron micrographs of 8 and 16 bits" in card.text
    for road in ("hub", "hub-stream"):
        folder = read_image_folder(f"{road}:you/set")
        expected = torch.stack([from_uint(entry.read().image) for entry in got.entries])
        assert torch.equal(folder.batch(range(4)), expected.unsqueeze(1))
        assert folder.pixel_size_nm == 0.25
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = open_source("hub:you/set@main", config, tmp_path)
    assert [entry.key for entry in again.entries] == [entry.key for entry in got.entries]


def test_frames_of_a_stack_come_back_as_rows_that_no_split_parts(tmp_path, hub):
    stacks = np.random.default_rng(1).integers(0, 2**16, (2, 3, 32, 48), dtype=np.uint16)
    folder = tmp_path / "series"
    folder.mkdir()
    for name, stack in zip("ab", stacks, strict=True):
        tifffile.imwrite(folder / f"{name}.tif", stack, photometric="minisblack")
    push(folder)
    config = DataConfig(resolution=16, symmetries="none")
    entries = open_source("hub:you/set", config, tmp_path).entries
    assert [entry.group for entry in entries] == ["a.tif"] * 3 + ["b.tif"] * 3
    assert [entry.name[:10] for entry in entries[:2]] == ["a.tif#0000", "a.tif#0001"]
    for entry, frame in zip(entries, stacks.reshape(6, 32, 48), strict=True):
        assert np.array_equal(entry.read().image, frame)


def test_boxes_and_masks_come_along(tmp_path):
    import datasets

    micrographs = list(synthesise_micrographs(2, 0, 128))
    write_labelled(micrographs, tmp_path / "labelled")
    out = push(tmp_path / "labelled", dry_run=str(tmp_path / "set"))
    rows = datasets.load_dataset("parquet", data_files=f"{out}/data/*.parquet", split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False)).cast_column(
        "mask", datasets.Image(decode=False)
    )
    coco = make_coco(micrographs)
    by_name = {
        f"images/{image['file_name']}": (image["id"], m)
        for image, m in zip(coco["images"], micrographs, strict=True)
    }
    for row in rows:
        image_id, micrograph = by_name[row["name"]]
        np.testing.assert_array_equal(
            np.asarray(PIL.Image.open(io.BytesIO(row["image"]["bytes"]))), micrograph.image
        )
        boxes = [each["bbox"] for each in coco["annotations"] if each["image_id"] == image_id]
        assert [
            [x0, y0, x1 - x0, y1 - y0]
            for x0, y0, x1, y1 in (each["box_px"] for each in row["objects"])
        ] == boxes
        assert [each["kind"] for each in row["objects"]] == [
            defect.kind for defect in micrograph.defects
        ]
        mask = np.asarray(PIL.Image.open(io.BytesIO(row["mask"]["bytes"])))
        assert mask.max() == len(micrograph.defects)
    assert sum(len(row["objects"]) for row in rows) == len(coco["annotations"]) > 0


def assert_same_defects(a, b):
    assert (a.kind, a.box_px, a.diameter_nm, a.length_nm) == (
        b.kind,
        b.box_px,
        b.diameter_nm,
        b.length_nm,
    )
    np.testing.assert_array_equal(a.mask, b.mask)
    assert a.metadata == json.loads(json.dumps(b.metadata))


@pytest.mark.parametrize("road", ["hub", "hub-stream"])
def test_labels_come_back_as_they_were(road, hub, tmp_path):
    micrographs = list(synthesise_micrographs(2, 0, 192))
    write_labelled(micrographs, tmp_path / "labelled")
    push(tmp_path / "labelled")
    source = open_source(f"{road}:you/set", DataConfig(), tmp_path)
    assert not source.ignored
    read = [entry.read() for entry in source.entries]
    by_name = {
        image["file_name"]: each
        for image, each in zip(make_coco(micrographs)["images"], micrographs, strict=True)
    }
    num_hidden = 0
    for entry, got in zip(source.entries, read, strict=True):
        sent = by_name[entry.name.removeprefix("images/").rsplit("_", 1)[0]]
        np.testing.assert_array_equal(got.image, sent.image)
        instances = draw_instance_mask(sent)
        for k, (a, b) in enumerate(zip(got.defects, sent.defects, strict=True), start=1):
            assert_same_defects(a, b)
            num_hidden += np.count_nonzero(b.mask) - np.count_nonzero(instances == k)
    assert num_hidden > 0  # some overlap: the instance mask alone does not have them whole
    again = load_labelled_again(read, tmp_path / "again")
    for got, sent in zip(again, read, strict=True):
        for a, b in zip(got, sent.defects, strict=True):
            assert_same_defects(a, b)


def load_labelled_again(micrographs, folder):
    """What was read back serves wherever labels do: written as labels once more, it is read as
    such.
    """
    write_labelled(micrographs, folder)
    source = open_source(folder, DataConfig(), folder / "cache")
    return [entry.read().defects for entry in source.entries]


def test_labels_of_others_and_of_cropped_images(tmp_path):
    objects = [{"kind": "dot", "box_px": [2, 1, 5, 4]}, {"kind": "loop", "box_px": [0, 6, 4, 12]}]
    objects += [{"kind": "dot", "box_px": [1, 10, 3, 12]}]
    instances = np.zeros((12, 8), np.uint16)
    instances[1:4, 2:5] = 1
    instances[6:12, 0:2] = 2
    dot, loop = make_defects(objects, instances, (8, 8))  # four rows of a label bar were cropped
    assert (dot.box_px, loop.box_px) == ((2, 1, 5, 4), (0, 6, 4, 8))
    assert dot.mask.all()
    np.testing.assert_array_equal(loop.mask, [[True, True, False, False]] * 2)
    assert [each.mask for each in make_defects(objects, None, (8, 8))] == [None, None]
    with pytest.raises(ValueError, match="run lengths of 30 pixels"):
        decode_runs([10, 20], (4, 8))

    micrographs = list(synthesise_micrographs(1, 0, 96))
    write_labelled(micrographs, tmp_path / "labelled")
    path = tmp_path / "labelled" / "labels" / "coco.json"
    path.write_text(path.read_text().replace('"name": "dot"', '"name": "void"'))
    push(tmp_path / "labelled", dry_run=str(tmp_path / "set"))
    source = open_source(f"datasets:{tmp_path / 'set'}", DataConfig(), tmp_path)
    (read,) = (entry.read() for entry in source.entries)
    # any kind is read: users' labels have names of their own
    kinds = ["void" if each.kind == "dot" else each.kind for each in micrographs[0].defects]
    assert [each.kind for each in read.defects] == kinds
    assert "void" in kinds


def test_what_cannot_be_published_is_refused(folder, hub, tmp_path):
    (folder / "specimen 0" / "broken.tif").write_bytes(b"II*\0")
    with pytest.raises(ValueError, match=r"broken\.tif: unreadable"):
        push(folder)
    assert not hub.repos
    (folder / "specimen 0" / "broken.tif").unlink()
    push(folder)
    fault = hub.fail("PUT", "/lfs-storage/", cut_after=100, times=100)
    (folder / "specimen 0" / "frame_0.tif").unlink()
    before = hub.files("you/set", kind="datasets")
    with pytest.raises(ValueError, match="what arrived is kept"):
        push(folder)
    assert hub.files("you/set", kind="datasets") == before
    fault.times = 0
    push(folder)
    assert len(open_source("hub:you/set", DataConfig(), tmp_path).entries) == 3
    hub.tamper("you/set", "data/train-00000.parquet", kind="datasets")
    import shutil

    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(ValueError, match="another checksum"):
        open_source("hub:you/set", DataConfig(), tmp_path)
    with pytest.raises(ValueError, match="there is no such repository"):
        open_source("hub:you/nothing", DataConfig(), tmp_path)


def test_a_wrong_folder_or_name_is_said_before_a_token_is_needed(folder, monkeypatch):
    monkeypatch.setattr("em_hub.transport.get_token", lambda: None)
    with pytest.raises(ValueError, match="There is no folder '/nowhere'"):
        push_folder(PushConfig("/nowhere", "you/set"))
    with pytest.raises(ValueError, match="a/b/c cannot be the name of a repository"):
        push_folder(PushConfig(str(folder), "a/b/c"))
    with pytest.raises(ValueError, match="There is no token"):
        push_folder(PushConfig(str(folder), "you/set"))
