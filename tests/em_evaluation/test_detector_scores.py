"""Scores of a segmenter: sums by specimen, average precision beside faster-coco-eval's."""

import numpy as np
import pytest

from em_data.micrograph import Defect
from em_evaluation.detector import scores as s
from support.coco_precision import average_precision_coco

KINDS = ("dot", "loop")


def make_square(x, y, side, kind, score=None):
    metadata = {} if score is None else {"score": score}
    return Defect(kind, (x, y, x + side, y + side), np.ones((side, side), bool), metadata=metadata)


def draw_comparisons(num_images=12, seed=0):
    """Return comparisons in which finds are shifted, missed and invented, and their shapes."""
    rng = np.random.default_rng(seed)
    comparisons = []
    for _ in range(num_images):
        true, found = [], []
        for x in range(2, 90, 16):
            kind, side = KINDS[rng.integers(2)], int(rng.integers(5, 11))
            y = int(rng.integers(0, 80))
            if rng.random() < 0.8:
                true.append(make_square(x, y, side, kind))
            if rng.random() < 0.8:
                moved = x + int(rng.integers(0, 3)), y + int(rng.integers(0, 2))
                found.append(make_square(*moved, side, kind, round(float(rng.random()), 3)))
        comparisons.append(s.compare(found, true))
    return comparisons, [(96, 112)] * num_images


def test_average_precision_equals_that_of_faster_coco_eval():
    for seed in range(3):
        comparisons, shapes = draw_comparisons(seed=seed)
        scores = s.summarise(comparisons, [f"s{i // 3}" for i in range(12)], KINDS)
        (ours,) = s.average_precision(scores)
        theirs = average_precision_coco(comparisons, shapes, KINDS)
        assert 0.2 < theirs < 0.9
        assert ours == pytest.approx(theirs, abs=1e-9)


def test_more_than_a_hundred_detections_of_an_image_count():
    squares = [(x, y) for x in range(0, 200, 10) for y in range(0, 100, 10)]  # 200
    true = [make_square(x, y, 6, "dot") for x, y in squares]
    found = [make_square(x, y, 6, "dot", 0.9) for x, y in squares]
    comparisons = [s.compare(found, true)]
    assert average_precision_coco(comparisons, [(100, 200)], ("dot",)) == 1
    assert s.average_precision(s.summarise(comparisons, ["a"], ("dot",))) == 1


def test_drawing_a_group_twice_equals_its_images_twice():
    comparisons, _ = draw_comparisons()
    groups = [f"s{i // 4}" for i in range(12)]
    scores = s.summarise(comparisons, groups, KINDS)
    drawn = s.summarise(comparisons[:4] + comparisons[8:] + comparisons[8:], ["x"] * 12, KINDS)
    weights = np.array([[1, 0, 2]])
    assert s.average_precision(scores, weights) == pytest.approx(s.average_precision(drawn))
    sums = np.einsum("rg,gkc->rkc", weights, scores.sums)
    for measure in (s.f1_score, s.density_error, s.size_error, s.recall, s.precision):
        assert measure(sums)[0] == pytest.approx(measure(drawn.sums.sum(0)))


def test_measures_of_known_finds():
    true = [make_square(0, 0, 10, "loop"), make_square(20, 0, 10, "loop")]
    true += [make_square(40, 0, 4, "dot"), make_square(60, 0, 1, "dot")]  # the last is too small
    found = [make_square(0, 0, 10, "loop", 0.9), make_square(60, 0, 1, "dot", 0.9)]
    found += [make_square(40, 0, 4, "dot", 0.8), make_square(80, 0, 8, "dot", 0.7)]
    comparison = s.compare(found, true)
    assert comparison.partner.tolist() == [0, 2, -1]
    assert [each.box_px[0] for each in comparison.missed] == [20]
    scores = s.summarise([comparison, s.compare([], [])], ["a", "a"], KINDS)
    assert scores.sums[0, :, :3].tolist() == [[1, 2, 1], [1, 1, 2]]
    sums = scores.sums.sum(0)
    assert s.f1_score(sums) == pytest.approx(2 * 2 / (3 + 3))
    assert s.density_error(sums) == pytest.approx(100 * (1 + 0.5) / 2)
    assert s.size_error(sums) == pytest.approx(100 * ((4 + 8) / 2 / 4 - 1) / 2)
    assert scores.quality.tolist() == pytest.approx([2 * 2 / 6, 1])
    again = s.Scores.from_json(scores.to_json())
    assert np.allclose(again.sums, scores.sums, atol=1e-3)
    assert again.groups == ("a",)
