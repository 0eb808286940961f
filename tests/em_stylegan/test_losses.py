"""The losses against closed forms."""

import math

import pytest
import torch

from em_stylegan.game import compute_gradient_penalty
from em_stylegan.losses import (
    PathLengthMean,
    blur_sigma,
    discriminator_loss,
    gaussian_blur,
    generator_loss,
    path_lengths,
    r1_penalty,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
)


def test_logistic_losses_are_the_binary_cross_entropy_of_the_probabilities():
    real, fake = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.5], [-3.0]])
    p_real, p_fake = real.sigmoid(), fake.sigmoid()
    torch.testing.assert_close(
        discriminator_loss(real, fake), -(p_real.log().mean() + (1 - p_fake).log().mean())
    )
    torch.testing.assert_close(generator_loss(fake), -p_fake.log().mean())


def test_losses_at_ignorance_are_log_2():
    nothing = torch.zeros(3, 1)
    assert generator_loss(nothing).item() == pytest.approx(math.log(2))
    assert discriminator_loss(nothing, nothing).item() == pytest.approx(2 * math.log(2))


def test_losses_stay_finite_and_push_where_a_naive_logarithm_fails():
    scores = torch.full((1, 1), -200.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(generator_loss(scores), scores)
    assert generator_loss(scores).item() == pytest.approx(200)
    assert gradient.item() == pytest.approx(-1)


def test_r1_of_a_quadratic_discriminator():
    images = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = torch.tensor(0.7, requires_grad=True)
    penalty = r1_penalty(
        (scale * images.square()).sum(dim=(1, 2, 3)).unsqueeze(1), images
    )  # D = a |x|^2, dD/dx = 2 a x
    expected = 4 * 0.7**2 * images.square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(penalty, expected)
    (gradient,) = torch.autograd.grad(penalty.sum(), scale)
    torch.testing.assert_close(gradient, (expected * 2 / 0.7).sum())


def test_path_length_of_a_linear_generator_is_the_norm_of_its_transpose_times_the_noise():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 64, generator=generator, dtype=torch.float64).requires_grad_()
    ws = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    noise = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    images = (ws.sum(dim=1) @ matrix).reshape(2, 1, 8, 8)
    lengths = path_lengths(images, ws, noise)
    expected = (noise.flatten(1) / 8 @ matrix.T).norm(
        dim=1
    )  # the same gradient in each of the three layers
    torch.testing.assert_close(lengths, expected)
    (a,) = torch.autograd.grad(lengths.sum(), matrix, retain_graph=True)
    (b,) = torch.autograd.grad(expected.sum(), matrix)
    torch.testing.assert_close(a, b)


def test_path_length_mean_converges_and_is_restored():
    mean = PathLengthMean(decay=0.1)
    for n in range(1, 6):
        assert mean.update(torch.tensor(3.0)).item() == pytest.approx(3 * (1 - 0.9**n))
    other = PathLengthMean(decay=0.1)
    other.load_state_dict(mean.state_dict())
    assert torch.equal(other.update(torch.tensor(1.0)), mean.update(torch.tensor(1.0)))


def test_blur_is_a_gaussian_of_that_deviation():
    image = torch.zeros(1, 1, 65, 65, dtype=torch.float64)
    image[0, 0, 32, 32] = 1
    blurred = gaussian_blur(image, 3.0)[0, 0]
    position = torch.arange(65, dtype=torch.float64) - 32
    assert blurred.sum().item() == pytest.approx(1)
    for weights in (blurred.sum(dim=0), blurred.sum(dim=1)):
        assert (weights * position).sum().item() == pytest.approx(0, abs=1e-12)
        assert (weights * position**2).sum().item() == pytest.approx(9, rel=0.05)
    constant = torch.ones(1, 2, 8, 8)
    torch.testing.assert_close(gaussian_blur(constant, 10.0), constant)
    assert gaussian_blur(constant, 0.0) is constant


def test_blur_fades():
    assert [blur_sigma(n, 10.0, 200) for n in (0, 100, 200, 300)] == [10.0, 5.0, 0.0, 0.0]
    assert blur_sigma(0, 0.0, 200) == 0
    assert blur_sigma(0, 10.0, 0) == 0


def test_relativistic_losses_and_their_gradients():
    """softplus of the difference of a pair; the derivative is the sigmoid, and the two sides pull
    against each other.
    """
    generator = torch.Generator().manual_seed(0)
    real, fake = (
        torch.randn(5, 1, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    difference = (real - fake).detach()
    loss_D, loss_G = (
        relativistic_discriminator_loss(real, fake),
        relativistic_generator_loss(real, fake),
    )
    torch.testing.assert_close(loss_D, (-difference.sigmoid().log()).mean())
    torch.testing.assert_close(loss_G, (-(-difference).sigmoid().log()).mean())
    for loss, pull in ((loss_D, -(-difference).sigmoid() / 5), (loss_G, difference.sigmoid() / 5)):
        at_real, at_fake = torch.autograd.grad(loss, (real, fake))
        torch.testing.assert_close(at_real, pull)
        torch.testing.assert_close(at_fake, -pull)
    torch.testing.assert_close(
        relativistic_discriminator_loss(real + 3, fake + 3), loss_D
    )  # only differences count
    assert relativistic_generator_loss(
        torch.full((1, 1), 300.0), torch.zeros(1, 1)
    ).item() == pytest.approx(300)


def test_gradients_of_r1_and_r2_of_a_quadratic_discriminator():
    """D = a |x|^2: R1 + R2 = 4 a^2 (E|x|^2 + E|G|^2), whose derivative in a is twice that over
    a.
    """
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    real, fake = (
        torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    penalty = sum(
        compute_gradient_penalty(lambda x: (a * x.square()).sum(dim=(1, 2, 3)), images, lambda x: x)
        for images in (real, fake)
    )
    squares = sum(images.detach().square().sum(dim=(1, 2, 3)).mean() for images in (real, fake))
    torch.testing.assert_close(penalty, 4 * 0.7**2 * squares)
    (gradient,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(gradient, 8 * 0.7 * squares)
