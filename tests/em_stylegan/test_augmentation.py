"""Augmentation: what each part does, that p = 0 does nothing, that derivatives are right, and that
nothing leaks below p = 0.8.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from em_stylegan import augmentation, gan_loop
from em_stylegan.augmentation import AdaptiveProbability, Draws, _Sample, augment, blit, transform
from em_stylegan.config import AugmentationConfig
from em_stylegan.presets import PRESETS
from em_stylegan.train import train_gan
from em_training import load_checkpoint, read_stats
from support.config import refuses_config


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def waves(count=2, size=32):
    """Smooth images, so that interpolation is nearly exact."""
    x = torch.linspace(-1, 1, size, dtype=torch.float64)
    images = [torch.sin(2 * x[None] + i) * torch.cos(1.5 * x[:, None] - i) for i in range(count)]
    return torch.stack(images)[:, None]


def test_nothing_at_zero():
    images = waves()
    assert augment(images, 0.0, rng()) is images
    nothing = Draws(2, rng())
    assert torch.equal(blit(images, *augmentation.draw_blit(nothing, 0.0, 32)), images)
    assert torch.equal(transform(images, *augmentation.draw_geometry(nothing, 0.0)), images)
    factor, offset = augmentation.draw_intensity(nothing, 0.0)
    assert torch.equal(factor, torch.ones(2))
    assert torch.equal(offset, torch.zeros(2))


def test_blit():
    images = torch.arange(32.0).reshape(2, 1, 4, 4)
    no, still = torch.zeros(2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.long)
    flipped = blit(images, torch.tensor([True, False]), torch.zeros(2, dtype=torch.long), still)
    assert torch.equal(flipped[0], images[0].flip(2))
    assert torch.equal(flipped[1], images[1])
    for k in range(4):
        turned = blit(images, no, torch.full((2,), k), still)
        assert torch.equal(turned, torch.rot90(images, k, (2, 3)))
    shifted = blit(images, no, torch.zeros(2, dtype=torch.long), torch.tensor([[1, 0], [0, -1]]))
    assert shifted[0, 0, 0].tolist() == [1, 0, 1, 2]  # right by one, reflected
    assert shifted[1, 0, :, 0].tolist() == [20, 24, 28, 24]  # up by one


def test_transform_by_a_known_matrix():
    """A quarter turn, a whole-pixel shift, and an enlargement of a smooth image."""
    images = waves(1)
    yes = torch.ones(1, dtype=torch.bool)
    inner = (..., slice(8, -8), slice(8, -8))
    turn = augmentation._turning(torch.tensor([math.pi / 2]))
    torch.testing.assert_close(
        transform(images, turn, yes)[inner],
        torch.rot90(images, -1, (2, 3))[inner],
        atol=5e-3,
        rtol=0,
    )
    shift = augmentation._shifting(torch.tensor([2 * 3 / 32]), torch.tensor([-2 * 2 / 32]))
    expected = torch.roll(images, (3, -2), (3, 2))
    torch.testing.assert_close(
        transform(images, shift, yes)[inner], expected[inner], atol=5e-3, rtol=0
    )
    scale = torch.tensor([1.25])
    x = (torch.arange(32, dtype=torch.float64) + 0.5) / 16 - 1  # pixel centres
    coarse = torch.sin(2 * x[None]) * torch.cos(1.5 * x[:, None])
    expected = torch.sin(2 * x[None] / 1.25) * torch.cos(1.5 * x[:, None] / 1.25)
    result = transform(coarse[None, None], augmentation._scaling(scale, scale), yes)
    torch.testing.assert_close(result[0, 0, 8:-8, 8:-8], expected[8:-8, 8:-8], atol=5e-3, rtol=0)


def test_image_without_geometry_keeps_its_pixels():
    images = waves(2)
    matrix = augmentation._turning(torch.tensor([0.3, 0.3]))
    result = transform(images, matrix, torch.tensor([True, False]))
    assert torch.equal(result[1], images[1])
    assert not torch.equal(result[0], images[0])


def test_derivatives_of_any_order():
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=rng(1)).requires_grad_()
    grid = (
        torch.rand(2, 4, 4, 2, dtype=torch.float64, generator=rng(2)) * 2.4 - 1.2
    ).requires_grad_(False)
    assert gradcheck(_Sample.apply, (images, grid))
    assert gradgradcheck(_Sample.apply, (images, grid))
    assert gradcheck(lambda x: augment(x, 0.9, rng(3)), (images,), nondet_tol=0)
    assert gradgradcheck(lambda x: augment(x, 0.9, rng(3)).square(), (images,))


def test_randomness_is_the_generators():
    images = waves(4)
    assert torch.equal(augment(images, 0.7, rng(5)), augment(images, 0.7, rng(5)))
    assert not torch.equal(augment(images, 0.7, rng(5)), augment(images, 0.7, rng(6)))


@pytest.mark.parametrize("p", [0.2, 0.8])
def test_share_of_images_that_each_part_touches(p):
    draws = Draws(20_000, rng())
    flip, turns, shift = augmentation.draw_blit(draws, p, 64)
    matrix, applied = augmentation.draw_geometry(draws, p)
    factor, offset = augmentation.draw_intensity(draws, p)
    rate = {
        name: value.float().mean().item()
        for name, value in (
            ("flip", flip),
            ("turns", turns > 0),
            ("applied", applied),
            ("brightness", offset != 0),
            ("inversion", factor < 0),
        )
    }
    assert rate["flip"] == pytest.approx(p / 2, abs=0.015)
    assert rate["turns"] == pytest.approx(p * 3 / 4, abs=0.015)
    assert rate["applied"] == pytest.approx(1 - (1 - p) ** 4, abs=0.015)
    assert rate["brightness"] == pytest.approx(p, abs=0.015)
    assert rate["inversion"] == pytest.approx(p / 2, abs=0.015)
    assert shift.abs().max() == 8
    assert torch.equal((matrix == torch.eye(3)).all(dim=2).all(dim=1), ~applied)


def test_no_leak_below_p_of_0_8():
    """An augmentation leaks when it maps two distributions to one, that is, when its operator has
    an eigenvalue 0 (2020 ADA, appendix C).

    Each part is a random element of a commutative group, and its eigenvalues are the Fourier
    coefficients of that element's
    distribution: estimated here from draws, for every frequency, and compared with the bound 1 - p
    that holds for any distribution of non-negative coefficients."""
    p, count = 0.8, 200_000
    draws = Draws(count, rng())
    flip, turns, shift = augmentation.draw_blit(draws, p, 64)

    def coefficients(values, period):
        k = np.arange(1, period)
        histogram = np.bincount(np.asarray(values) % period, minlength=period) / count
        return np.abs(
            (histogram * np.exp(-2j * np.pi * np.outer(k, np.arange(period)) / period)).sum(axis=1)
        )

    noise = 4 / math.sqrt(count)
    assert coefficients(flip.long(), 2).min() > 1 - p - noise  # mirrored with p / 2: 1 - p
    assert coefficients(turns, 4).min() > 1 - p - noise  # uniform over the four: 1 - p
    # a uniform shift has a sinc, negative at worst by 0.22 of p
    assert coefficients(shift[:, 0], 126).min() > 1 - p - 0.22 * p - noise
    assert coefficients(shift[:, 0], 126).min() > 0.01
    factor, _ = augmentation.draw_intensity(draws, p)
    assert (factor.sign().mean().abs()) > 1 - p - noise  # inversion: 1 - 2 (p / 2)
    matrix, _ = augmentation.draw_geometry(draws, p)
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])
    for k in (1, 2, 3, 8):  # at least one turn has probability p: 1 - p are left as they are
        assert torch.exp(1j * k * angle).mean().abs() > 1 - p - 0.05 - noise
    # at p = 1 it does leak: every turn is as likely as any other
    turns = augmentation.draw_blit(Draws(count, rng()), 1.0, 64)[1]
    assert coefficients(turns, 4).max() < 2 * noise


def test_probability_follows_the_discriminators_certainty():
    adaptive = AdaptiveProbability(0.0, 0.6, images_to_one=1000, every_steps=4)
    for _ in range(40):
        adaptive.update(torch.tensor(0.9), 10)
    assert adaptive.p == pytest.approx(0.4)
    for _ in range(20):
        adaptive.update(torch.tensor(0.1), 10)
    assert adaptive.p == pytest.approx(0.2)
    for _ in range(80):
        adaptive.update(torch.tensor(0.1), 10)
    assert adaptive.p == 0
    fixed = AdaptiveProbability(0.3, None, 1000, 4)
    for _ in range(8):
        fixed.update(torch.tensor(1.0), 10)
    assert fixed.p == 0.3


def test_adaptive_probability_is_resumed():
    whole = AdaptiveProbability(0.1, 0.6, 1000, 4)
    part = AdaptiveProbability(0.1, 0.6, 1000, 4)
    for sign in (0.9, 0.8, 0.7):
        whole.update(torch.tensor(sign), 10)
    part.load_state_dict(whole.state_dict())
    assert whole.update(torch.tensor(0.1), 10) == part.update(torch.tensor(0.1), 10)
    assert whole.p != 0.1


def test_training_with_it_resumes_to_the_bit(tmp_path, monkeypatch):
    preset = PRESETS["test"]()
    adaptive = AugmentationConfig(
        "adaptive", initial_probability=0.4, images_to_one=400, every_steps=2
    )
    config = replace(
        preset,
        precision="no",
        out=str(tmp_path / "whole"),
        tiles=replace(preset.tiles, cache_dir=str(tmp_path / "cache")),
        training=replace(
            preset.training, augmentation=adaptive, path_length_weight=0.0, checkpoint_every=16
        ),
    )

    class Killed(BaseException):
        pass

    class MortalRun(gan_loop.TrainingRun):
        def step(self, num_images_seen):
            super().step(num_images_seen)
            if num_images_seen == 40:
                raise Killed

    train_gan(config)
    resumed = replace(config, out=str(tmp_path / "resumed"))
    with monkeypatch.context() as patch:
        patch.setattr(gan_loop, "TrainingRun", MortalRun)
        with pytest.raises(Killed):
            train_gan(resumed)
    train_gan(resumed)
    states = [
        load_checkpoint(tmp_path / name / "stylegan" / "checkpoints" / f"{64:012d}")["state"]
        for name in ("whole", "resumed")
    ]
    assert states[0]["augmentation"]["p"] == states[1]["augmentation"]["p"] != 0.4
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name])
    lines = read_stats(tmp_path / "whole" / "stylegan")
    assert all(0 <= line["augmentation_probability"] <= 1 for line in lines)
    assert (
        json.loads((tmp_path / "whole" / "config.json").read_text())["training"]["augmentation"][
            "mode"
        ]
        == "adaptive"
    )


@pytest.mark.parametrize(
    "options", [{"mode": "some"}, {"initial_probability": 1.5}, {"every_steps": 0}]
)
def test_impossible_augmentation_is_refused(options):
    with refuses_config(r"training\.augmentation\.\w+ is"):
        AugmentationConfig(**options)
