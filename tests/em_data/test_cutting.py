import json
from unittest import mock

import numpy as np
import pytest

from em_data import Micrograph, Tiles
from em_data.cutting import average_area, cut, find_tile_positions, make_cut_key
from em_data.sources.base import Entry, Source
from em_data.tiles import Cut
from em_data.views import ELEMENTS, SYMMETRIES, apply_symmetry, hash_pixels
from em_evaluation.images import find_micrographs


def test_the_studys_micrographs_give_its_62400_views():
    shapes = [(1024, 1024)] * 442 + [(2048, 2048)] * 52
    num_tiles = sum(len(find_tile_positions(shape, 256)) for shape in shapes)
    assert num_tiles == 10_400
    assert num_tiles * len(SYMMETRIES["paper"]) == 62_400


def test_cutter_cuts_what_the_count_says(noise, tiles_of):
    """The study's set, an eighth as large: 1024, 2048 and 256 become 128, 256 and 32."""
    shapes = [(128, 128)] * 442 + [(256, 256)] * 52
    micrographs = [Micrograph(noise(i, shape), f"{i}") for i, shape in enumerate(shapes)]
    tiles = tiles_of(micrographs, "paper", resolution=32)
    assert (tiles.num_tiles, tiles.num_views, len(tiles.rows)) == (10_400, 62_400, 10_400)
    assert len(tiles.cut.chunks) < 10


@pytest.mark.parametrize(
    ("shape", "resolution", "downsample"), [((37, 90), 16, 1), ((37, 90), 8, 2), ((16, 16), 16, 1)]
)
def test_positions_cover_without_overlap(shape, resolution, downsample):
    side, covered = resolution * downsample, np.zeros(shape, int)
    for row, col in find_tile_positions(shape, resolution, downsample):
        patch = covered[row : row + side, col : col + side]
        assert patch.shape == (side, side)
        patch += 1
    assert covered.max() == 1
    assert covered.sum() == (shape[0] // side) * (shape[1] // side) * side**2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_area_average_equals_its_slow_twin(dtype, noise):
    image = noise(0, (13, 20), dtype)
    fast = average_area(image, 3)
    assert fast.dtype == dtype
    assert fast.shape == (4, 6)
    for i, j in np.ndindex(4, 6):
        square = image[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
        assert fast[i, j] == round(float(np.mean(square.astype(float))))
    assert average_area(image, 1) is image


def test_tiles_are_the_pixels_at_their_positions(noise, tiles_of):
    images = [noise(i, (40, 70), np.uint16) for i in range(3)]
    micrographs = [Micrograph(image, f"m{i}", 0.5, f"s{i}") for i, image in enumerate(images)]
    tiles = tiles_of(micrographs)
    assert tiles.num_tiles == 3 * 2 * 4
    for i, row in enumerate(tiles.rows.with_format("numpy")):
        micrograph = micrographs[int(str(row["micrograph"])[1:])]
        top, left = row["row_px"], row["col_px"]
        expected = micrograph.image[top : top + 16, left : left + 16]
        assert np.array_equal(row["tile"], expected)
        assert np.array_equal(tiles.raw([i])[0], expected)
        assert (row["pixel_size_nm"], str(row["specimen"])) == (0.5, micrograph.specimen)
        assert (row["low"], row["high"]) == (micrograph.image.min(), micrograph.image.max())
    assert tiles.raw([0]).dtype == np.uint16


def test_downsampled_tiles_are_cut_from_the_average_and_know_their_pixel_size(noise, tiles_of):
    image = noise(0, (70, 101))
    tiles = tiles_of([Micrograph(image, "m", 0.5)], downsample=2)
    assert tiles.num_tiles == 2 * 3
    small = average_area(image, 2)
    for i, row in enumerate(tiles.rows.with_format("numpy")):
        top, left = row["row_px"] // 2, row["col_px"] // 2
        assert np.array_equal(tiles.cut.tile(i), small[top : top + 16, left : left + 16])
        assert row["pixel_size_nm"] == 1.0


def test_8_and_16_bits_side_by_side_keep_their_grey_levels(config, noise, source_of, tmp_path):
    eight, sixteen = noise(0), noise(1, dtype=np.uint16)
    source = source_of([Micrograph(eight, "eight"), Micrograph(sixteen, "sixteen")])
    for entry in source.entries:
        entry.frames = mock.Mock(wraps=entry.frames)
    cut(source, config(), tmp_path / "cut")
    assert [entry.frames.call_count for entry in source.entries] == [1, 1]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["cut.json", "tiles.arrow"]
    made = Cut(tmp_path / "cut")
    tiles = Tiles(made, np.arange(made.num_tiles), "none")
    assert np.array_equal(tiles.raw([0])[0], eight[:16, :16])
    assert np.array_equal(tiles.raw([6])[0], sixteen[:16, :16])
    np.testing.assert_allclose(tiles.batch([0])[0, 0], eight[:16, :16] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("symmetries", SYMMETRIES)
def test_a_batch_equals_its_slow_twin(symmetries, noise, tiles_of):
    """View by view, from the micrograph, in float64."""
    micrographs = [Micrograph(noise(i, (40, 50), np.uint16), str(i)) for i in range(3)]
    tiles = tiles_of(micrographs, symmetries, intensity="percentile", percentiles=(5, 95))
    names = SYMMETRIES[symmetries]
    views = np.random.default_rng(0).permutation(tiles.num_views)
    batch = tiles.batch(views)
    assert batch.shape == (tiles.num_views, 1, 16, 16)
    for view, image in zip(views, batch):
        row = tiles.rows[int(view) // len(names)]
        image_of_row = micrographs[int(row["micrograph"])].image
        pixels = image_of_row[row["row_px"] :, row["col_px"] :][:16, :16]
        expected = 2 * (pixels.astype(float) - row["low"]) / (row["high"] - row["low"]) - 1
        expected = apply_symmetry(np.clip(expected, -1, 1), names[int(view) % len(names)])
        np.testing.assert_allclose(image[0], expected, atol=3e-7)


def test_two_sides_number_their_own_tiles(noise, tiles_of):
    everything = tiles_of([Micrograph(noise(i), str(i)) for i in range(3)], "paper")
    views = np.arange(everything.num_views).reshape(3, -1)  # by micrograph
    middle = Tiles(everything.cut, views[1], "paper")
    assert np.array_equal(middle.batch(range(12)), everything.batch(views[1][:12]))
    assert set(middle.rows["micrograph"]) == {"1"}
    assert middle.fingerprint != everything.fingerprint
    tile_ids, symmetry = middle.locate(range(middle.num_views))
    assert np.array_equal(tile_ids * 6 + symmetry, np.arange(middle.num_views))


def test_killed_cut_leaves_nothing_that_looks_whole(config, noise, tmp_path, source_of):
    source = source_of([Micrograph(noise(0), "a"), Micrograph(noise(1), "b")])

    def die():
        raise KeyboardInterrupt

    source.entries[1].frames = die
    with pytest.raises(KeyboardInterrupt):
        cut(source, config(), tmp_path / "tiles" / "key")
    assert list((tmp_path / "tiles").iterdir()) == []


def test_two_processes_that_cut_at_once_leave_one_whole_cut(config, noise, tmp_path, source_of):
    source, folder = source_of([Micrograph(noise(0), "a")]), tmp_path / "tiles" / "key"
    read = source.entries[0].frames
    other = source_of([Micrograph(noise(0), "a")])

    def read_while_another_finishes():
        cut(other, config(), folder)
        return read()

    source.entries[0].frames = read_while_another_finishes
    cut(source, config(), folder)
    assert Cut(folder).num_tiles == 6
    assert [path.name for path in folder.parent.iterdir()] == ["key"]


def test_every_part_of_the_recipe_is_in_the_key(config, noise, source_of):
    source = source_of([Micrograph(noise(0), "a")])
    others = {"split": "leaky", "seed": 7, "symmetries": "d4", "held_out_fraction": 0.3}
    same = config(on_bad_image="fail", **others)
    assert make_cut_key(source, same) == make_cut_key(source, config())
    changes = [{"resolution": 8}, {"downsample": 2}, {"intensity": "full"}, {"label_bar": "keep"}]
    changes += [{"pixel_size_nm": 2.0}, {"pixel_size_pattern": "(?P<fov>)"}]
    changes.append({"intensity": "percentile"})
    changes.append({"intensity": "percentile", "percentiles": (1.0, 99.0)})
    keys = {make_cut_key(source, config(**change)) for change in [{}, *changes]}
    source.entries[0].key = "changed"
    assert len(keys | {make_cut_key(source, config())}) == len(changes) + 2


def test_damaged_cut_is_not_read(noise, tiles_of, tmp_path):
    tiles_of([Micrograph(noise(0), "a")])
    facts = json.loads((tmp_path / "cut" / "cut.json").read_text())
    assert facts["micrographs"][0]["num_tiles"] == 6
    with open(tmp_path / "cut" / "tiles.arrow", "ab") as file:
        file.truncate(1000)
    with pytest.raises(OSError, match="bytes"):
        Cut(tmp_path / "cut")


@pytest.mark.parametrize("shape", [(9, 9), (8, 11)])
def test_pixel_hash_is_shared_by_all_views_and_by_nothing_else(shape, noise):
    images = [noise(0, shape), noise(0, shape) // 128, noise(1, shape, np.uint16)]
    for image in [*images, np.ones(shape, np.uint8)]:
        assert len({hash_pixels(apply_symmetry(image, name)) for name in ELEMENTS}) == 1
        changed = image.copy()
        changed[3, 2] ^= 1
        assert hash_pixels(changed) != hash_pixels(image)
    image = noise(0, shape)
    assert hash_pixels(np.roll(image, 1, axis=0)) != hash_pixels(image)
    assert hash_pixels(image.astype(np.uint16)) != hash_pixels(image)


def make_padded(kind, dtype, level):
    """An image of 160 x 160 pixels, and the tiles of 16 x 16 with at most 10 % padding."""
    image = np.random.default_rng(0).normal(100, 10, (160, 160)).round().astype(dtype)
    is_kept = np.ones((10, 10), bool)
    if kind == "shifted frame":
        image[:20] = image[:, 133:] = level
        is_kept[:2] = is_kept[:, 8:] = False
    elif kind == "border":
        image[:16] = image[-16:] = image[:, :16] = image[:, -16:] = level
        is_kept[[0, -1]] = is_kept[:, [0, -1]] = False
    elif kind == "thin border":
        image[:1] = image[-1:] = level
    elif kind == "mosaic":
        image[:64, 96:] = image[112:, :40] = level
        is_kept[:4, 6:] = is_kept[7:, :3] = False
    return image, is_kept


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["shifted frame", "border", "thin border", "mosaic"])
def test_tiles_of_padding_are_left_out_and_said(kind, dtype, level, tiles_of, tmp_path):
    image, is_kept = make_padded(kind, dtype, level)
    tiles = tiles_of([Micrograph(image, "m")])
    found = set(zip(tiles.rows["row_px"], tiles.rows["col_px"]))
    assert found == {(16 * row, 16 * col) for row, col in np.argwhere(is_kept).tolist()}
    (facts,) = json.loads((tmp_path / "cut" / "cut.json").read_text())["micrographs"]
    num = int((~is_kept).sum())
    assert facts["notices"] == (
        [f"{num} of 100 tiles left out: one grey level, or more than 10% padding"] if num else []
    )
    if dtype == np.uint16 and kind != "thin border":  # padding does not take the contrast
        inside = image[image != level]
        assert (tiles.cut.low[0], tiles.cut.high[0]) == (inside.min(), inside.max())


def test_padding_is_found_before_averaging(tiles_of):
    image, is_kept = make_padded("mosaic", np.uint8, 0)
    tiles = tiles_of([Micrograph(image, "m")], downsample=2, resolution=8)
    assert tiles.num_tiles == is_kept.sum()


REGIONS = {
    "disc": lambda rows, columns: (rows - 40) ** 2 + (columns - 3) ** 2 < 45**2,
    "slope": lambda rows, columns: rows + columns / 3 > 170,
    "waves": lambda rows, columns: columns > 120 + 8 * np.sin(rows / 9),
    "half of the pixels": lambda rows, columns: np.random.default_rng(1).random(rows.shape) < 0.6,
}


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("kind", REGIONS)
def test_dark_and_saturated_regions_keep_their_tiles(kind, level, tiles_of):
    image = np.random.default_rng(0).normal(100, 10, (160, 160)).round().astype(np.uint8)
    image[REGIONS[kind](*np.indices(image.shape))] = level
    squares = image.reshape(10, 16, 10, 16).swapaxes(1, 2).reshape(100, -1)
    tiles = tiles_of([Micrograph(image, "m")])
    assert tiles.num_tiles == (squares.min(axis=1) != squares.max(axis=1)).sum()


def test_image_without_a_tile_is_a_problem(config, source_of, tmp_path):
    image = np.zeros((32, 32), np.uint8)
    image[28:, 28:] = 100 + np.arange(16).reshape(4, 4)  # with two levels it would be a mask
    cut(source_of([Micrograph(image, "dark")]), config(), tmp_path / "cut")
    facts = json.loads((tmp_path / "cut" / "cut.json").read_text())
    assert not facts["micrographs"]
    assert facts["problems"] == ["dark: every tile has one grey level or more than 10% padding"]


def test_frames_of_a_stack_and_copies_are_one_group(config, noise, tmp_path):
    frames = [Micrograph(noise(i), f"stack#{i:04d}") for i in range(3)]
    source = Source(
        "given",
        [
            Entry("stack", "1", lambda: frames),
            Entry("a", "2", lambda: [Micrograph(noise(7), "a")]),
            Entry("b", "3", lambda: [Micrograph(noise(7)[::-1].copy(), "b")]),
        ],
        [],
    )
    cut(source, config(), tmp_path / "cut")
    made = Cut(tmp_path / "cut")
    tiles = Tiles(made, np.arange(6, made.num_tiles), "none")
    assert tiles.groups.tolist() == ["stack"] * 12 + ["a"] * 12
    assert find_micrographs(tiles, [0, 23]).tolist() == ["stack", "a"]
