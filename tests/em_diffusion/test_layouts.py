"""Layouts that are drawn are like those that were labelled, and tests of that can fail."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from em_data import DataConfig, load_data
from em_data.micrograph import Defect
from em_data.synthetic_micrographs import synthesise_micrographs
from em_diffusion.em_layout_sampler import EMLayoutSampler, turn_mask
from em_diffusion.layouts import draw_layout, fit_layout_sampler, measure_densities, stitch_layouts
from em_evaluation.layouts import compare_layouts, describe_tests, measure_layout

KINDS = ("loop_111", "loop_100", "dot")


@pytest.fixture(scope="module")
def labelled():
    """(layouts, shapes) of simulated micrographs."""
    micrographs = [*synthesise_micrographs(12, seed=3, size=256)]
    return [each.defects for each in micrographs], [(256, 256)] * len(micrographs)


@pytest.fixture(scope="module")
def sampler(labelled):
    return fit_layout_sampler(*labelled, 1.0, KINDS)


def draw(sampler, number, shape=(256, 256)):
    return [draw_layout(sampler, *shape, torch.Generator().manual_seed(i)) for i in range(number)]


def make_disc(kind, x, y, radius):
    """A disc as a defect, with its centre at a pixel."""
    reach = np.arange(-radius, radius + 1)
    mask = np.hypot(reach[:, None], reach[None]) <= radius
    return Defect(kind, (x - radius, y - radius, x + radius + 1, y + radius + 1), mask)


def test_counts_sizes_distances_and_overlaps_are_those_of_the_labelled_images(labelled, sampler):
    layouts, shapes = labelled
    drawn = draw(sampler, 12)
    tests = compare_layouts(layouts, drawn, shapes, shapes, 1.0, KINDS)
    assert {(each.quantity, each.kind) for each in tests} >= {
        (quantity, kind)
        for quantity in ("count", "size", "distance", "overlap")
        for kind in (*KINDS, "all")
    }
    assert min(each.p_value for each in tests) > 0.005, describe_tests(tests)
    for each in tests:
        if each.quantity == "size":
            assert each.drawn == pytest.approx(each.real, rel=0.1)


def test_the_tests_find_other_layouts(labelled, sampler):
    layouts, shapes = labelled
    dense = [[*each, *other] for each, other in zip(draw(sampler, 12), draw(sampler, 24)[12:])]
    tests = compare_layouts(layouts, dense, shapes, shapes, None, KINDS)
    found = {(each.quantity, each.kind): each for each in tests}
    for quantity in ("count", "distance", "overlap"):
        assert found[quantity, "all"].p_value < 0.02
    assert found["size", "all"].p_value > 0.01
    assert found["size", "dot"].unit == "px"


def test_a_layout_depends_on_its_generator_alone_and_survives_saving(sampler, tmp_path):
    sampler.save_pretrained(tmp_path)
    loaded = EMLayoutSampler.from_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == [
        "diffusion_pytorch_model.safetensors"
    ]
    for i in range(3):
        first, second = (
            each.sample(96, 64, torch.Generator().manual_seed(i)) for each in (sampler, loaded)
        )
        assert len(first) == len(second) > 0
        for (kind, box, mask), (other, other_box, other_mask) in zip(first, second):
            assert (kind, box) == (other, other_box)
            np.testing.assert_array_equal(mask, other_mask)
            x0, y0, x1, y1 = box
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 96
            assert mask.shape == (y1 - y0, x1 - x0)
            assert mask.any(axis=0)[[0, -1]].all()
            assert mask.any(axis=1)[[0, -1]].all()


def crop(layout, x, y, side):
    """The part of a layout that a tile sees."""
    seen = []
    for each in layout:
        x0, y0, x1, y1 = each.box_px
        left, top, right, bottom = max(x0, x), max(y0, y), min(x1, x + side), min(y1, y + side)
        if left < right and top < bottom:
            mask = each.mask[top - y0 : bottom - y0, left - x0 : right - x0]
            if mask.any():
                box = (left - x, top - y, right - x, bottom - y)
                seen.append(Defect(each.kind, box, mask))
    return seen


def test_small_layouts_are_like_tiles_of_large_images(labelled, sampler):
    tiles = [crop(each, x, y, 64) for each in labelled[0] for x in (0, 96, 192) for y in (0, 128)]
    drawn = draw(sampler, 72, (64, 64))
    shapes = [(64, 64)] * 72
    tests = compare_layouts(tiles, drawn, shapes, shapes, 1.0, KINDS)
    assert min(each.p_value for each in tests) > 0.005, describe_tests(tests)
    of_tiles = fit_layout_sampler(tiles, shapes, 1.0, KINDS)
    tests = compare_layouts(tiles, draw(of_tiles, 72, (64, 64)), shapes, shapes, 1.0, KINDS)
    assert min(each.p_value for each in tests) > 0.005, describe_tests(tests)


def test_hard_cores_are_kept():
    rng = np.random.default_rng(0)
    layouts = []
    for _ in range(6):
        centres = []
        while len(centres) < 30:
            place = rng.integers(0, 200, 2)
            if all(math.dist(place, each) > 26 for each in centres):
                centres.append(place)
        discs = [make_disc("loop", *place.tolist(), 8) for place in centres]
        layouts.append(
            [each for each in discs if min(each.box_px) >= 0 and max(each.box_px) <= 200]
        )
    sampler = fit_layout_sampler(layouts, [(200, 200)] * 6, None, ["loop"])
    closest = [
        measure_layout(layout, (200, 200), None, ["loop"])["distance", "loop"].min()
        for layout in draw(sampler, 6, (200, 200))
        if len(layout) > 1
    ]
    assert np.median(closest) > 20


def test_counting_noise_is_not_drawn_twice():
    rng = np.random.default_rng(0)

    def make_layouts(means):
        places = [rng.integers(10, 190, (rng.poisson(mean), 2)).tolist() for mean in means]
        return [[make_disc("dot", x, y, 2) for x, y in each] for each in places]

    def spread(means):
        layouts, shapes = make_layouts(means), [(200, 200)] * len(means)
        whole = [range(len(each)) for each in layouts]
        densities = measure_densities(layouts, shapes, whole, ("dot",))
        return float(densities.std() / densities.mean())

    assert spread([100] * 60) < 0.06  # Poisson noise alone would be 0.1
    assert spread([50, 150] * 30) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 2, 2.0])
def test_turned_masks_keep_their_area(angle):
    mask = make_disc("loop", 0, 0, 9).mask[:, 4:]
    turned = turn_mask(mask, angle, 1.1)
    assert turned.sum() == pytest.approx(1.21 * mask.sum(), rel=0.04)
    back = turn_mask(turn_mask(mask, angle), -angle)
    assert back.sum() == pytest.approx(mask.sum(), rel=0.04)
    np.testing.assert_array_equal(turn_mask(mask, 0.0), mask)


def test_few_instances_fall_back_on_the_simulator_and_say_so():
    said = []
    layout = [make_disc("loop", 30, 30, 8), make_disc("dot", 60, 60, 2)]
    sampler = fit_layout_sampler([layout], [(128, 128)], 1.0, ["loop", "dot"], say=said.append)
    assert "2 whole defects, fewer than 30; layouts are those of the simulator" in said[0]
    assert sampler.config.source == "the simulator"
    assert {kind for layout in draw(sampler, 4) for kind in [each.kind for each in layout]} == {
        "loop",
        "dot",
    }


def test_kinds_that_are_never_whole_are_said():
    layout = [make_disc("dot", 10 + 4 * i, 20 + i, 2) for i in range(40)]
    line = Defect("line", (0, 90, 200, 94))
    said = []
    sampler = fit_layout_sampler(
        [[*layout, line]], [(200, 200)], None, ["dot", "line"], say=said.append
    )
    assert said == ["layouts: no line is whole in any labelled image, so layouts have none"]
    assert {each.kind for each in draw(sampler, 1, (200, 200))[0]} == {"dot"}


def test_labels_of_tiles_are_stitched_to_those_of_the_micrographs(tmp_path):
    config = DataConfig(
        resolution=64, num_synthetic=4, micrograph_size=256, cache_dir=str(tmp_path)
    )
    data = load_data("synthetic", config, log=lambda text: None)
    layouts, shapes = stitch_layouts(data.train)
    names = [data.train.cut.micrographs[i]["name"] for i in data.train.micrograph_ids]
    micrographs = [*synthesise_micrographs(4, size=256)]
    originals = [micrographs[int(Path(name).stem.rpartition("_")[2])] for name in names]
    assert len(layouts) == len(originals) > 0
    assert set(shapes) == {(256, 256)}

    def describe(defects):
        return sorted((each.kind, each.box_px, int(each.mask.sum())) for each in defects)

    for layout, original in zip(layouts, originals):
        first, second = describe(layout), describe(original.defects)
        # a defect of two pieces, such as a line cut twice by a corner, may stay in two
        assert len(set(first) & set(second)) > 0.97 * len(second)
        assert abs(len(first) - len(second)) < 0.03 * len(second)
