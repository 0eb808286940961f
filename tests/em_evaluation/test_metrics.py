"""The further metrics against closed forms, slow twins of their definitions and repeated draws."""

import mpmath
import numpy as np
import pytest

from em_evaluation.distances import (
    bootstrap_interval,
    cmmd,
    cmmd_influence,
    frechet_distance,
)
from em_evaluation.extrapolation import (
    fit_frechet_distance,
    frechet_distance_infinite,
    frechet_distance_infinite_interval,
)
from em_evaluation.neighbours import measure_neighbour_intervals, measure_neighbours
from support.gaussian_statistics import frechet_distance_from_statistics

NAMES = ("precision", "recall", "density", "coverage")


def normal(seed, num, dimensions, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, scale, (num, dimensions))


# ---------------------------------------------------------------- Frechet distance


def test_fewer_images_than_dimensions_equal_40_digits():
    """tr (S_a S_b)^(1/2) from the singular values of A B^T in mpmath, where scipy's matrix root
    loses half of its digits.
    """
    a, b = normal(0, 5, 12, 1.3, 0.2), normal(1, 7, 12)
    with mpmath.workdps(40):
        exact = []
        for rows in (a, b):
            rows = mpmath.matrix(rows.tolist())
            mean = [mpmath.fsum(rows[:, j]) / rows.rows for j in range(12)]
            centred = mpmath.matrix(rows.rows, 12)
            for i in range(rows.rows):
                for j in range(12):
                    centred[i, j] = (rows[i, j] - mean[j]) / mpmath.sqrt(rows.rows - 1)
            exact.append((mean, centred, mpmath.fsum(x * x for x in centred)))
        (mean_a, rows_a, trace_a), (mean_b, rows_b, trace_b) = exact
        singular_values = mpmath.svd_r(rows_a * rows_b.T, compute_uv=False)
        shift = mpmath.fsum((x - y) ** 2 for x, y in zip(mean_a, mean_b))
        expected = shift + trace_a + trace_b - 2 * mpmath.fsum(singular_values)
        assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


def test_extrapolation_takes_away_the_bias_of_finite_samples():
    """Two Gaussians at a known distance, 60 images of 24 dimensions: the plain distance is far too
    high, the line is not.
    """
    truth = frechet_distance_from_statistics(
        np.zeros(24), np.eye(24), np.full(24, 0.2), 1.44 * np.eye(24)
    )
    draws = [(normal(2 * i, 120, 24), normal(2 * i + 1, 120, 24, 1.2, 0.2)) for i in range(60)]
    plain = np.array([frechet_distance(a, b) for a, b in draws])
    line = np.array([frechet_distance_infinite(a, b) for a, b in draws])
    assert plain.mean() > 1.5 * truth
    assert abs(line.mean() - truth) < 0.15 * (plain.mean() - truth)
    intervals = [
        frechet_distance_infinite_interval(a, b, num_replicates=200, seed=i)
        for i, (a, b) in enumerate(draws)
    ]
    expected = line.mean()
    assert (
        0.9 <= np.mean([interval.low <= expected <= interval.high for interval in intervals]) <= 1.0
    )


def test_the_line_goes_through_its_points():
    a, b = normal(0, 40, 6), normal(1, 50, 6, 1.5)
    value, error, sizes, distances = fit_frechet_distance(a, b, num_points=4)
    assert sizes.tolist() == [20, 24, 30, 40]
    slope, intercept = np.polyfit(1 / sizes, distances, 1)
    assert value == pytest.approx(intercept, rel=1e-9)
    residual = distances - (intercept + slope / sizes)
    spread = ((1 / sizes - (1 / sizes).mean()) ** 2).sum()
    expected = np.sqrt((residual**2).sum() / 2 * (1 / 4 + (1 / sizes).mean() ** 2 / spread))
    assert error == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="four images"):
        fit_frechet_distance(a[:3], b)


# ---------------------------------------------------------------- CMMD


def embed(seed, num, dimensions, shift=0.0):
    rows = normal(seed, num, dimensions, shift=shift)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_cmmd_equals_the_double_sum_of_its_definition():
    a, b = embed(0, 7, 5), embed(1, 9, 5, 0.5)

    def kernel(x, y):
        return np.exp(-((x - y) ** 2).sum() / 200)

    within_a = np.mean([kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    within_b = np.mean([kernel(b[i], b[j]) for i in range(9) for j in range(9) if i != j])
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert cmmd(a, b) == pytest.approx(1000 * (within_a + within_b - 2 * across), rel=1e-9)
    assert cmmd_influence(a, b, block=4).value == pytest.approx(cmmd(a, b), rel=1e-9)


def test_cmmd_is_unbiased_its_interval_covers_and_lengths_are_checked():
    same = [cmmd(embed(i, 40, 6), embed(1000 + i, 40, 6)) for i in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200)
    draws = [cmmd_influence(embed(i, 60, 6), embed(1000 + i, 60, 6, 0.4)) for i in range(100)]
    expected = np.mean([distance.value for distance in draws])
    intervals = [
        bootstrap_interval(distance, num_replicates=200, seed=i) for i, distance in enumerate(draws)
    ]
    assert (
        0.86 <= np.mean([interval.low <= expected <= interval.high for interval in intervals]) <= 1
    )
    with pytest.raises(ValueError, match=r"length 1.*extractor clip"):
        cmmd(normal(0, 5, 6), embed(1, 5, 6))


# ---------------- precision, recall, density, coverage


def test_neighbour_metrics_equal_their_definitions_in_any_block_and_order():
    generated, real = normal(0, 31, 4, 1.2), normal(1, 27, 4) + 5

    def radius(features, i, k):
        return sorted(np.linalg.norm(features - features[i], axis=1))[k]

    generated += 5
    distance = np.linalg.norm(generated[:, None] - real[None], axis=2)
    ball = np.array([radius(real, j, 3) for j in range(27)])
    expected = {
        "precision": np.mean(
            [any(distance[i, j] <= ball[j] for j in range(27)) for i in range(31)]
        ),
        "recall": np.mean(
            [any(distance[i, j] <= radius(generated, i, 3) for i in range(31)) for j in range(27)]
        ),
    }
    ball = np.array([radius(real, j, 5) for j in range(27)])
    expected["density"] = np.mean(
        [sum(distance[i, j] < ball[j] for j in range(27)) / 5 for i in range(31)]
    )
    expected["coverage"] = np.mean(
        [any(distance[i, j] < ball[j] for i in range(31)) for j in range(27)]
    )
    assert all(0 < value < 1.5 for value in expected.values())
    for block in (2048, 10):
        found = measure_neighbours(generated[::-1], real, block=block)
        assert {name: getattr(found, name) for name in NAMES} == pytest.approx(expected, rel=1e-12)
    intervals = measure_neighbour_intervals(generated, real)
    assert {name: getattr(intervals, name).value for name in NAMES} == pytest.approx(
        expected, rel=1e-12
    )


def test_identical_sets_are_perfect_and_distant_ones_share_nothing():
    a = normal(0, 50, 8)
    same = measure_neighbours(a[::-1], a)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density == pytest.approx(1)
    apart = measure_neighbours(a + 100, a)
    assert (apart.precision, apart.recall, apart.density, apart.coverage) == (0, 0, 0, 0)


def test_precision_falls_with_outliers_and_recall_and_coverage_with_dropped_modes():
    rng = np.random.default_rng(0)
    modes = rng.normal(0, 30, (10, 6))
    real = np.repeat(modes, 30, 0) + rng.normal(size=(300, 6))
    half_of_modes = np.repeat(modes[:5], 60, 0) + rng.normal(size=(300, 6))
    outliers = np.concatenate([real[::2] + 0.01, rng.normal(0, 300, (150, 6))])
    another = np.repeat(modes, 30, 0) + rng.normal(size=(300, 6))
    found, best = measure_neighbours(half_of_modes, real), measure_neighbours(another, real)
    assert found.precision == pytest.approx(best.precision, abs=0.06)
    assert 0.45 < found.recall < 0.55
    assert 0.45 < found.coverage < 0.51
    found = measure_neighbours(outliers, real)
    assert 0.5 <= found.precision < 0.55
    assert found.coverage > 0.95


@pytest.mark.parametrize("most", [2048, 30])
def test_half_samples_scatter_as_fresh_draws_do(most, monkeypatch):
    monkeypatch.setattr("em_evaluation.neighbours.MOST_IN_HALF", most)
    draws = [
        measure_neighbour_intervals(
            normal(2 * i, 150, 5, 1.3), normal(2 * i + 1, 150, 5), num_halves=24, seed=i
        )
        for i in range(60)
    ]
    for name in NAMES:
        intervals = [getattr(draw, name) for draw in draws]
        width = np.mean([interval.high - interval.low for interval in intervals])
        spread = 2 * 1.96 * np.std([interval.value for interval in intervals])
        assert 0.6 < width / spread < 1.8, name
        assert all(0 <= interval.low <= interval.value <= interval.high for interval in intervals)


def test_copies_in_groups_widen_the_interval():
    a, b = normal(0, 20, 4, 1.3), normal(1, 200, 4)
    copies, groups = np.repeat(a, 10, 0) + 1e-3 * normal(2, 200, 4), np.repeat(np.arange(20), 10)
    alone, grouped = (
        measure_neighbour_intervals(copies, b, groups_generated=each).density
        for each in (None, groups)
    )
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)
    single = measure_neighbour_intervals(
        copies, b, groups_generated=np.zeros(200)
    )  # one group: each image for itself
    assert single.density.high - single.density.low == pytest.approx(alone.high - alone.low)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="at least 6 images"):
        measure_neighbours(normal(0, 5, 3), normal(1, 50, 3))
    with pytest.raises(ValueError, match="at least 12 images"):
        measure_neighbour_intervals(normal(0, 11, 3), normal(1, 50, 3))
    with pytest.raises(ValueError, match="of one extractor"):
        measure_neighbours(normal(0, 50, 4), normal(1, 50, 3))
