"""The optimizer that orthogonalises its steps."""

import pytest
import torch

from em_diffusion import PRESETS
from em_diffusion.muon import Muon, create_muon, orthogonalise
from em_diffusion.optimization import set_learning_rate


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16)])
def test_singular_values_come_near_one(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.logspace(0, -2, len(values))
    result = orthogonalise(left @ values.diag() @ right)
    assert result.shape == shape
    found = torch.linalg.svdvals(result)
    assert found.min() > 0.5
    assert found.max() < 1.3
    mixed = left.T @ result @ right.T  # the singular vectors stay
    assert (mixed - mixed.diagonal().diag()).abs().max() < 1e-3


def test_vectors_get_adams_steps():
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))
    ours, reference = (torch.nn.Parameter(start.clone()) for _ in range(2))
    muon, adam = Muon([ours], 0.01, (0.9, 0.99)), torch.optim.Adam([reference], 0.01, (0.9, 0.99))
    for step in range(5):
        gradient = torch.sin(start * (step + 1))
        ours.grad, reference.grad = gradient.clone(), gradient.clone()
        muon.step()
        adam.step()
    torch.testing.assert_close(ours, reference)


def test_a_step_of_a_convolution_is_orthogonal_and_as_large_as_asked():
    model = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    weight, bias = model.weight, model.bias
    for parameter in (weight, bias):
        torch.nn.init.zeros_(parameter)
    optimizer = create_muon(model, PRESETS["test"]().denoiser)
    set_learning_rate(optimizer, 0.01)
    weight.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    values = torch.linalg.svdvals(weight.detach().flatten(1))
    assert values.min() > 0.5 * 0.05
    assert values.max() < 1.3 * 0.05
    assert not bias.any()


def test_a_table_gets_adams_steps_at_the_rate_of_matrices():
    """However few its rows are, each element moves by the rate."""
    model = torch.nn.Sequential(torch.nn.Embedding(3, 32), torch.nn.Linear(32, 2))
    before = model[0].weight.detach().clone()
    optimizer = create_muon(model, PRESETS["test"]().denoiser)
    set_learning_rate(optimizer, 0.01)
    model(torch.tensor([0, 2])).square().sum().backward()
    optimizer.step()
    moved = (model[0].weight - before).abs()
    torch.testing.assert_close(moved[[0, 2]], torch.full((2, 32), 0.05), atol=1e-3, rtol=0)
    assert not moved[1].any()


def test_it_resumes_to_the_bit():
    def train(num_steps, saved=None):
        parameter = torch.nn.Parameter(torch.eye(4))
        vector = torch.nn.Parameter(torch.ones(4))
        optimizer = Muon([parameter, vector], 0.1)
        if saved is not None:
            with torch.no_grad():
                parameter.copy_(saved[0])
                vector.copy_(saved[1])
            optimizer.load_state_dict(saved[2])
        for _ in range(num_steps):
            loss = ((parameter @ vector) - torch.arange(4.0)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return parameter.detach().clone(), vector.detach().clone(), optimizer.state_dict()

    whole, parts = train(6), train(3, train(3))
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
