"""Equal to the published packages on the same features: a development check, run as CONTRIBUTING.md
says; skipped where a package is absent."""

import importlib.util
import warnings

import numpy as np
import pytest
import scipy
import torch

from em_evaluation.distances import (
    cmmd,
    frechet_distance,
    kernel_distance,
)
from em_evaluation.neighbours import measure_neighbours
from support.gaussian_statistics import frechet_distance_from_statistics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the packages' own warnings


def need(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; CONTRIBUTING.md says how to run this check")
    return importlib.import_module(package)


def need_old_scipy():
    if tuple(int(part) for part in scipy.__version__.split(".")[:2]) >= (1, 18):
        pytest.skip(
            "their matrix root needs SciPy < 1.18; CONTRIBUTING.md says how to run this check"
        )


def draw(seed, num, dimensions, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    rows = (np.exp(0.3 * rng.normal(size=(num, dimensions))) - 1) @ mixing * scale + shift
    return rows.astype(np.float32)


def statistics(features):
    return features.astype(np.float64).mean(0), np.cov(features.astype(np.float64), rowvar=False)


@pytest.mark.parametrize(("num_a", "num_b", "dimensions"), [(600, 500, 128), (150, 100, 192)])
@pytest.mark.parametrize("package", ["pytorch_fid.fid_score", "cleanfid.fid"])
def test_frechet_distance_is_that_of_the_packages(package, num_a, num_b, dimensions):
    need(package.split(".")[0])
    need_old_scipy()
    module = importlib.import_module(package)
    distance = getattr(module, "calculate_frechet_distance", None) or module.frechet_distance
    a, b = draw(0, num_a, dimensions, 1.3, 0.1), draw(1, num_b, dimensions)
    expected = distance(*statistics(a), *statistics(b))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance_from_statistics(*statistics(a), *statistics(b)) == pytest.approx(
        expected, rel=1e-4
    )


def test_kernel_distance_is_that_of_torch_fidelity():
    """One subset of all images is the full estimate; over random subsets both means agree within
    their scatter.
    """
    need("torch_fidelity")
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    a, b = draw(0, 300, 64, 1.3, 0.1), draw(1, 300, 64)

    def theirs(**options):
        return kid_features_to_metric(
            torch.from_numpy(a).double(),
            torch.from_numpy(b).double(),
            verbose=False,
            rng_seed=0,
            **options,
        )[KEY_METRIC_KID_MEAN]

    whole = theirs(kid_subsets=1, kid_subset_size=300)
    assert kernel_distance(a, b) == pytest.approx(whole, rel=1e-6)
    subsets = theirs(kid_subsets=200, kid_subset_size=100)
    assert kernel_distance(a, b, subset_size=100, num_subsets=200) == pytest.approx(
        subsets, rel=0.03
    )
    a, b = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (a.astype(float), b.astype(float))
    )
    gaussian = theirs(
        kid_subsets=1, kid_subset_size=300, kid_kernel="rbf", kid_kernel_rbf_sigma=10.0
    )
    assert cmmd(a, b) == pytest.approx(1000 * gaussian, rel=1e-5)


@pytest.mark.parametrize("dimensions", [4, 64])
def test_precision_and_recall_are_those_of_torch_fidelity(dimensions):
    need("torch_fidelity")
    from torch_fidelity.metric_prc import prc_features_to_metric

    generated, real = draw(0, 400, dimensions, 1.2, 0.1), draw(1, 350, dimensions)
    expected = prc_features_to_metric(
        torch.from_numpy(generated),
        torch.from_numpy(real),
        prc_neighborhood=3,
        prc_batch_size=100,
        verbose=False,
        save_cpu_ram=True,
    )
    found = measure_neighbours(generated, real)
    assert found.precision == pytest.approx(expected["precision"], abs=1e-6)
    assert found.recall == pytest.approx(expected["recall"], abs=1e-6)
    assert 0 < found.precision < 1


@pytest.mark.parametrize("neighbours", [3, 5])
def test_density_and_coverage_are_those_of_prdc(neighbours):
    prdc = need("prdc")
    generated, real = draw(0, 400, 16, 1.2, 0.1), draw(1, 350, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = prdc.compute_prdc(
            real_features=real, fake_features=generated, nearest_k=neighbours
        )
    found = measure_neighbours(generated, real, num_manifold=neighbours, num_density=neighbours)
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(found, name) == pytest.approx(expected[name], abs=1e-9), name
