import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from em_training.posthoc_ema import (
    PosthocEMA,
    list_snapshots,
    multiply_profiles,
    reconstruct_average,
    sigma_rel_to_gamma,
    solve_coefficients,
)

BATCH = 8


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25, 12**-0.5])
def test_gamma_has_that_deviation(sigma_rel):
    """The deviation of tau under p(tau) = (gamma + 1) tau^gamma on [0, 1], from its moments (gamma
    + 1) / (gamma + 1 + k).
    """
    gamma = sigma_rel_to_gamma(sigma_rel)
    mean, square = ((gamma + 1) / (gamma + 1 + k) for k in (1, 2))
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-6)


def test_products_are_integrals():
    tau = np.linspace(0, 5, 500_001)[1:] - 5e-6
    for a, b in (((3.0, 2.0), (5.0, 7.5)), ((5.0, 16.9), (5.0, 6.9)), ((2.0, 0.0), (4.0, 1.0))):
        profiles = [np.where(tau < t, (g + 1) * (tau / t) ** g / t, 0) for t, g in (a, b)]
        assert multiply_profiles(*a, *b) == pytest.approx(
            (profiles[0] * profiles[1]).sum() * 1e-5, rel=1e-4
        )


def walk(num_steps, seed=0):
    """Weights that drift to a goal and shake, as in a training: [num_steps, 40]."""
    rng = np.random.default_rng(seed)
    goal = rng.normal(size=40)
    time = np.arange(1, num_steps + 1)[:, None] / num_steps
    return (
        goal * (1 - np.exp(-4 * time))
        + 0.3 * rng.normal(size=(num_steps, 40))
        + np.sin(9 * time + goal)
    )


def average_directly(weights, sigma_rel):
    """By the definition: the weights after step k count by the integral of p over its images."""
    gamma = sigma_rel_to_gamma(sigma_rel)
    edges = (np.arange(len(weights) + 1) / len(weights)) ** (gamma + 1)
    return np.diff(edges) @ weights


def record(weights, folder, every, start=0, state=None):
    model = torch.nn.Linear(8, 5, bias=False)
    ema = PosthocEMA(model, folder)
    if state is not None:
        ema.load_state_dict(state)
    for step in range(start + 1, len(weights) + 1):
        model.weight.data.copy_(torch.tensor(weights[step - 1], dtype=torch.float32).view(5, 8))
        ema.update(step * BATCH, BATCH)
        if step % every == 0:
            ema.save_snapshot(step * BATCH)
    return ema


def test_stored_averages_are_their_definition(tmp_path):
    weights = walk(200)
    ema = record(weights, tmp_path, 50)
    for sigma_rel in (0.05, 0.1):
        (average,) = ema.averages[sigma_rel]
        np.testing.assert_allclose(
            average.flatten(), average_directly(weights, sigma_rel), rtol=1e-4, atol=1e-5
        )
        again, error, count = reconstruct_average(tmp_path, sigma_rel)
        assert error < 1e-6
        assert count == 200 * BATCH
        np.testing.assert_allclose(
            again["weight"].flatten(), average.flatten(), rtol=2e-3, atol=1e-3
        )  # float16


@pytest.mark.parametrize(
    ("sigma_rel", "tolerance"), [(0.03, 0.04), (0.07, 0.005), (0.15, 0.01), (0.2, 0.03)]
)
def test_other_widths_are_met_after_the_fact(tmp_path, sigma_rel, tolerance):
    """Against the average computed directly, relative to how far the weights move; sixteen
    snapshots.
    """
    weights = walk(320)
    record(weights, tmp_path, 20)
    expected = average_directly(weights, sigma_rel)
    found, error, _ = reconstruct_average(tmp_path, sigma_rel)
    deviation = np.sqrt(((found["weight"].flatten().numpy() - expected) ** 2).mean())
    assert deviation < tolerance * weights.std()
    assert error < tolerance
    half, _, count = reconstruct_average(tmp_path, sigma_rel, 160 * BATCH)
    assert count == 160 * BATCH
    expected = average_directly(weights[:160], sigma_rel)
    assert (
        np.sqrt(((half["weight"].flatten().numpy() - expected) ** 2).mean())
        < 4 * tolerance * weights.std()
    )


def test_weights_that_stand_still_are_met_exactly(tmp_path):
    record(np.ones((64, 40)), tmp_path, 8)
    weights, error, _ = reconstruct_average(tmp_path, 0.2)
    assert 0 < error < 0.2
    torch.testing.assert_close(weights["weight"], torch.ones(5, 8))


def test_more_snapshots_meet_a_width_better():
    errors = [
        solve_coefficients([(i, s) for i in range(1, n + 1) for s in (0.05, 0.1)], (n, 0.03))[1]
        for n in (4, 16, 64)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_a_resumed_recording_is_the_recording(tmp_path):
    weights = walk(64)
    record(weights, tmp_path / "whole", 8)
    half = record(weights[:36], tmp_path / "parts", 8)
    state = half.state_dict()
    record(
        walk(64, seed=1), tmp_path / "parts", 8, start=36, state=state
    )  # another future, which is dropped
    half.drop_snapshots_after(36 * BATCH)
    assert {count for count, _ in list_snapshots(tmp_path / "parts").values()} == {
        8 * BATCH * i for i in range(1, 5)
    }
    record(weights, tmp_path / "parts", 8, start=36, state=half.state_dict())
    for path in list_snapshots(tmp_path / "whole"):
        assert torch.equal(
            *(load_file(tmp_path / name / path.name)["weight"] for name in ("whole", "parts"))
        )


def test_what_the_snapshots_do_not_allow_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no snapshots in .*posthoc_ema_every"):
        reconstruct_average(tmp_path, 0.05)
    record(walk(32), tmp_path, 8)
    with pytest.raises(ValueError, match=r"no snapshot at 100 images\. Choose one of 64, 128"):
        reconstruct_average(tmp_path, 0.05, 100)
    with pytest.raises(ValueError, match="only within"):
        reconstruct_average(tmp_path, 0.01)
    for sigma_rel in (0.0, 0.3):
        with pytest.raises(ValueError, match="must lie above 0"):
            reconstruct_average(tmp_path, sigma_rel)
