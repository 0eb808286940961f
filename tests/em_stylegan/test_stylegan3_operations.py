"""StyleGAN3's filters against scipy, its operations against their slow twins, with gradients and
second gradients, in float64.
"""

import numpy as np
import pytest
import scipy.signal
import scipy.special
import torch
from torch.autograd import gradcheck, gradgradcheck

from em_stylegan import em_stylegan3_generator as fast
from support import stylegan_reference as slow


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def compare(f, g, inputs):
    """f and g agree in value, gradients and gradients of the squared gradients."""
    results = []
    for function in (f, g):
        y = function(*inputs)
        cotangent = draw(*y.shape, seed=7).detach()
        first = torch.autograd.grad((y.square() * cotangent).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(a.square().sum() for a in first), inputs)
        results.append([y, *first, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert all(value.abs().max() > 0 for value in results[0])


@pytest.mark.parametrize(
    ("num_taps", "cutoff", "width", "rate"),
    [(12, 2.0, 12.0, 32), (24, 4.0, 8.0, 64), (12, 16.0, 7.4, 64), (12, 2.0, 0.5, 32)],
)
def test_filter_is_scipys(num_taps, cutoff, width, rate):
    expected = scipy.signal.firwin(num_taps, cutoff, width=width, fs=rate)
    np.testing.assert_allclose(
        fast.design_filter(num_taps, cutoff, width, rate), expected, atol=1e-14
    )


def test_bessel_function_is_scipys():
    x = np.concatenate([np.linspace(-60, 60, 1001), [0.0, 1e-9]])
    np.testing.assert_allclose(fast.bessel_j1(x), scipy.special.j1(x), atol=1e-14)


@pytest.mark.parametrize("num_taps", [12, 11])
def test_radial_filter(num_taps):
    """A jinc under a Kaiser window: symmetric under all eight turns and flips, nearly a function of
    the radius in frequency, with just under half of the amplitude at the cutoff in every
    direction."""
    cutoff, rate = 8.0, 64
    taps = fast.design_radial_filter(num_taps, cutoff, 16.0, rate)
    assert taps.sum() == pytest.approx(1)
    for same in (np.rot90(taps), taps.T, taps[::-1]):
        np.testing.assert_allclose(taps, same, atol=1e-16)
    x = (np.arange(num_taps) - (num_taps - 1) / 2) / rate
    angles = np.linspace(0, np.pi / 2, 7)

    def response(frequency, angle):
        phase = np.cos(angle) * x[None] + np.sin(angle) * x[:, None]
        return (taps * np.cos(2 * np.pi * frequency * phase)).sum()

    at_cutoff = [response(cutoff, angle) for angle in angles]
    assert np.ptp(at_cutoff) < 0.02
    assert 0.4 < np.mean(at_cutoff) < 0.5
    # a separable filter passes the diagonal's frequencies up to sqrt(2) the cutoff: at cutoff its
    # amplitude there is higher
    line = fast.design_filter(num_taps, cutoff, 16.0, rate)
    separable = [
        (
            np.outer(line, line)
            * np.cos(2 * np.pi * cutoff * (np.cos(a) * x[None] + np.sin(a) * x[:, None]))
        ).sum()
        for a in angles
    ]
    assert np.ptp(separable) > 4 * np.ptp(at_cutoff)


CASES = {
    "same": (9, 7, 2, 2, False),
    "rise": (10, 16, 4, 2, False),
    "crop": (14, 4, 2, 2, False),
    "radial": (9, 7, 2, 2, True),
    "radial rise": (9, 14, 4, 2, True),
}


def make_activation(case, dense, clamp=0.8):
    in_size, out_size, up, down, radial = CASES[case]
    rate = 8.0 * up
    up_taps = fast.design_filter(6 * up, 2.0, 4.0, rate)
    down_taps = (fast.design_radial_filter if radial else fast.design_filter)(
        6 * down, 2.4, 4.0, rate
    )
    activation = fast.FilteredLeakyReLU(
        in_size, out_size, up, down, up_taps, down_taps, clamp=clamp
    )
    if not dense:
        activation.dense = False
    activation.up_taps, activation.down_taps = (
        torch.from_numpy(up_taps),
        torch.from_numpy(down_taps),
    )
    activation.up_matrix = torch.from_numpy(
        fast.upsampling_matrix(up_taps, in_size, up, activation.padding)
    )
    if not radial:
        middle = (out_size - 1) * down + len(down_taps)
        activation.down_matrix = torch.from_numpy(fast.downsampling_matrix(down_taps, middle, down))
    return activation, in_size, out_size


@pytest.mark.parametrize("dense", [True, False], ids=["matrices", "convolutions"])
@pytest.mark.parametrize("case", CASES)
def test_filtered_leaky_relu(case, dense):
    activation, in_size, out_size = make_activation(case, dense)
    options = {
        name: getattr(activation, name)
        for name in ("up", "down", "padding", "gain", "slope", "clamp")
    }

    def run_slow(x, bias):
        return slow.filtered_leaky_relu(
            x, bias, activation.up_taps, activation.down_taps, **options
        )

    inputs = [draw(2, 3, in_size, in_size), draw(3, seed=1)]
    assert activation(*inputs).shape == (2, 3, out_size, out_size)
    compare(activation, run_slow, inputs)


@pytest.mark.parametrize("dense", [True, False], ids=["matrices", "convolutions"])
@pytest.mark.parametrize("radial", [False, True])
def test_second_derivatives_of_the_filtered_leaky_relu(dense, radial):
    taps = fast.design_filter(4, 2.0, 4.0, 16.0)
    down_taps = fast.design_radial_filter(4, 2.0, 4.0, 16.0) if radial else taps
    activation = fast.FilteredLeakyReLU(4, 3, 2, 2, taps, down_taps, clamp=0.8).double()
    activation.dense = dense
    inputs = (draw(1, 2, 4, 4), draw(2, seed=1))
    assert gradcheck(activation, inputs)
    assert gradgradcheck(activation, inputs)


@pytest.mark.parametrize(("operation", "size"), [("up", 5), ("down", 12), ("radial", 12)])
def test_second_derivatives_of_the_filters(operation, size):
    taps = torch.from_numpy(fast.design_filter(4, 2.0, 4.0, 16.0))
    radial = torch.from_numpy(fast.design_radial_filter(4, 2.0, 4.0, 16.0))
    functions = {
        "up": lambda x: fast.upsample(x, taps, 2, (3, -1)),
        "down": lambda x: fast.downsample(x, taps, 2),
        "radial": lambda x: fast.downsample(x, radial, 2),
    }
    x = draw(1, 2, size, size)
    assert gradcheck(functions[operation], (x,))
    assert gradgradcheck(functions[operation], (x,))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_convolution(size, demodulate):
    inputs = [draw(3, 2, 5, 6), draw(4, 2, size, size, seed=1), draw(3, 2, seed=2)]
    options = {"demodulate": demodulate, "input_gain": 0.6}
    compare(
        lambda *a: fast.modulated_conv2d(*a, **options),
        lambda *a: slow.alias_free_modulated_conv2d(*a, **options),
        inputs,
    )


def test_second_derivatives_of_the_modulated_convolution():
    inputs = (draw(2, 2, 3, 3), draw(2, 2, 3, 3, seed=1), draw(2, 2, seed=2))
    assert gradcheck(fast.modulated_conv2d, inputs)
    assert gradgradcheck(fast.modulated_conv2d, inputs)


def test_fourier_features():
    torch.manual_seed(0)
    layer = fast.FourierFeatures(5, 4, 6, 4.0, 1.2).double()
    torch.nn.init.normal_(layer.affine.weight)
    layer.transform.copy_(torch.tensor([[0.9, -0.5, 0.2], [0.6, 1.2, -0.3], [0, 0, 1]]))
    layer.phases.normal_()

    def run_slow(w):
        names = ("frequencies", "phases", "transform", "weight")
        tensors = [getattr(layer, name) for name in names]
        return slow.fourier_features(
            w, 6, 4.0, 1.2, *tensors, layer.affine.weight, layer.affine.bias
        )

    compare(layer, run_slow, [draw(2, 5)])
    assert gradgradcheck(layer, (draw(1, 5),))


def test_activation_keeps_a_slow_wave_where_it_is():
    """Without its kink and far from the border, the operation is the identity on waves below the
    cutoffs, in place and amplitude.
    """
    size, rate = 48, 16.0
    taps = fast.design_filter(12, 6.0, 6.0, 32.0)
    activation = fast.FilteredLeakyReLU(size, size, 2, 2, taps, taps, gain=1.0, slope=1.0)
    x = (torch.arange(size) - (size - 1) / 2) / rate
    wave = torch.sin(2 * torch.pi * (1.1 * x[:, None] + 0.4 * x[None]) + 0.5)[None, None]
    result = activation(wave, torch.zeros(1))
    error = (result - wave)[:, :, 8:-8, 8:-8].abs().max()
    assert error < 0.03
