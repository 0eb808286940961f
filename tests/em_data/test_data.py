import json
import os
import time

import datasets
import imagecodecs
import numpy as np
import PIL.Image
import pytest
import tifffile

import em_data.sources.folder
from em_data import DataConfig, load_data, load_tiles, to_uint8
from em_data.sources.file_types import LABEL_FOLDER
from em_data.sources.folder import hash_files
from support.config import refuses_config


@pytest.fixture
def folder(tmp_path, noise):
    """Six micrographs of two specimens, in four formats, 8 and 16 bits, none of them square."""
    folder = tmp_path / "alloy"
    for i in range(6):
        path = folder / f"specimen_{i % 2}" / f"image {i}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < 2:
            size = {"resolution": (2e7, 2e7), "resolutionunit": 3}
            tifffile.imwrite(f"{path}.tif", noise(i, (40, 70), np.uint16), **size)
        else:
            PIL.Image.fromarray(noise(i, (64, 33))).save(f"{path}.{'png' if i < 4 else 'bmp'}")
    return folder


def save_images(folder, images):
    """Save images as 0.png, 1.png, ..."""
    for i, image in enumerate(images):
        PIL.Image.fromarray(image).save(folder / f"{i}.png")
    return images


def load(source, config, **changes):
    said = []
    return load_data(str(source), config(**changes), log=said.append), said


def test_a_large_group_that_is_held_out_is_said(tmp_path, noise, config):
    frames = np.stack([noise(i, (32, 32), np.uint16) for i in range(12)])
    tifffile.imwrite(tmp_path / "heat.tif", frames, photometric="minisblack")
    for i in range(20, 23):
        PIL.Image.fromarray(noise(i, (32, 32))).save(tmp_path / f"{i}.png")

    def find_sentences(seed):
        data, said = load(tmp_path, config, held_out_fraction=0.1, seed=seed)
        return len(data.summary["held_out"]), [line for line in said if "not 10%" in line]

    found = dict(find_sentences(seed) for seed in range(8))
    assert sorted(found) == [1, 12]  # each seed holds out one of the four groups
    assert found[1] == []
    assert len(found[12]) == 1
    assert "80% of the views are held out, not 10%: 12 of 15 micrographs" in found[12][0]


def test_folder_to_batches(folder, config):
    data, said = load(folder, config)
    summary = data.summary
    assert summary["name"] == "alloy"
    assert summary["num_micrographs"] == 6
    assert summary["num_tiles"] == 2 * (2 * 4) + 4 * (4 * 2)
    assert summary["num_views"] == 6 * summary["num_tiles"]
    assert summary["num_views"] == data.train.num_views + data.held_out.num_views
    assert summary["specimens"] == ["specimen_0", "specimen_1"]
    assert summary["pixel_size_nm"] is None  # known of some only
    assert not set(data.train.rows["micrograph"]) & set(data.held_out.rows["micrograph"])
    assert set(data.held_out.rows["micrograph"]) == set(summary["held_out"])
    batch = data.train.batch(range(data.train.num_views))
    assert batch.abs().max() <= 1
    assert any("of 16 bits: each scaled by its" in line for line in said)
    assert any("partly unknown" in line for line in said)
    json.dumps(summary)


def test_8_bit_pixels_come_back_exactly(tmp_path, noise, config):
    images = save_images(tmp_path, [noise(i, (16, 16)) for i in range(4)])
    data, _ = load(tmp_path, config, symmetries="none")
    for tiles in (data.train, data.held_out):
        pixels = to_uint8(tiles.batch(range(tiles.num_views)))
        for name, image in zip(tiles.rows["micrograph"], pixels):
            assert np.array_equal(image[0], images[int(name[0])])


def refuse_to_read(*_, **__):
    raise AssertionError("an image was read")


def test_second_start_reads_no_image_and_gives_the_same(folder, config, monkeypatch):
    first, _ = load(folder, config)
    monkeypatch.setattr(em_data.sources.folder, "read_micrographs", refuse_to_read)
    second, _ = load(folder, config)
    assert second.summary == first.summary
    assert second.train.fingerprint == first.train.fingerprint
    assert np.array_equal(second.train.batch([0, 5, 9]), first.train.batch([0, 5, 9]))


def test_second_start_with_10000_tiles_takes_less_than_2_seconds(tmp_path, noise, config):
    save_images(tmp_path, [noise(i, (320, 320)) for i in range(25)])
    for path in tmp_path.glob("*.png"):
        os.utime(path, (1e9, 1e9))
    data, _ = load(tmp_path, config)
    assert data.summary["num_tiles"] == 10_000
    start = time.perf_counter()
    load(tmp_path, config)
    assert time.perf_counter() - start < 2


def test_changed_pixel_is_a_new_cut(folder, config, noise):
    first, _ = load(folder, config)
    PIL.Image.fromarray(noise(77, (64, 33))).save(folder / "specimen_0" / "image 2.png")
    second, _ = load(folder, config)
    assert second.summary["fingerprint"] != first.summary["fingerprint"]
    assert second.train.fingerprint != first.train.fingerprint


def test_moved_folder_is_the_same_cut(folder, config, monkeypatch):
    first, _ = load(folder, config)
    moved = folder.rename(folder.parent / "moved")
    monkeypatch.setattr(em_data.sources.folder, "read_micrographs", refuse_to_read)
    assert load(moved, config)[0].train.fingerprint == first.train.fingerprint


def test_hashes_of_known_files_are_remembered_and_fresh_ones_are_not(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    first = hash_files([path], tmp_path / "cache")
    # too fresh to tell from a second change
    assert not (tmp_path / "cache" / "file_hashes.json").exists()
    os.utime(path, (1e9, 1e9))
    assert hash_files([path], tmp_path / "cache") == first
    monkeypatch.setattr("pathlib.Path.read_bytes", None)
    assert hash_files([path], tmp_path / "cache") == first
    monkeypatch.undo()
    path.write_bytes(b"two")
    os.utime(path, (1e9 + 1, 1e9 + 1))
    assert hash_files([path], tmp_path / "cache") != first


def test_damaged_cache_is_cut_again_and_said(folder, config, tmp_path):
    expected = load(folder, config)[0].train.batch(range(9))
    (path,) = (tmp_path / ".cache" / "tiles").glob("*/tiles.arrow")
    half = path.read_bytes()[:5000]
    path.unlink()  # a new file, since the old one is mapped
    path.write_bytes(half)
    data, said = load(folder, config)
    assert any("damaged" in line for line in said)
    assert np.array_equal(data.train.batch(range(9)), expected)


def spoil(folder, noise):
    """Add one file of each kind that cannot be used."""
    good = (folder / "specimen_0" / "image 2.png").read_bytes()
    (folder / "empty.tif").write_bytes(b"")
    (folder / "truncated.png").write_bytes(good[: len(good) // 2])
    (folder / "text.jpg").write_text("not an image")
    PIL.Image.fromarray(noise(0, (15, 90))).save(folder / "tiny.png")
    PIL.Image.fromarray(np.full((64, 64), 9, np.uint8)).save(folder / "constant.bmp")
    PIL.Image.fromarray(noise(0, (64, 64, 3))).save(folder / "coloured.png")
    values = noise(0, (64, 64)).astype(np.float32) / 7
    tifffile.imwrite(folder / "inf.tif", np.where(values > 30, np.inf, values))
    values[::2] = np.nan  # a few are filled, borders are cropped
    tifffile.imwrite(folder / "nan.tif", values)
    (folder / "dangling.tif").symlink_to(folder / "nowhere.tif")
    broken = ["empty.tif", "truncated.png", "text.jpg", "dangling.tif"]
    return broken + ["tiny.png", "constant.bmp", "coloured.png", "inf.tif", "nan.tif"]


def test_bad_images_are_named_in_one_summary_and_skipped(folder, config, noise):
    clean, _ = load(folder, config)
    bad = spoil(folder, noise)
    for _ in range(2):  # from the files, then from the cache
        data, said = load(folder, config)
        (summary,) = [line for line in said if "cannot be used" in line]
        assert summary.startswith("9 of 15 images cannot be used")
        for name in bad:
            assert name in summary
            assert any(name in line for line in data.summary["ignored"])
        assert "constant.bmp: constant: every pixel is 9" in summary
        assert "tiny.png: 15 x 90 pixels, smaller than one tile of 16" in summary
        assert data.summary["num_micrographs"] == 6
        assert data.summary["split_hash"] == clean.summary["split_hash"]


def test_bad_images_are_fatal_on_request(folder, config, noise):
    bad = spoil(folder, noise)
    for _ in range(2):
        with pytest.raises(ValueError, match="9 of 15 images cannot be used") as error:
            load(folder, config, on_bad_image="fail")
        assert all(name in str(error.value) for name in bad)
        load(folder, config)  # skipping them fills the cache; failing still fails


def test_nothing_usable_is_an_error_that_names_all(tmp_path, config):
    (tmp_path / "a.tif").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"x")
    problems = r"(?s)2 of 2 images.*a\.tif.*b\.png.*Nothing is left"
    with pytest.raises(ValueError, match=problems):
        load(tmp_path, config)
    problems = r"(?s)1 of 1 images.*not looked at: Only the first 1 of 2 micrographs are used"
    with pytest.raises(ValueError, match=problems):
        load(tmp_path, config, num_micrographs=1)


@pytest.mark.parametrize("seed", range(4))
def test_duplicates_stay_on_one_side_whatever_the_seed(tmp_path, noise, config, seed):
    images = [noise(i) for i in range(6)]
    save_images(tmp_path, [*images, np.rot90(images[0])])  # training would see it turned back
    data, said = load(tmp_path, config, seed=seed, held_out_fraction=0.5)
    held_out = data.summary["held_out"]
    assert ("0.png" in held_out) == ("6.png" in held_out)
    (line,) = [line for line in said if line.startswith("exact duplicates")]
    assert "each group stays on one side of the split: 0.png = 6.png" in line
    _, said = load(tmp_path, config, split="leaky")
    assert any(line.startswith("exact duplicates") for line in said)


def test_one_micrograph_needs_the_leaky_split(tmp_path, noise, config):
    PIL.Image.fromarray(noise(0, (64, 64))).save(tmp_path / "only.png")
    with pytest.raises(ValueError, match=r"only\.png.*--tiles\.split leaky"):
        load(tmp_path, config)
    data, said = load(tmp_path, config, split="leaky")
    assert data.train.num_views + data.held_out.num_views == 16 * 6
    assert any("leaky" in line for line in said)
    seen = data.train.batch(range(data.train.num_views))
    assert len(seen) == data.train.num_views == round(0.9 * 96)
    tile_ids, symmetry = data.held_out.locate([0, 3])
    raw = data.held_out.raw(tile_ids)
    assert raw.shape == (2, data.held_out.resolution, data.held_out.resolution)
    assert 0 <= symmetry.min() <= symmetry.max() < 6


def test_specimens_by_folder_or_pattern(folder, config):
    data, _ = load(folder, config, split="specimen")
    assert len(set(data.train.rows["specimen"])) == len(set(data.held_out.rows["specimen"])) == 1
    data, _ = load(folder, config, specimen_pattern=r"image (\d)")
    assert data.summary["specimens"] == list("012345")


def test_label_folders_and_other_files_are_left_out_and_said(folder, config, noise):
    for name in ("masks1/1.png", "labels/2.png", "specimen_0/a_mask.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(noise(5)).save(folder / name)
    (folder / "notes.txt").write_text("notes")
    (folder / "raw.dm4").write_bytes(b"dm4")
    data, said = load(folder, config)
    assert data.summary["num_micrographs"] == 6
    for part in ("masks1/", "labels/", "files named as labels", ".dm4"):
        assert any(part in line for line in said)


def test_hot_pixels_are_clipped_and_said(tmp_path, noise, config):
    for i in range(2):
        image = noise(i, (64, 64), np.uint16) // 64
        image[3, 3] = 65535
        tifffile.imwrite(tmp_path / f"{i}.tif", image)
    for downsample in (1, 2):
        data, said = load(tmp_path, config, downsample=downsample)
        assert any("1 spike (isolated outliers, 0.024 %" in line for line in said)
        assert data.summary["fraction_clipped"] == 1 / 64**2
        assert data.train.batch([0]).std() > 0.2
    data, said = load(tmp_path, config, intensity="percentile")
    assert 0 < data.summary["fraction_clipped"] < 0.002
    assert any("% clipped" in line for line in said)


def test_pixel_size_by_pattern_is_that_of_files_without_one(tmp_path, noise, config):
    folder = tmp_path / "fov96nm"  # 48 pixels wide
    folder.mkdir()
    save_images(folder, [noise(i) for i in range(2)])
    pattern = r"fov(?P<fov>\d+)nm"
    for source, changes, size in (
        (tmp_path, {"pixel_size_pattern": pattern}, 2.0),
        (folder, {"pixel_size_pattern": pattern}, 2.0),
        (folder, {"pixel_size_pattern": pattern, "downsample": 2}, 4.0),
        (folder, {"pixel_size_pattern": pattern, "pixel_size_nm": 3.0}, 2.0),
        (folder, {"pixel_size_pattern": r"mag(?P<fov>\d+)", "pixel_size_nm": 3.0}, 3.0),
    ):
        assert load(source, config, **changes)[0].summary["pixel_size_nm"] == size
    _, said = load(folder, config)
    (line,) = [line for line in said if "no file states its pixel size" in line]
    assert "--tiles.pixel-size-nm" in line
    assert "--tiles.pixel-size-pattern" in line
    size = {"resolution": (2e7, 2e7), "resolutionunit": 3}
    tifffile.imwrite(folder / "2.tif", noise(2), **size)
    data, _ = load(folder, config, pixel_size_pattern=pattern)
    assert data.summary["pixel_size_nm"] is None  # 2 nm and 0.5 nm


def test_the_same_notice_of_many_files_is_one_line(tmp_path, noise, config):
    for i in range(5):
        tifffile.imwrite(tmp_path / f"{i}.tif", noise(i) / np.float32(7 + i))
    _, said = load(tmp_path, config)
    (line,) = [line for line in said if "float32 scaled" in line]
    assert line.startswith("0.tif: ")
    assert line.endswith("(and 4 more micrographs likewise)")


def test_cache_that_cannot_be_written_is_an_error_with_the_way_out(folder, config, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"--tiles\.cache-dir"):
        load(folder, config, cache_dir=str(tmp_path / "file"))


def test_names_of_label_folders():
    labels = ["masks", "mask", "masks1", "Labels", "labels_yolo_polygon", "GT", "ground_truth"]
    for name in [*labels, "annotations"]:
        assert LABEL_FOLDER.match(name), name
    for name in ("images", "-tubes", "maskelynite", "specimen", "gtx", "masked-etching"):
        assert not LABEL_FOLDER.match(name), name


@pytest.mark.parametrize("source", ["no/such/folder", "synthetik", "datasets:/no/such/set"])
def test_unknown_source_is_refused(source, config, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="datasets:"):
        load(source, config)


def test_folder_without_images_is_refused(tmp_path, config):
    with pytest.raises(ValueError, match="holds no TIFF"):
        load(tmp_path, config)


def test_first_so_many_micrographs_in_natural_order(tmp_path, noise, config):
    for i in (1, 2, 10):
        PIL.Image.fromarray(noise(i)).save(tmp_path / f"frame {i}.png")
    data, said = load(tmp_path, config, num_micrographs=2)
    used = set(data.train.rows["micrograph"]) | set(data.held_out.rows["micrograph"])
    assert used == {"frame 1.png", "frame 2.png"}
    assert "Only the first 2 of 3 micrographs are used: --tiles.num-micrographs is 2." in said
    assert any("3 micrographs look like" in line for line in load(tmp_path, config)[1])
    assert not any("frames" in line for line in load(tmp_path, config, split="leaky")[1])
    data, said = load(tmp_path, config, pixel_size_nm=0.5, downsample=2)
    assert data.summary["pixel_size_nm"] == 1.0
    last = [line for line in said if " for training, " in line]
    assert "3 micrographs: 2 for training, 1 held out; 3 tiles of 16 px" in last[0]


def test_dataset_of_images_keeps_16_bits(tmp_path, noise, config):
    images = [noise(i, (32, 32), np.uint16) for i in range(3)]
    for i, image in enumerate(images):
        # PIL, and so `datasets`, reads 16-bit colour as 8 bits
        stored = image if i else np.stack([image] * 3, axis=-1)
        (tmp_path / f"{i}.png").write_bytes(imagecodecs.png_encode(stored))
    table = {
        "image": [str(tmp_path / f"{i}.png") for i in range(3)],
        "pixel_size_nm": [0.5] * 3,
        "specimen": list("aab"),
    }
    dataset = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "set")
    for source in (f"datasets:{tmp_path / 'set'}", tmp_path / "set"):
        data, _ = load(source, config, symmetries="none", on_bad_image="fail")
        assert data.summary["pixel_size_nm"] == 0.5
        assert data.summary["specimens"] == ["a", "b"]
        for tiles in (data.train, data.held_out):
            for i, row in enumerate(tiles.rows):
                image = images[int(row["micrograph"][-6:])]
                expected = image[row["row_px"] :, row["col_px"] :][:16, :16]
                assert np.array_equal(tiles.raw([i])[0], expected)


def test_our_own_tiles_as_a_dataset_keep_micrographs_whole(folder, config, tmp_path):
    data, _ = load(folder, config)
    data.train.rows.save_to_disk(tmp_path / "tiles_set")
    again, _ = load(f"datasets:{tmp_path / 'tiles_set'}", config)
    assert again.summary["num_tiles"] == data.train.num_tiles
    sides = [
        {name.rsplit("_", 1)[0] for name in side.rows["micrograph"]}
        for side in (again.train, again.held_out)
    ]
    assert not sides[0] & sides[1]


def test_embedded_data(config):
    changes = {"num_micrographs": 3, "micrograph_size": 64, "resolution": 32}
    data, _ = load("synthetic", config, **changes)
    assert data.summary["name"] == "synthetic"
    assert data.summary["num_tiles"] == 12
    assert data.summary["pixel_size_nm"] > 0
    again, _ = load("synthetic", config, **changes)
    assert again.train.fingerprint == data.train.fingerprint
    other, _ = load("synthetic", config, **changes, seed=1)
    assert other.train.fingerprint != data.train.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"symmetries": "c4"},
        {"split": "random"},
        {"resolution": 0},
        {"held_out_fraction": 1.0},
        {"percentiles": (99, 1)},
        {"intensity": "stretch"},
        {"on_bad_image": "ignore"},
        {"label_bar": "blur"},
        {"num_micrographs": 0},
        {"downsample": 0},
        {"pixel_size_pattern": "fov("},
        {"pixel_size_pattern": r"fov(\d+)"},
    ],
)
def test_impossible_configuration_is_refused(change):
    with refuses_config(f"tiles.{next(iter(change))} is .*(Use|Correct) --tiles."):
        DataConfig(**change)


def test_a_failed_split_says_that_micrographs_were_left_out(noise, config, tmp_path):
    for seed, name in enumerate(("a/1", "a/2", "b/1")):
        path = tmp_path / "set" / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, noise(seed, (64, 64)))
    said = r"only one specimen.*Only the first 2 of 3 micrographs"
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "set", config, split="specimen", num_micrographs=2)


def test_synthetic_micrographs_are_numbered(config):
    data, _ = load("synthetic", config, num_micrographs=3, micrograph_size=64)
    names = [each["name"] for each in data.train.cut.micrographs]
    assert names == ["synthetic_00000", "synthetic_00001", "synthetic_00002"]


def test_a_number_of_synthetic_micrographs_limits_no_folder(folder, config):
    few, _ = load("synthetic", config, num_synthetic=3, micrograph_size=64)
    same, _ = load("synthetic", config, num_micrographs=3, micrograph_size=64)
    assert few.identity == same.identity
    assert few.summary["num_micrographs"] == 3
    assert load(folder, config, num_synthetic=2)[0].summary["num_micrographs"] == 6


def test_load_tiles_says_how_micrographs_were_read(tmp_path, noise, config):
    for i in range(2):
        tifffile.imwrite(tmp_path / f"{i}.tif", noise(i).astype(np.float32) / 7)
    said = []
    load_tiles(tmp_path, config(cache_dir=str(tmp_path / "cache")), log=said.append)
    assert any("float32 scaled to 16 bits" in each for each in said)
