"""Distances against closed forms, slow twins and repeated draws."""

import dataclasses

import numpy as np
import pytest
from scipy import linalg

from em_evaluation.distances import (
    bootstrap_interval,
    difference_interval,
    frechet_distance,
    frechet_distance_interval,
    frechet_influence,
    kernel_distance,
    kernel_distance_interval,
    kernel_influence,
)
from support.gaussian_statistics import (
    FeatureStatistics,
    frechet_distance_from_statistics,
    sum_roots_of_eigenvalues,
    symmetric_root,
)


def draw(seed, num, dimensions, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    return (np.exp(0.3 * rng.normal(size=(num, dimensions))) - 1) @ mixing * scale + shift


def statistics(features):
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def test_distance_of_two_gaussians_has_the_closed_form_of_commuting_covariances():
    mean, a, b = np.array([1.0, -2.0, 0.5]), np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 0.25])
    expected = (mean**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    turn = linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    found = frechet_distance_from_statistics(
        mean, turn * a @ turn.T, np.zeros(3), turn * b @ turn.T
    )
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("num_a", "num_b", "dimensions"), [(60, 50, 10), (20, 60, 30), (12, 15, 40), (40, 40, 40)]
)
def test_singular_values_equal_eigenvalues_with_more_and_fewer_images_than_dimensions(
    num_a, num_b, dimensions
):
    a, b = draw(1, num_a, dimensions, 1.3, 0.1), draw(2, num_b, dimensions)
    expected = frechet_distance_from_statistics(*statistics(a), *statistics(b))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_influence(a, b).value == pytest.approx(expected, rel=1e-10)


def test_roots_by_cholesky_equal_roots_by_eigenvectors_and_singular_covariances_have_one(
    monkeypatch,
):
    full, singular = (
        statistics(draw(seed, num, 20, 1.3, 0.1)) for seed, num in ((1, 300), (2, 12))
    )
    pairs = [(full, statistics(draw(3, 200, 20))), (full, singular), (singular, singular)]
    found = [frechet_distance_from_statistics(*first, *second) for first, second in pairs]
    monkeypatch.setattr("support.gaussian_statistics._square_root", symmetric_root)
    expected = [frechet_distance_from_statistics(*first, *second) for first, second in pairs]
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-7)


@pytest.mark.parametrize(("decades", "is_fast"), [(6, True), (13, False), (17, False)])
def test_eigenvalues_serve_only_while_their_rounding_cannot_be_felt(decades, is_fast):
    spectrum = np.logspace(0, -decades, 40)
    turn = linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
    covariance = turn * spectrum @ turn.T
    root = sum_roots_of_eigenvalues(covariance, 4 * covariance)  # tr (S 4 S)^(1/2) = 2 tr S
    assert (root is not None) == is_fast
    if is_fast:
        assert root == pytest.approx(2 * spectrum.sum(), rel=1e-10)
    mean = np.zeros(40)
    found = frechet_distance_from_statistics(mean, covariance, mean, 4 * covariance)
    assert found == pytest.approx(spectrum.sum(), rel=1e-6)  # tr S + 4 tr S - 4 tr S


def test_distance_equals_the_matrix_root_of_scipy():
    a, b = draw(1, 400, 12, 1.3, 0.1), draw(2, 300, 12)
    (mean_a, cov_a), (mean_b, cov_b) = statistics(a), statistics(b)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("num", [100, 10])
def test_identical_sets_are_at_distance_zero_in_any_order(num):
    a = draw(3, num, 20)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance_from_statistics(*statistics(a), *statistics(a)) == pytest.approx(
        0, abs=1e-6
    )


def test_influence_is_the_change_of_the_distance_by_an_images_weight():
    a, b = draw(1, 30, 5, 1.4, 0.3), draw(2, 25, 5)
    influence, step = frechet_influence(a, b), 1e-5

    def weighted(weights_a, weights_b):
        rows = []
        for features, weights in ((a, weights_a), (b, weights_b)):
            mean = weights @ features
            scatter = (features - mean).T * weights @ (features - mean)
            rows += [mean, scatter * len(features) / (len(features) - 1)]
        return frechet_distance_from_statistics(*rows)

    for i in (0, 7):
        for side, count in (("a", 30), ("b", 25)):
            values = []
            for sign in (1, -1):
                weights = {"a": np.full(30, 1 / 30), "b": np.full(25, 1 / 25)}
                weights[side] = weights[side] * (1 - sign * step)
                weights[side][i] += sign * step
                values.append(weighted(weights["a"], weights["b"]))
            derivative = (values[0] - values[1]) / (2 * step)
            found = getattr(influence, f"influence_{side}")
            assert len(found) == count
            assert found[i] == pytest.approx(derivative, rel=1e-5)
            assert found.mean() == pytest.approx(0, abs=1e-10)


def test_kernel_distance_equals_the_double_sum_of_its_definition_in_any_block():
    a, b = draw(1, 9, 4, 1.3), draw(2, 7, 4)

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    within_a = np.mean([kernel(a[i], a[j]) for i in range(9) for j in range(9) if i != j])
    within_b = np.mean([kernel(b[i], b[j]) for i in range(7) for j in range(7) if i != j])
    across = np.mean([kernel(x, y) for x in a for y in b])
    expected = within_a + within_b - 2 * across
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert kernel_influence(a, b, block=4).value == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_unbiased_and_the_mean_over_subsets_agrees():
    same = [kernel_distance(draw(i, 30, 6), draw(1000 + i, 30, 6)) for i in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(300)
    a, b = draw(1, 60, 6, 2.5, 1.0), draw(2, 60, 6)
    assert kernel_distance(a, b, subset_size=30, num_subsets=400) == pytest.approx(
        kernel_distance(a, b), rel=0.05
    )
    assert kernel_distance(a, b, subset_size=60, num_subsets=2) == pytest.approx(
        kernel_distance(a, b), rel=1e-12
    )


@pytest.mark.parametrize("dimensions", [5, 120])
@pytest.mark.parametrize("measure", [frechet_distance_interval, kernel_distance_interval])
def test_intervals_cover_the_expected_distance_with_more_and_fewer_dimensions_than_images(
    measure, dimensions
):
    intervals = [
        measure(
            draw(2 * i, 80, dimensions, 1.3, 0.05),
            draw(2 * i + 1, 80, dimensions),
            num_replicates=200,
            seed=i,
        )
        for i in range(120)
    ]
    expected = np.mean([interval.value for interval in intervals])
    covered = np.mean([interval.low <= expected <= interval.high for interval in intervals])
    assert 0.86 <= covered <= 1.0  # 95 % nominally, 120 draws
    width = np.mean([interval.high - interval.low for interval in intervals])
    assert 0.85 < width / (2 * 1.96 * np.std([interval.value for interval in intervals])) < 1.5


def test_interval_is_centred_where_the_naive_bootstrap_is_biased():
    rng, a, b = np.random.default_rng(0), draw(1, 60, 30), draw(2, 60, 30)
    interval = bootstrap_interval(frechet_influence(a, b))
    naive = [
        frechet_distance(a[rng.integers(60, size=60)], b[rng.integers(60, size=60)])
        for _ in range(40)
    ]
    assert interval.low < interval.value < interval.high
    assert min(naive) > interval.high


def test_groups_widen_the_interval_when_images_of_a_group_are_copies():
    a, b = draw(1, 20, 4, 1.3), draw(2, 200, 4)
    copies, groups = np.repeat(a, 10, axis=0), np.repeat(np.arange(20), 10)
    distance = frechet_influence(copies, b)
    one_by_one, by_group = (
        bootstrap_interval(distance),
        bootstrap_interval(distance, groups_a=groups),
    )
    assert by_group.high - by_group.low > 1.5 * (one_by_one.high - one_by_one.low)


def test_a_common_reference_cancels_in_the_difference():
    reference = draw(0, 60, 6)
    first, second = (
        frechet_influence(draw(1, 2000, 6, 1.5), reference),
        frechet_influence(draw(2, 2000, 6, 1.6), reference),
    )
    difference = difference_interval(first, second)
    assert difference.value == pytest.approx(first.value - second.value)
    single = bootstrap_interval(first)
    assert difference.high - difference.low < 0.7 * (single.high - single.low)
    itself = difference_interval(first, first)
    assert itself.value == 0
    assert itself.low < 0 < itself.high


def test_a_paired_difference_holds_only_what_differs():
    """Two samples of one origin: their common scatter cancels, what each has of its own stays."""
    rng = np.random.default_rng(0)
    origin, reference = rng.normal(size=(400, 6)), rng.normal(size=(500, 6))
    first = frechet_influence(origin + 0.3 + 0.01 * rng.normal(size=origin.shape), reference)
    second = frechet_influence(origin + 0.31, reference)
    paired, apart = (difference_interval(first, second, paired=paired) for paired in (True, False))
    assert paired.value == apart.value == first.value - second.value
    assert 0 < paired.high - paired.low < 0.2 * (apart.high - apart.low)
    itself = difference_interval(first, first, paired=True)
    assert itself.low == itself.high == 0
    # the interval covers: the same difference in fresh draws scatters as wide as it says
    differences = []
    for _ in range(60):
        origin = rng.normal(size=(400, 6))
        a, b = origin + 0.3 + 0.01 * rng.normal(size=origin.shape), origin + 0.31
        differences.append(
            frechet_influence(a, reference).value - frechet_influence(b, reference).value
        )
    fixed = difference_interval(
        dataclasses.replace(first, influence_b=0 * first.influence_b),
        dataclasses.replace(second, influence_b=0 * second.influence_b),
        paired=True,
    )
    assert 0.6 < (fixed.high - fixed.low) / (3.92 * np.std(differences)) < 1.6


def test_unequal_dimensions_and_single_images_are_refused():
    for measure in (frechet_distance, frechet_influence, kernel_distance):
        with pytest.raises(ValueError, match="of one extractor"):
            measure(np.zeros((5, 3)), np.zeros((5, 4)))
        with pytest.raises(ValueError, match="at least 2 images"):
            measure(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="different extractors"):
        frechet_distance_from_statistics(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


def test_streaming_statistics_equal_numpy_whatever_the_batches_and_merge_exactly():
    features = draw(1, 101, 7) + 1e4  # a large mean would cancel in a sum of squares
    whole, batched, halves = (
        FeatureStatistics.of(features),
        FeatureStatistics(7),
        FeatureStatistics(7),
    )
    for start in range(0, 101, 8):
        batched.update(features[start : start + 8])
    for part in (features[60:], features[:0], features[:60]):
        halves.merge(FeatureStatistics.of(part) if len(part) else FeatureStatistics(7))
    for found in (whole, batched, halves):
        assert found.num_images == 101
        np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-13)
        np.testing.assert_allclose(
            found.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12
        )
    with pytest.raises(ValueError, match="at least two"):
        _ = FeatureStatistics(7).covariance
    with pytest.raises(ValueError, match=r"must be \[B, 7\]"):
        whole.update(np.zeros((2, 3)))
