"""The detector of defects: drawn shapes, unbiased counting, and its calibration on embedded
micrographs.
"""

import json

import numpy as np
import pytest

from em_data.synthetic_micrographs import synthesise_micrographs
from em_evaluation import calibrate_detector as calibration_module
from em_evaluation.calibrate_detector import box_overlap, calibrate_detector, describe_calibration
from em_evaluation.defects import KINDS, Defects, count_weights, detect_defects, sum_by_image
from em_evaluation.microscopy import compare_microscopy
from em_evaluation.microscopy_report import conclude_microscopy, say_detector
from em_evaluation.surrogates import phase_randomised_surrogates


@pytest.fixture
def canvas():
    return 150 + np.random.default_rng(0).normal(0, 6, (128, 128))


def ellipse(canvas, y0, x0, major, minor, angle, depth=60):
    y, x = np.mgrid[: canvas.shape[0], : canvas.shape[1]]
    along = (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)
    across = (y - y0) * np.cos(angle) - (x - x0) * np.sin(angle)
    radius = np.hypot(along / (major / 2), across / (minor / 2))
    canvas -= depth * np.exp(-(((radius - 1) * minor / 2) ** 2) / 4)


def test_a_loop_a_dot_and_a_line_are_told_apart_and_measured(canvas):
    ellipse(canvas, 30, 40, 30, 18, np.radians(30))
    y, x = np.mgrid[:128, :128]
    canvas -= 50 * np.exp(-((y - 40) ** 2 + (x - 100) ** 2) / 6)
    canvas[np.abs(y - 90 - 0.1 * (x - 64)) < 1.5] -= 50
    found = detect_defects(canvas[None])
    assert [KINDS[kind] for kind in found.kind if kind != 1] == ["loop", "line"]
    loop, line, dot = (
        found.select(found.kind == KINDS.index(kind)) for kind in ("loop", "line", "dot")
    )
    assert loop.centre_px[0] == pytest.approx([30, 40], abs=1)
    assert np.degrees(loop.angle[0]) == pytest.approx(30, abs=4)
    assert 30 <= loop.major[0] <= 42
    assert loop.major[0] / loop.minor[0] == pytest.approx(34 / 22, rel=0.15)
    assert np.abs(dot.centre_px - [40, 100]).max(1).min() < 1
    assert line.is_cut[0]
    assert line.length[0] == pytest.approx(128, abs=3)
    assert not loop.is_cut[0]


def test_nanometres_follow_the_pixel_size(canvas):
    ellipse(canvas, 60, 60, 60, 40, 0.3)
    fine = detect_defects(canvas[None], pixel_size_nm=0.5)
    loop = fine.select(fine.kind == 0)
    assert len(loop) == 1
    assert 30 <= loop.major[0] <= 38
    assert loop.centre_px[0] == pytest.approx([60, 60], abs=1.5)


def test_nothing_is_found_in_noise_and_in_a_constant_image():
    images = 128 + np.random.default_rng(1).normal(0, 8, (20, 96, 96))
    assert (detect_defects(images).kind != 1).sum() == 0
    assert len(detect_defects(np.full((2, 64, 64), 9, np.uint8))) == 0


def test_images_are_searched_each_for_itself():
    images = np.stack([m.image for m in synthesise_micrographs(3, 5, size=128)])
    together = detect_defects(images)
    apart = [detect_defects(image[None]) for image in images]
    assert [(together.image == i).sum() for i in range(3)] == [len(each) for each in apart]
    assert together.major == pytest.approx(np.concatenate([each.major for each in apart]))


def test_counting_is_unbiased_in_small_windows():
    """Squares of two sizes thrown at random: the weighted number inside windows is that of the
    plane, size by size.
    """
    rng = np.random.default_rng(4)
    sides = rng.choice([6, 30], size=60_000)
    field, window = 4000, 48
    corner = rng.integers(0, field - 30, size=(len(sides), 2))
    tile = corner // window
    low = corner - tile * window
    high = low + sides[:, None]
    cut = (low == 0).any(1) | (high >= window).any(1)
    box = np.concatenate([low, np.minimum(high, window)], 1)
    zeros = np.zeros(len(sides))
    defects = Defects(
        tile[:, 0] * 100 + tile[:, 1],
        zeros.astype(int),
        box,
        box[:, :2],
        sides,
        sides,
        sides,
        zeros,
        cut,
    )
    weights = count_weights(defects, (window, window))
    for side in (6, 30):
        assert weights[sides == side].sum() == pytest.approx((sides == side).sum(), rel=0.03)
    assert sum_by_image(defects, "loop", weights, 10_000).sum() == pytest.approx(weights.sum())


@pytest.mark.parametrize("window", [128, 130])  # whole squares of 4 pixels, and not
def test_counting_is_unbiased_where_fine_pixels_are_averaged(window):
    """Squares at every place along the diagonal, as squares of 4 pixels show them: a weight's root
    is its share of one axis, and all together are the axis."""
    side, pixel_size_nm = 50, 0.25
    low = np.arange(-side, window + side)
    searched = window // 4 * 4
    seen = np.stack([low // 4 * 4, -(-(low + side) // 4) * 4], 1).clip(0, searched)
    box = np.stack([seen[:, 0], seen[:, 0], seen[:, 1], seen[:, 1]], 1)
    cut, zeros = (seen[:, 0] == 0) | (seen[:, 1] == searched), np.zeros(len(low))
    defects = Defects(
        zeros.astype(int), zeros.astype(int), box, box[:, :2], zeros, zeros, zeros, zeros, cut
    )
    assert np.sqrt(count_weights(defects, (window, window), pixel_size_nm)).sum() == pytest.approx(
        window, rel=0.005
    )
    assert (
        np.sqrt(count_weights(defects, (window, window))).sum() < 0.96 * window
    )  # with a margin of one pixel


def test_fine_pixels_count_as_the_coarse_ones_that_the_search_makes_of_them():
    image = next(synthesise_micrographs(1, 5, size=128)).image[None].astype(np.float32)
    coarse = detect_defects(image, 1.0)
    fine = detect_defects(image.repeat(4, 1).repeat(4, 2), 0.25)
    assert (~coarse.is_cut).sum() > 5
    assert fine.box_px == pytest.approx(4 * coarse.box_px)
    weights = count_weights(coarse, (128, 128), 1.0)
    assert count_weights(fine, (512, 512), 0.25) == pytest.approx(weights)


def test_overlap_of_boxes():
    a = np.array([[0, 0, 2, 2]])
    assert box_overlap(a, np.array([[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6]])) == pytest.approx(
        np.array([[1, 1 / 7, 0]])
    )


@pytest.fixture(scope="module")
def calibration():
    return calibrate_detector(256, num_micrographs=2)


def test_precision_and_recall_on_embedded_micrographs(calibration):
    loop, dot = calibration["kinds"]["loop"], calibration["kinds"]["dot"]
    assert loop["precision"]["value"] > 0.8
    assert loop["recall"]["value"] > 0.75
    assert dot["precision"]["value"] > 0.6
    assert abs(loop["size_bias_nm"]) < 8
    assert loop["angle_error_deg"] < 10
    for row in calibration["kinds"].values():
        assert row["num_matched"] <= min(row["num_true"], row["num_found"])
    assert json.dumps(calibration) == json.dumps(calibrate_detector(256, num_micrographs=2))
    assert not calibrate_detector(64, 9.0, num_micrographs=2)["as_in_the_data"]


def test_calibration_is_a_command(tmp_path, capsys, calibration):
    out = tmp_path / "calibration.json"
    calibration_module.main(["--num-micrographs", "2", "--out", str(out)])
    assert json.loads(out.read_text()) == calibration
    assert describe_calibration(calibration)[0] in capsys.readouterr().out
    with pytest.raises(SystemExit):
        calibration_module.main(["--num-micrographs", "0"])


def test_real_tiles_are_nearer_than_texture_without_structure():
    micrographs = list(synthesise_micrographs(8, 2, size=256))
    tiles = np.stack(
        [m.image[y : y + 128, x : x + 128] for m in micrographs for y in (0, 128) for x in (0, 128)]
    )
    groups = np.repeat(np.arange(8), 4)
    surrogates = phase_randomised_surrogates(tiles[16:, None] / 127.5 - 1.0, 0).clamp(-1, 1)
    sets = {
        "held_out": tiles[:16],
        "copy": tiles[:16].copy(),
        "real": tiles[16:],
        "surrogates": ((surrogates + 1) * 127.5).round().numpy().astype(np.uint8)[:, 0],
    }
    ids = {"held_out": groups[:16], "copy": None, "real": groups[16:], "surrogates": groups[16:]}
    section = compare_microscopy(
        sets,
        ids,
        1.0,
        models=["copy"],
        kinds={"real": "real", "surrogates": "surrogates"},
        num_calibration=2,
    )
    distances = section["distances"]
    assert all(metric["value"] == 0 for metric in distances["copy"].values())
    for name in ("two_point", "loop_density", "loop_size"):
        assert distances["real"][name]["value"] < distances["surrogates"][name]["value"]
    for row in distances.values():
        assert all(m is None or m["low"] <= m["value"] <= m["high"] for m in row.values())
    assert "spectrum" in section["blind_spots"]["surrogates"]  # by construction
    assert "loop_density" not in section["blind_spots"]["surrogates"]
    json.dumps(section, allow_nan=False)
    assert section["outcomes"]["copy"]["spectrum"] == "as_real"
    assert section["outcomes"]["surrogates"]["loop_density"] == "differs"
    curves = section["curves"]["loop_size"]
    assert set(curves["lines"]) == set(sets) - set(curves["few"])
    assert "surrogates" in curves["few"]
    text = " ".join(conclude_microscopy(section, {"surrogates": "texture only"}))
    assert "Not told apart from real images: texture only, by power spectrum" in text
    assert "precision and recall of loops" in say_detector(section)
