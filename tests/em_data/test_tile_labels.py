"""Labels go with the pixels: through cutting, averaging, symmetries and batches."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from em_data import BatchLoader, Defect, ImageSampler, Micrograph, load_data
from em_data.labels import draw_whole_mask
from em_data.tile_labels import IS_CUT, downsample_defect
from em_data.views import SYMMETRIES, apply_symmetry


@pytest.fixture
def labelled(noise):
    """Micrographs with overlapping defects of random shapes; one without labels."""

    def make(num=3, shape=(40, 70), per_micrograph=9):
        rng, made = np.random.default_rng(5), []
        for i in range(num):
            defects = []
            for kind in itertools.islice(itertools.cycle(["void", "a loop", "Ω"]), per_micrograph):
                height, width = rng.integers(1, 20, 2)
                y, x = rng.integers(0, shape[0] - height), rng.integers(0, shape[1] - width)
                mask = rng.random((height, width)) < 0.6
                mask[:, 0] = mask[:, -1] = mask[0] = mask[-1] = True
                box = tuple(int(each) for each in (x, y, x + width, y + height))
                defects.append(Defect(kind, box, mask if rng.random() < 0.8 else None, 3.0))
            classes = "steel", "titanium"
            made.append(Micrograph(noise(i, shape), f"m{i}", defects=defects))
            made[-1].class_name = classes[i % 2]
        return [*made, Micrograph(noise(99, shape), "unlabelled")]

    return make


def draw_kinds(micrograph, kinds):
    masks = np.zeros((len(kinds), *micrograph.image.shape), np.float32)
    for defect in micrograph.defects or ():
        masks[kinds.index(defect.kind)][draw_whole_mask(defect, micrograph.image.shape)] = 1
    return masks


def test_masks_of_tiles_are_the_masks_at_their_positions(labelled, tiles_of):
    micrographs = labelled()
    tiles = tiles_of(micrographs, "d4")
    assert tiles.kinds == ("a loop", "void", "Ω")
    whole = [draw_kinds(each, tiles.kinds) for each in micrographs]
    rows = tiles.rows.with_format("numpy")
    masks = tiles.masks(np.arange(tiles.num_views))
    assert masks.dtype == torch.float32
    for view_id, mask in enumerate(masks.numpy()):
        (tile,), (symmetry,) = tiles.locate([view_id])
        row = rows[int(tile)]
        top, left = row["row_px"], row["col_px"]
        expected = whole[row["micrograph_index"]][:, top : top + 16, left : left + 16]
        assert np.array_equal(mask, apply_symmetry(expected, SYMMETRIES["d4"][symmetry]))
        drawn = np.zeros_like(mask)
        for defect in tiles.defects(view_id):
            x0, y0, x1, y1 = defect.box_px
            assert 0 <= x0 < x1 <= 16
            assert 0 <= y0 < y1 <= 16
            inside = np.ones((y1 - y0, x1 - x0), bool) if defect.mask is None else defect.mask
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges)
            drawn[tiles.kinds.index(defect.kind), y0:y1, x0:x1] += inside
        assert np.array_equal(drawn > 0, mask > 0)
    num_per_micrograph = 2 * 4
    assert tiles.is_labelled.tolist() == [True] * 3 * num_per_micrograph + [False] * 8
    expected = np.repeat([0, 1, 0, -1], num_per_micrograph * 8)
    assert np.array_equal(tiles.class_labels(np.arange(tiles.num_views)), expected)


def test_overlapping_defects_stay_whole(noise, tiles_of):
    over = [Defect("dot", (2, 2, 8, 8), np.ones((6, 6), bool), 4.0) for _ in range(2)]
    cut = Defect("dot", (10, 3, 20, 6), None)
    tiles = tiles_of([Micrograph(noise(), "m", defects=[*over, cut])])
    found = tiles.defects(0)
    assert [each.box_px for each in found] == [(2, 2, 8, 8), (2, 2, 8, 8), (10, 3, 16, 6)]
    assert [each.metadata[IS_CUT] for each in found] == [False, False, True]
    assert [each.diameter_nm for each in found] == [4.0, 4.0, None]
    assert all(each.mask.all() for each in found[:2])
    assert found[2].mask is None
    assert [each.box_px for each in tiles.defects(1)] == [(0, 3, 4, 6)]
    assert tiles.defects(5) == []


@pytest.mark.parametrize("factor", [2, 3])
def test_downsampled_masks_are_those_of_the_averaged_mask(labelled, tiles_of, factor):
    micrographs = labelled(shape=(100, 140))
    tiles = tiles_of(micrographs, downsample=factor)
    rows = tiles.rows.with_format("numpy")
    shares = []
    for each in micrographs:
        height, width = (side // factor for side in each.image.shape)
        averaged = np.zeros((3, height, width), np.float32)
        for defect in each.defects or ():
            whole = draw_whole_mask(defect, each.image.shape)[: height * factor, : width * factor]
            share = whole.reshape(height, factor, width, factor).mean(axis=(1, 3))
            kept = share >= 0.5
            if not kept.any() and share.any():
                kept.flat[share.argmax()] = True
            if defect.mask is None and kept.any():  # a box stays a box
                rows_kept, columns_kept = kept.any(axis=1), kept.any(axis=0)
                kept = rows_kept[:, None] & columns_kept
            averaged[tiles.kinds.index(defect.kind)][kept] = 1
        shares.append(averaged)
    for i in range(tiles.num_tiles):
        top, left = rows[i]["row_px"] // factor, rows[i]["col_px"] // factor
        expected = shares[rows[i]["micrograph_index"]][:, top : top + 16, left : left + 16]
        assert np.array_equal(tiles.masks([i])[0], expected)


def test_a_defect_that_vanishes_keeps_the_pixel_that_it_covers_most():
    mask = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1]], bool)
    small = downsample_defect(Defect("dot", (3, 3, 6, 6), mask), (16, 16), 4)
    assert small.box_px == (1, 1, 2, 2)
    assert small.mask.tolist() == [[True]]
    outside = downsample_defect(Defect("dot", (12, 12, 16, 16), None), (15, 15), 4)
    assert outside is None


def test_tiles_without_labels_have_no_file_of_them(noise, tiles_of, tmp_path):
    tiles = tiles_of([Micrograph(noise(), "m")], "paper")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["cut.json", "tiles.arrow"]
    assert tiles.kinds == tiles.class_names == ()
    assert tiles.class_labels([0, 1]) is None
    assert tiles.masks([0, 1]).shape == (2, 0, 16, 16)
    assert tiles.defects(0) == []
    assert not tiles.is_labelled.any()


def test_batches_hold_masks_and_classes(labelled, tiles_of):
    tiles = tiles_of(labelled(), "paper")
    sampler = ImageSampler(tiles.num_views, seed=1)
    batch = next(iter(BatchLoader(tiles, sampler, batch_size=6, with_masks=True)))
    assert torch.equal(batch.masks, tiles.masks(batch.ids.numpy()))
    assert torch.equal(batch.class_labels, tiles.class_labels(batch.ids.numpy()))
    assert next(iter(BatchLoader(tiles, sampler, batch_size=6))).masks is None


def test_masks_of_data_without_labels_are_refused(noise, tiles_of):
    tiles = tiles_of([Micrograph(noise(), "m")])
    with pytest.raises(ValueError, match="nothing in the data is labelled"):
        BatchLoader(tiles, ImageSampler(tiles.num_views), batch_size=2, with_masks=True)


def test_the_summary_counts_kinds_and_classes(config):
    data = load_data("synthetic", config(num_synthetic=3, micrograph_size=64), log=lambda _: None)
    assert data.summary["num_labelled_micrographs"] == 3
    assert data.summary["classes"] == {}
    assert set(data.summary["kinds"]) == set(data.train.kinds) == set(data.held_out.kinds)
    assert min(data.summary["kinds"].values()) > 0


@pytest.mark.parametrize("kind", ["", " ", "a\nb", None, 3])
def test_a_kind_is_a_printable_name(kind):
    with pytest.raises(ValueError, match="kind of a defect"):
        Defect(kind, (0, 0, 1, 1))


def test_damaged_labels_are_noticed(labelled, tiles_of, tmp_path):
    tiles = tiles_of(labelled())
    path = tmp_path / "cut" / "labels.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"labels\.npz"):
        type(tiles.cut)(tmp_path / "cut")


def test_a_mask_of_another_size_is_refused(noise, tiles_of):
    defect = replace(Defect("dot", (2, 2, 8, 8)), mask=np.ones((5, 6), bool))
    with pytest.raises(ValueError, match=r"the mask of a defect \(dot\) is \[5, 6\]"):
        tiles_of([Micrograph(noise(), "m", defects=[defect])])
