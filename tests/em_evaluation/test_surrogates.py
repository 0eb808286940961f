"""Surrogates keep the power spectrum and nothing else."""

import numpy as np
import pytest
import torch
from scipy import stats

from em_evaluation.surrogates import fraction_outside, phase_randomised_surrogates


@pytest.fixture(params=[(16, 16), (15, 17), (16, 9)])
def images(request):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(40, 1, *request.param, generator=generator).cumsum(-1).tanh() * 2 - 1.5


def test_power_spectrum_and_mean_are_those_of_each_image(images):
    surrogates = phase_randomised_surrogates(images, seed=1)
    before, after = np.abs(np.fft.fft2(images.numpy())), np.abs(np.fft.fft2(surrogates.numpy()))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * before.max())
    np.testing.assert_allclose(surrogates.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-6)
    assert (surrogates - images).abs().mean() > 0.05


def test_phases_are_uniform_and_independent_between_images(images):
    surrogates = phase_randomised_surrogates(images, seed=1).numpy()
    phases = np.angle(np.fft.fft2(surrogates))[:, 0, 1:4, 1:4].reshape(len(images), -1)
    assert stats.kstest(phases.ravel(), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3
    assert abs(np.exp(1j * (phases[1:] - phases[:-1])).mean()) < 4 / np.sqrt(phases[1:].size)


def test_one_seed_is_one_set_and_another_seed_another(images):
    first, again, other = (phase_randomised_surrogates(images, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first[:5], phase_randomised_surrogates(images[:5], seed=1))
    assert not torch.allclose(first, other)


def test_fraction_outside_counts_what_quantising_would_clip():
    assert fraction_outside(torch.tensor([[-1.5, -1.0], [0.0, 1.0]])) == 0.25
