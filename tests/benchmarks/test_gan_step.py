"""The benchmark of a GAN step: the same networks on both sides, and the means it prints."""

import dataclasses

import pytest
import textbook_stylegan2 as textbook
import torch
from gan_step import compare, parse_arguments, summarise

from em_stylegan.networks import create_networks
from em_stylegan.presets import PRESETS


@pytest.fixture
def config():
    config = PRESETS["test"]()
    return dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=4))


def test_both_sides_are_one_network(config):
    """Images, logits and the gradients of all losses, in float64, with noise."""
    model, discriminator = (network.double() for network in create_networks(config))
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *discriminator.named_parameters()]:
            if name.endswith(("noise_strength", "bias")):
                parameter.add_(0.3)
    default = torch.get_default_dtype()
    torch.set_default_dtype(
        torch.float64
    )  # `make_generator` and the textbook draw in the default type
    try:
        images = torch.randn(8, 1, 32, 32)
        plain = textbook.TextbookTraining(model, discriminator, images, config)
        plain.model.double(), plain.discriminator.double()
        differences = compare(model, discriminator, plain, images, config)
    finally:
        torch.set_default_dtype(default)
    assert set(differences) == {
        "images",
        "logits",
        "gradients of loss_G",
        "gradients of loss_D",
        "gradients of R1",
        "gradients of path length",
    }
    assert all(value < 1e-9 for value in differences.values()), differences


def test_the_textbook_trains(config):
    model, discriminator = create_networks(config)
    torch.manual_seed(0)
    training = textbook.TextbookTraining(model, discriminator, torch.randn(8, 1, 32, 32), config)
    networks = (training.model, training.discriminator)
    before = [[p.clone() for p in network.parameters()] for network in networks]
    for part in (training.main, training.r1, training.path_length):
        part()
    for network, old in zip(networks, before):
        assert all((a != b).any() for a, b in zip(network.parameters(), old))
    assert training.path_length_mean > 0


def test_parts_are_weighed_as_in_training():
    rounds = [
        {
            "plain": 1.0,
            "path length": 2.0,
            "r1 and path length": 4.0,
            "textbook main": 3.0,
            "textbook r1": 1.6,
            "textbook path length": 0.8,
        }
    ]
    line = summarise({"images": 0.0}, rounds, {"device": "cpu"})
    assert line["ours"] == pytest.approx((14 * 1 + 2 + 4) / 16)
    assert line["baseline"] == pytest.approx(3 + 0.1 + 0.1)
    assert line["ratio"] == pytest.approx(3.2 / 1.25)
    assert parse_arguments([]).resolutions == [64, 256]
