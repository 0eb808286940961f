"""Losses: inverse generators, who is trained by what, the pool, the contrastive loss."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from em_cyclegan.contrastive import PatchProjection, contrastive_loss, find_features
from em_cyclegan.discriminators import discriminator_loss, least_squares
from em_cyclegan.em_resnet_generator import EMResnetGenerator
from em_cyclegan.image_pool import ImagePool
from em_cyclegan.losses import Game, cycle_loss
from em_cyclegan.networks import create_networks
from em_cyclegan.presets import PRESETS
from em_cyclegan.translation_loop import Unpaired
from em_training import create_accelerator, make_generator


def draw_images(*shape, seed=0):
    return torch.rand(shape, generator=make_generator(seed)) * 2 - 1


def test_the_cycle_loss_of_inverse_generators_is_zero():
    def darken(images):
        return images.flip(-1) / 2 - 0.25

    def brighten(images):
        return (images.flip(-1) + 0.25) * 2

    a, b = draw_images(3, 1, 8, 8), draw_images(3, 1, 8, 8, seed=1)
    loss = cycle_loss(darken, brighten, a, b, brighten(b), darken(a))
    assert loss < 1e-6
    # of two equal generators, an image comes back at a quarter of its contrast
    loss = cycle_loss(lambda x: x / 2, lambda x: x / 2, a, b, b / 2, a / 2)
    torch.testing.assert_close(loss, 0.75 * (a.abs().mean() + b.abs().mean()))


def test_least_squares():
    scores = torch.tensor([1.0, 3.0])
    assert least_squares(scores, 1.0) == 2
    assert discriminator_loss(nn.Identity(), torch.ones(2, 1), torch.zeros(2, 1)) == 0
    assert discriminator_loss(nn.Identity(), torch.zeros(2, 1), torch.ones(2, 1)) == 1


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("method", ["cycle", "contrastive"])
def test_a_step_trains_whom_it_names(tmp_path, method, precision):
    AcceleratorState._reset_state(reset_partial_state=True)
    config = PRESETS["test"]()
    config = replace(config, training=replace(config.training, method=method))
    networks = create_networks(config)
    game = Game(config, networks, create_accelerator(tmp_path, precision))
    batch = Unpaired(draw_images(2, 1, 32, 32), draw_images(2, 1, 32, 32, seed=1))
    losses, generated = game.backward_G(batch, 0)
    assert all(p.grad.abs().sum() > 0 for p in game.parameters if p.ndim > 1)
    assert all(p.grad is None for p in game.parameters_D)
    names = {"cycle": {"loss_cycle"}, "contrastive": {"loss_contrastive"}}[method]
    assert set(losses) == names | {"loss_G", "loss_identity"}
    assert set(generated) == ({"a", "b"} if method == "cycle" else {"b"})
    for parameter in game.parameters:
        parameter.grad = None
    losses = game.backward_D({"a": batch.a, "b": batch.b}, generated)
    assert set(losses) == {"loss_D", "loss_D_spectrum"}
    assert all(p.grad.abs().sum() > 0 for p in game.parameters_D if p.ndim > 1)
    assert all(p.grad is None for p in game.parameters)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_of_the_losses(tmp_path):
    """The gradient of the whole is that of the weighted parts, by the paper's weights."""
    config = PRESETS["test"]()
    game = Game(config, create_networks(config), create_accelerator(tmp_path, "no"))
    assert game.find_weights() == {"loss_G": 1, "loss_cycle": 10, "loss_identity": 5}
    batch = Unpaired(draw_images(2, 1, 32, 32), draw_images(2, 1, 32, 32, seed=1))
    losses, generated = game.cycle(batch, 0)
    losses["loss_G"] = sum(game.deceive(images, name) for name, images in generated.items())
    loss = losses["loss_G"] + 10 * losses["loss_cycle"] + 5 * losses["loss_identity"]
    expected = torch.autograd.grad(loss, game.parameters)
    game.backward_G(batch, 0)
    for parameter, gradient in zip(game.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_without_spectra_there_is_no_such_discriminator():
    config = PRESETS["test"]()
    config = replace(config, training=replace(config.training, spectrum_weight=0.0))
    assert set(create_networks(config).discriminators) == {"a", "b"}


def test_the_pool_returns_each_image_at_least_once_and_half_of_the_new_ones():
    """Of a full pool, an image comes back now with probability 1/2, and else waits: the number of
    exchanges until its place is drawn is geometric with mean 2 x size.
    """
    size, num_images = 8, 4000
    pool = ImagePool(size, (1, 1, 1))
    rng = make_generator(0)
    returned = []
    for number in range(num_images):
        image = torch.full((1, 1, 1, 1), float(number))
        returned.append(int(pool.exchange(image, rng)))
    assert returned[:size] == list(range(size))  # while there is room
    ages = [number - each for number, each in enumerate(returned)][size:]
    fresh = sum(age == 0 for age in ages) / len(ages)
    assert abs(fresh - 0.5) < 4 * math.sqrt(0.25 / len(ages))
    waits = [age for age in ages[20 * size :] if age > 0]
    deviation = 2 * size / math.sqrt(len(waits))
    assert abs(sum(waits) / len(waits) - 2 * size) < 5 * deviation
    first = returned[size:]
    held = {int(each) for each in pool.images.flatten()}
    assert set(first) | held | set(range(size)) == set(range(num_images))  # none is lost
    assert len(first) == len(set(first) - set(range(size))) + sum(each < size for each in first)


def test_the_pool_is_restored_and_can_be_empty():
    images = draw_images(6, 1, 4, 4)
    pool, other = ImagePool(3, (1, 4, 4)), ImagePool(3, (1, 4, 4))
    pool.exchange(images, make_generator(0))
    other.load_state_dict(pool.state_dict())
    assert other.count == 3
    assert torch.equal(
        pool.exchange(images, make_generator(1)), other.exchange(images, make_generator(1))
    )
    assert torch.equal(ImagePool(0, (1, 4, 4)).exchange(images, make_generator(0)), images)


def test_the_contrastive_loss_is_that_of_its_formula():
    torch.manual_seed(0)
    queries, keys = (
        nn.functional.normalize(torch.randn(2, 5, 7, dtype=torch.float64), dim=-1) for _ in range(2)
    )
    loss, expected = contrastive_loss(queries, keys, 0.1), 0.0
    for image in range(2):
        for i in range(5):
            scores = [math.exp(float(queries[image, i] @ keys[image, j]) / 0.1) for j in range(5)]
            expected -= math.log(scores[i] / sum(scores)) / 10
    assert abs(float(loss) - expected) < 1e-9
    equal = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    assert contrastive_loss(equal, equal, 0.01) < 1e-9


def test_queries_and_keys_are_of_the_same_places():
    torch.manual_seed(0)
    generator, projection = EMResnetGenerator(4, 5), PatchProjection(4)
    features = find_features(generator, draw_images(2, 1, 32, 32))
    assert [each.shape[1] for each in features] == [1, 8, 16, 16, 16]
    first, second = (projection(features, 16, make_generator(0)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.shape == (2, 16, 256)
        assert torch.equal(a, b)
        torch.testing.assert_close(a.norm(dim=-1), torch.ones(2, 16))
    assert projection(features, 10**6, make_generator(0))[-1].shape == (2, 64, 256)
