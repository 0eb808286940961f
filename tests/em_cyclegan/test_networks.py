"""Generator and discriminators: shapes, patches, translation of shifted images, spectra."""

import numpy as np
import pytest
import torch
from torch import nn

from em_cyclegan import config as configuration
from em_cyclegan import em_resnet_generator
from em_cyclegan.discriminators import (
    LOG_MEAN,
    LOG_STD,
    POWER_FLOOR,
    PatchDiscriminator,
    SpectrumDiscriminator,
    log_power_spectrum,
)
from em_cyclegan.em_resnet_generator import EMResnetGenerator
from em_cyclegan.networks import Translators, create_networks, learning_rate_at
from em_cyclegan.presets import PRESETS


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return EMResnetGenerator(base_channels=4, num_blocks=2).eval()


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (24, 40)])
def test_images_keep_their_size(generator, size):
    images = torch.rand(2, 1, *size) * 2 - 1
    output = generator(images)
    assert output.shape == images.shape
    assert output.abs().max() <= 1


def test_the_paper_has_as_many_weights_as_its_layers():
    """c7s1-64, d128, d256, 9 x R256, u128, u64, c7s1-1; no bias before an instance norm."""
    pairs = [(64, 128), (128, 256), *[(256, 256)] * 18, (256, 128), (128, 64)]
    expected = 49 * 64 + 9 * sum(a * b for a, b in pairs) + 49 * 64 + 1
    assert sum(p.numel() for p in EMResnetGenerator().parameters()) == expected


def test_images_of_a_batch_do_not_see_each_other(generator):
    images = torch.rand(3, 1, 16, 16) * 2 - 1
    alone = torch.cat([generator(image[None]) for image in images])
    torch.testing.assert_close(generator(images), alone, rtol=1e-4, atol=1e-5)


def test_a_generator_that_adds_its_input_begins_near_the_identity():
    torch.manual_seed(0)
    generator = EMResnetGenerator(8, 2, adds_input=True)
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    change = generator(images) - images
    assert 0 < change.std() < images.std()
    nn.init.zeros_(generator.to_image.weight)
    assert torch.equal(generator(images), images)


def test_sizes_of_the_configuration_are_those_of_the_generator(generator):
    assert (em_resnet_generator.STRIDE, em_resnet_generator.MIN_SIDE) == (
        configuration.STRIDE,
        configuration.MIN_SIDE,
    )
    with pytest.raises((RuntimeError, ValueError)):
        generator(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="num_blocks 0"):
        EMResnetGenerator(4, 0)


@pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_score_sees_a_patch(num_layers, patch):
    """Instance norms are replaced: they see the whole image."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(2, num_layers)
    layers = [each for each in discriminator.layers if not isinstance(each, nn.GroupNorm)]
    image = torch.rand(1, 1, 160, 160, requires_grad=True)
    scores = nn.Sequential(*layers)(image)
    middle = scores.shape[-1] // 2
    (gradient,) = torch.autograd.grad(scores[0, 0, middle, middle], image)
    rows = gradient[0, 0].abs().sum(dim=1).nonzero()
    assert rows.max() - rows.min() + 1 == patch


def test_white_noise_has_its_variance_at_every_frequency():
    torch.manual_seed(0)
    for side in (32, 64):
        noise = 0.1 * torch.randn(400, 1, side, side, dtype=torch.float64)
        power = (log_power_spectrum(noise) * LOG_STD + LOG_MEAN).exp() - POWER_FLOOR
        mean = power.mean(dim=0)[0]
        mean[side // 2 - 2 : side // 2 + 3, side // 2 - 2 : side // 2 + 3] = 0.01  # the mean's
        torch.testing.assert_close(mean, torch.full_like(mean, 0.01), rtol=0.3, atol=0)
        assert abs(mean.mean() - 0.01) < 0.0002


def test_a_wave_is_at_its_frequency():
    rows = torch.arange(32.0).view(1, 1, 32, 1).expand(1, 1, 32, 32)
    spectrum = log_power_spectrum(torch.cos(2 * torch.pi * 5 * rows / 32))[0, 0]
    peak = np.unravel_index(spectrum.argmax().item(), spectrum.shape)
    assert peak in ((16 - 5, 16), (16 + 5, 16))
    torch.testing.assert_close(spectrum[16 - 5, 16], spectrum[16 + 5, 16])


def test_a_spectrum_does_not_see_the_mean_or_a_turn_by_half():
    torch.manual_seed(0)
    image = torch.rand(1, 1, 32, 32, dtype=torch.float64) - 0.5
    spectrum = log_power_spectrum(image)
    torch.testing.assert_close(log_power_spectrum(image + 0.3), spectrum)
    torch.testing.assert_close(log_power_spectrum(image.flip(-1, -2)), spectrum)


def test_gradient_of_the_spectrum_discriminator_is_that_of_finite_differences():
    torch.manual_seed(0)
    discriminator = SpectrumDiscriminator(2, 2).double()
    for parameter in discriminator.parameters():
        nn.init.normal_(parameter, std=0.3)
    image = (torch.rand(1, 1, 16, 16, dtype=torch.float64) - 0.5).requires_grad_()

    def score(image):
        return discriminator(image).square().sum()

    (gradient,) = torch.autograd.grad(score(image), image)
    assert gradient.abs().max() > 1e-3
    for row, column in ((0, 0), (3, 7), (8, 8), (15, 2)):
        step = torch.zeros_like(image)
        step[0, 0, row, column] = 1e-6
        difference = (score(image + step) - score(image - step)) / 2e-6
        torch.testing.assert_close(
            gradient[0, 0, row, column], difference.detach(), rtol=1e-5, atol=1e-7
        )


def test_a_spectrum_is_computed_in_float32_under_autocast():
    image = torch.rand(1, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_power_spectrum(image), log_power_spectrum(image))
        assert log_power_spectrum(image.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(
        log_power_spectrum(image), log_power_spectrum(image.double()).float(), atol=1e-4, rtol=1e-4
    )


def test_networks_depend_on_the_seed_alone(tmp_path):
    config = PRESETS["test"]()
    first, second = create_networks(config), create_networks(config)
    assert set(first.discriminators) == {"a", "b", "a_spectrum", "b_spectrum"}
    assert first.projection is None
    for a, b in zip(first.generators.parameters(), second.generators.parameters(), strict=True):
        assert torch.equal(a, b)
    first.generators.save_pretrained(tmp_path)
    loaded = Translators.from_pretrained(tmp_path)
    assert set(loaded) == {"a_to_b", "b_to_a"}
    for name, value in first.generators.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_learning_rate_is_constant_and_then_falls_to_zero():
    training = PRESETS["paper"]().training
    rates = [learning_rate_at(training, share * training.num_images // 4) for share in range(5)]
    np.testing.assert_allclose(rates, [2e-4, 2e-4, 2e-4, 1e-4, 0])


def test_blocks_follow_the_resolution():
    assert PRESETS["paper"]().num_blocks == 9
    assert PRESETS["test"]().num_blocks == 2
