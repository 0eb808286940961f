"""Moments of features, joined part by part, and the Frechet distance of them."""

import numpy as np
import pytest

from em_evaluation.distances import bootstrap_interval, frechet_influence
from em_evaluation.moments import Moments, frechet_influence_of_moments


def make_features(num, dim=24, seed=0, mean=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(dim, dim)) / dim**0.5
    return rng.normal(size=(num, dim)) @ mixing + mean


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_merged_parts_equal_the_whole(mean):
    rows = make_features(1000, mean=mean)
    merged = Moments.of(rows[:1])
    for part in np.split(rows[1:], [10, 500, 501]):
        merged = merged.merge(Moments.of(part))
    whole = Moments.of(rows)
    assert merged.num == 1000
    np.testing.assert_allclose(merged.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.scatter / 999, np.cov(rows.T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num", [300, 12])  # more and fewer images than features
def test_distance_and_influences_equal_those_of_all_rows(num):
    a, b = make_features(num), make_features(200, seed=1, mean=0.3)
    expected = frechet_influence(a, b)
    found = frechet_influence_of_moments(Moments.of(a), a, b)
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    scale = np.abs(expected.influence_a).max()
    np.testing.assert_allclose(found.influence_a, expected.influence_a, atol=1e-6 * scale)
    np.testing.assert_allclose(found.influence_b, expected.influence_b, atol=1e-6 * scale)


def test_kept_rows_give_the_interval_of_all_rows():
    a, b = make_features(20_000), make_features(5000, seed=1, mean=0.1)
    kept = a[np.random.default_rng(2).permutation(len(a))[:2000]]
    found = bootstrap_interval(frechet_influence_of_moments(Moments.of(a), kept, b))
    expected = bootstrap_interval(frechet_influence(a, b))
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    width = expected.high - expected.low
    assert abs(found.low - expected.low) < 0.15 * width
    assert abs(found.high - expected.high) < 0.15 * width


def test_other_numbers_of_features_are_refused():
    a = make_features(10)
    with pytest.raises(ValueError, match=r"24 features, but must be of two or more images and 5"):
        frechet_influence_of_moments(Moments.of(a), a[:, :5], a[:, :5])
