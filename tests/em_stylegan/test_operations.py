"""Every fast operation equals its slow twin, with gradients and second gradients, in float64."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from em_stylegan import discriminator as fast_discriminator
from em_stylegan import em_stylegan2_generator as fast
from em_stylegan.em_style_mapping import normalize_second_moment
from em_stylegan.em_stylegan1_generator import adaptive_instance_norm
from em_stylegan.second_derivatives import second_derivatives
from support import stylegan_reference as slow

KERNEL = fast.blur_kernel().double()


@pytest.fixture(params=[False, True], ids=["first", "second"])
def derivatives(request):
    """With PyTorch's convolutions, and with those for second derivatives."""
    with second_derivatives() if request.param else nullcontext():
        yield


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def compare(f, g, inputs):
    """f and g agree in value, in gradients, and in the gradients of the squared gradients (of the
    squared output, since most of these are linear)."""
    results = []
    for function, context in ((f, nullcontext()), (g, torch._C.DisableTorchFunction())):
        with context:  # g has PyTorch's convolutions
            y = function(*inputs)
        cotangent = draw(*y.shape, seed=7).detach()
        first = torch.autograd.grad((y.square() * cotangent).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(a.square().sum() for a in first), inputs)
        results.append([y, *first, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert all(value.abs().max() > 0 for value in results[0])


@pytest.mark.usefixtures("derivatives")
@pytest.mark.parametrize(("size", "up"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize(("demodulate", "gain"), [(True, 1.4), (False, 1.0), (False, 1.4)])
def test_modulated_convolution(size, up, demodulate, gain):
    inputs = [draw(3, 2, 5, 6), draw(4, 2, size, size, seed=1), draw(3, 2, seed=2)]
    options = {"demodulate": demodulate, "kernel": KERNEL if up else None, "gain": gain}
    compare(
        lambda *a: fast.modulated_conv2d(*a, **options),
        lambda *a: slow.modulated_conv2d(*a, **options),
        inputs,
    )


@pytest.mark.usefixtures("derivatives")
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("activation", [False, True])
def test_equalised_convolution(size, down, activation):
    layer = fast.EqualizedConv2d(2, 3, size, down=down, activation=activation).double()
    kernel = KERNEL if down else None

    def run_fast(x, weight, bias):
        return torch.func.functional_call(
            layer, {"weight": weight, "bias": bias}, (x,), {"gain": 0.7, "clamp": 1.5}
        )

    def run_slow(x, weight, bias):
        return slow.equalized_conv2d(
            x, weight, bias, kernel=kernel, activation=activation, gain=0.7, clamp=1.5
        )

    compare(run_fast, run_slow, [draw(2, 2, 6, 8), draw(3, 2, size, size, seed=1), draw(3, seed=2)])


@pytest.mark.usefixtures("derivatives")
def test_upsampling():
    compare(
        lambda x: fast.upsample(x, KERNEL), lambda x: slow.upsample(x, KERNEL), [draw(2, 3, 4, 5)]
    )


def test_halving_filter():
    compare(
        lambda x: fast.blur(x, KERNEL, padding=1, stride=2),
        lambda x: slow.downsample(x, KERNEL),
        [draw(2, 3, 6, 4)],
    )


@pytest.mark.parametrize(
    ("batch_size", "group_size", "num_maps"),
    [(2, 4, 1), (4, 4, 1), (8, 4, 1), (8, 2, 2), (6, None, 4)],
)
def test_minibatch_standard_deviation(batch_size, group_size, num_maps):
    compare(
        lambda x: fast_discriminator.minibatch_standard_deviation(x, group_size, num_maps),
        lambda x: slow.minibatch_standard_deviation(x, group_size, num_maps),
        [draw(batch_size, 4, 3, 3)],
    )


def test_adaptive_instance_norm():
    inputs = [draw(2, 3, 4, 5), draw(2, 3, seed=1), draw(2, 3, seed=2)]
    compare(adaptive_instance_norm, slow.adaptive_instance_norm, inputs)
    inputs = [draw(1, 2, 3, 2), draw(1, 2, seed=1), draw(1, 2, seed=2)]
    assert gradcheck(adaptive_instance_norm, inputs)
    assert gradgradcheck(adaptive_instance_norm, inputs)


def test_minibatch_standard_deviation_of_equal_images_is_nothing():
    x = draw(1, 2, 3, 3).expand(4, -1, -1, -1)
    assert fast_discriminator.minibatch_standard_deviation(x, 4)[:, 2].abs().max() <= 1e-4 * (
        1 + 1e-9
    )


def test_minibatch_standard_deviation_refuses_a_broken_group():
    with pytest.raises(ValueError, match="multiple of the discriminator's group of 4"):
        fast_discriminator.minibatch_standard_deviation(draw(6, 2, 3, 3), 4)


@pytest.mark.usefixtures("derivatives")
@pytest.mark.parametrize("kernel", [None, KERNEL], ids=["same", "up"])
def test_second_derivatives_of_the_modulated_convolution(kernel):
    inputs = (draw(2, 2, 3, 3), draw(2, 2, 3, 3, seed=1), draw(2, 2, seed=2))
    assert gradcheck(lambda *a: fast.modulated_conv2d(*a, kernel=kernel), inputs)
    assert gradgradcheck(lambda *a: fast.modulated_conv2d(*a, kernel=kernel), inputs)


@pytest.mark.usefixtures("derivatives")
@pytest.mark.parametrize("operation", ["upsample", "halve", "deviation", "normalise"])
def test_second_derivatives_of_the_rest(operation):
    functions = {
        "upsample": lambda x: fast.upsample(x, KERNEL),
        "halve": lambda x: fast.blur(x, KERNEL, padding=1, stride=2),
        "deviation": lambda x: fast_discriminator.minibatch_standard_deviation(x, 2),
        "normalise": lambda x: normalize_second_moment(x.flatten(1)),
    }
    x = draw(4, 2, 4, 4)
    assert gradcheck(functions[operation], (x,))
    assert gradgradcheck(functions[operation], (x,))


def test_filter_keeps_a_constant_and_removes_the_finest_stripes():
    constant, stripes = torch.ones(1, 1, 8, 8), (-1.0) ** torch.arange(8).expand(1, 1, 8, 8)
    inner = fast.blur(constant, fast.blur_kernel(), padding=0)
    torch.testing.assert_close(inner, torch.ones_like(inner))
    assert fast.blur(stripes, fast.blur_kernel(), padding=0).abs().max() < 1e-6
    doubled = fast.upsample(constant, fast.blur_kernel())[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(doubled, torch.ones_like(doubled))


@pytest.mark.parametrize(("in_channels", "out_channels"), [(1, 3), (3, 1), (2, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolution(in_channels, out_channels, memory_format):
    x, weight, bias = (
        draw(2, in_channels, 3, 4),
        draw(out_channels, in_channels, 1, 1, seed=1),
        draw(out_channels, seed=2),
    )

    def run_fast(x, weight, bias):
        return fast.pointwise_conv2d(x.contiguous(memory_format=memory_format), weight, bias)

    compare(run_fast, F.conv2d, [x, weight, bias])
    assert gradgradcheck(run_fast, (x, weight, bias))


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"stride": 2, "padding": 1}, {"stride": 3, "padding": 2}, {"groups": 2}],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_convolution(options, has_bias):
    """Sides of 7 and 8 pixels, of which a stride of two makes three, and kernels of 3 x 2."""
    inputs = [draw(2, 4, 7, 8), draw(6, 4 // options.get("groups", 1), 3, 2, seed=1)] + [
        draw(6, seed=2)
    ] * has_bias
    few = (draw(1, 2, 4, 3), draw(2, 2 // options.get("groups", 1), 3, 2, seed=1))
    with second_derivatives():
        compare(partial(F.conv2d, **options), partial(F.conv2d, **options), inputs)
        assert gradgradcheck(partial(F.conv2d, **options), few)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"stride": 2, "padding": 1}, {"groups": 2}])
def test_transposed_convolution(options):
    inputs = [draw(2, 4, 3, 4), draw(4, 6 // options.get("groups", 1), 3, 2, seed=1)]
    few = (draw(1, 2, 2, 2), draw(2, 2 // options.get("groups", 1), 3, 2, seed=1))
    with second_derivatives():
        compare(
            partial(F.conv_transpose2d, **options),
            partial(F.conv_transpose2d, **options),
            inputs,
        )
        assert gradgradcheck(partial(F.conv_transpose2d, **options), few)


def test_third_derivatives_of_the_convolution():
    x, weight = draw(1, 1, 4, 3), draw(2, 1, 3, 3, seed=1)

    def differentiate_twice(x, weight):
        with second_derivatives():
            y = F.conv2d(x, weight, stride=2).pow(3).sum()
        first = torch.autograd.grad(y, (x, weight), create_graph=True)
        return torch.autograd.grad(
            sum(a.square().sum() for a in first), (x, weight), create_graph=True
        )

    assert gradcheck(differentiate_twice, (x, weight))
