"""The grain that an autoencoder leaves out: measured on images of which it is known, and drawn
again.
"""

import numpy as np
import pytest
import torch

from em_diffusion.em_grain import EMGrain, interpolate
from em_diffusion.grain import fit_grain, frequency_rings
from em_evaluation.micrograph_statistics import ring_powers
from em_training.noise import measure_power

SIZE = 32


def low_pass(noise, cutoff):
    """White noise without what is above `cutoff` cycles per pixel, of unit variance."""
    rows, columns = torch.fft.fftfreq(noise.shape[-2]), torch.fft.rfftfreq(noise.shape[-1])
    kept = torch.fft.rfft2(noise) * (torch.hypot(rows[:, None], columns[None]) < cutoff)
    filtered = torch.fft.irfft2(kept, s=noise.shape[-2:])
    return filtered / filtered.std()


def mean_spectrum(images):
    return ring_powers(images[:, 0].numpy()).mean(0)


@pytest.fixture(scope="module")
def known():
    """(decoded images, their grain): 0.05 to 0.15 by grey level, blurred, in half of the images
    three times as strong.
    """
    generator = torch.Generator().manual_seed(0)
    decoded = 0.3 * low_pass(torch.randn(600, 1, SIZE, SIZE, generator=generator), 0.1)
    noise = low_pass(torch.randn(600, 1, SIZE, SIZE, generator=generator), 0.35)
    strengths = torch.tensor([1.0, 3.0]).repeat(300).view(-1, 1, 1, 1)
    return decoded, 0.5 * strengths * (0.1 + 0.05 * decoded.clamp(-1, 1)) * noise


def test_known_grain_is_recovered(known):
    decoded, added = known
    grain = fit_grain(decoded + added, decoded)
    drawn = grain(decoded, torch.Generator().manual_seed(1)) - decoded
    assert drawn.square().mean() == pytest.approx(added.square().mean().item(), rel=0.1)
    # 0.35 cycles per pixel are the 11th frequency of 16
    below = (mean_spectrum(drawn) / mean_spectrum(added))[:10]
    np.testing.assert_allclose(
        below, 1, atol=0.2
    )  # what is missing of strong structure is known less well
    above = mean_spectrum(drawn)[12:]
    assert (above < 0.01 * mean_spectrum(drawn)[5]).all()
    for grey in (decoded < -0.3, (decoded > -0.1) & (decoded < 0.1), decoded > 0.3):
        assert drawn[grey].std() == pytest.approx(added[grey].std().item(), rel=0.1)
    levels, expected = (
        each.square().mean(dim=(1, 2, 3)).sqrt().sort().values for each in (drawn, added)
    )
    np.testing.assert_allclose(
        levels[[30, 150, 450, 570]], expected[[30, 150, 450, 570]], rtol=0.15
    )


def test_images_that_lack_nothing_get_nothing(known):
    decoded, added = known
    assert torch.equal(fit_grain(decoded, decoded)(decoded), decoded)
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(300, generator=generator) * 2
    order = torch.stack([order, order + 1], dim=1).flatten()  # each strength stays where it is
    own = decoded + added[order]  # an autoencoder that draws other grain of the right power
    extra = fit_grain(decoded + added, own)(own, generator) - own
    assert extra.square().mean() < 0.1 * added.square().mean()
    half = decoded + 0.5**0.5 * added[order]  # of half the power: the other half is missing
    extra = fit_grain(decoded + added, half)(half, generator) - half
    assert extra.square().mean() == pytest.approx(0.5 * added.square().mean().item(), rel=0.15)


def test_structure_that_is_missing_is_not_made_up_for_by_noise():
    """Reconstructions of too low a contrast lack power that is far above the residual's: no more is
    added than that has.
    """
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * low_pass(torch.randn(200, 1, SIZE, SIZE, generator=generator), 0.1)
    decoded = 0.9 * images
    added = fit_grain(images, decoded)(decoded, generator) - decoded
    assert added.square().mean() <= 1.1 * (images - decoded).square().mean()
    assert (images.square().mean() - decoded.square().mean()) > 10 * added.square().mean()


def test_structure_that_some_images_lost_is_not_taken_for_noise():
    """A tenth of the images lost smooth structure far stronger than the noise of all: no image is
    given more noise for it.
    """
    generator = torch.Generator().manual_seed(0)
    decoded = torch.zeros(400, 1, SIZE, SIZE)
    noise = 0.05 * torch.randn(400, 1, SIZE, SIZE, generator=generator)
    lost = 0.5 * low_pass(torch.randn(400, 1, SIZE, SIZE, generator=generator), 0.1)
    lost[40:] = 0
    drawn = fit_grain(decoded + noise + lost, decoded)(decoded, generator)
    assert drawn.std() == pytest.approx(0.05, rel=0.1)
    assert drawn.std(dim=(1, 2, 3)).max() < 0.07


def test_anisotropy_is_kept():
    """Scan lines: each row has its own level."""
    generator = torch.Generator().manual_seed(0)
    decoded = torch.zeros(400, 1, SIZE, SIZE)
    lines = 0.1 * torch.randn(400, 1, SIZE, 1, generator=generator).expand(-1, -1, -1, SIZE)
    drawn = fit_grain(decoded + lines, decoded)(decoded, generator)
    assert drawn.std() == pytest.approx(0.1, rel=0.1)
    assert drawn.diff(dim=-1).abs().max() < 1e-5 < 0.05 < drawn.diff(dim=-2).std()


def test_the_filter_is_a_circular_convolution_and_keeps_the_variance():
    height, width = 6, 8
    grain = EMGrain((height, width))
    amplitude = torch.rand(height, width // 2 + 1, generator=torch.Generator().manual_seed(0)) + 0.1
    amplitude[-2:, 0], amplitude[-2:, -1] = (
        amplitude[1:3, 0].flip(0),
        amplitude[1:3, -1].flip(0),
    )  # of a real kernel
    mean_square = (amplitude.square() * frequency_rings(height, width)[1]).sum() / (height * width)
    grain.load_state_dict(grain.state_dict() | {"amplitude": amplitude / mean_square.sqrt()})
    noise = torch.randn(2, 1, height, width, generator=torch.Generator().manual_seed(1))
    kernel = torch.fft.irfft2(grain.amplitude, s=(height, width))
    expected = torch.zeros_like(noise)
    for i in range(height):
        for j in range(width):
            expected += kernel[i, j] * noise.roll((i, j), dims=(-2, -1))
    torch.testing.assert_close(grain.filter(noise), expected)
    assert kernel.square().sum() == pytest.approx(
        1, rel=1e-5
    )  # the variance of what the filter makes of white noise


def test_power_is_parsevals():
    images = torch.randn(70, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    total = (measure_power(images) * frequency_rings(6, 8)[1]).sum()
    assert total / (6 * 8) == pytest.approx(images.square().mean().item(), rel=1e-5)


def test_each_image_depends_on_its_generator_alone(known):
    decoded, added = known
    grain = fit_grain(decoded + added, decoded)

    def draw(numbers):
        return grain(decoded[numbers], [torch.Generator().manual_seed(i) for i in numbers])

    whole = draw(list(range(20)))
    torch.testing.assert_close(torch.cat([draw([19]), draw([3, 4])]), whole[[19, 3, 4]])
    same = grain(
        decoded[:1].expand(2, -1, -1, -1), [torch.Generator().manual_seed(i) for i in (0, 1)]
    )
    assert (same[0] - same[1]).abs().max() > 0.05


def test_interpolation_is_numpys():
    knots, values = torch.tensor([-0.5, 0.1, 0.2, 0.9]), torch.tensor([1.0, 3.0, -1.0, 2.0])
    x = torch.linspace(-2, 2, 101).view(1, 101)
    np.testing.assert_allclose(
        interpolate(x, knots, values), np.interp(x, knots, values), atol=1e-6
    )
    assert torch.equal(interpolate(x, knots[:1], values[:1]), torch.ones_like(x))


@pytest.mark.parametrize("decoded", [torch.zeros(4, 1, 8, 8), torch.full((1, 1, 8, 8), -1.0)])
def test_flat_reconstructions_are_no_trouble(decoded):
    images = decoded + 0.1 * torch.randn(decoded.shape, generator=torch.Generator().manual_seed(0))
    drawn = fit_grain(images, decoded)(decoded, torch.Generator().manual_seed(1))
    assert drawn.isfinite().all()
    assert 0.05 < (drawn - decoded).std() < 0.2


def test_other_sizes_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"\(64, 64\) pixels.*add_grain=False"):
        EMGrain()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"both be \[N, 1, H, W\]"):
        fit_grain(torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8))
