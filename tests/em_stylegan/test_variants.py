"""The architectures of generator and discriminator, composed from the slow twins as figure 7 of the
2020 paper draws them.
"""

import math

import pytest
import torch

from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator, blur_kernel
from support import stylegan_reference as slow

KERNEL = blur_kernel().double()
ARCHITECTURES = ("skip", "orig", "resnet")


def shake(model):
    generator = torch.Generator().manual_seed(3)
    for value in model.state_dict().values():
        value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return model.double()


def slow_linear(layer, x):
    return x @ (layer.weight * layer.weight_gain).T + layer.bias * layer.bias_gain


def slow_layer(layer, x, w, gain, clamp):
    x = slow.modulated_conv2d(
        x, layer.weight, slow_linear(layer.style, w), kernel=KERNEL if layer.up else None
    )
    x = x + layer.noise_const * layer.noise_strength + layer.bias[None, :, None, None]
    x = torch.where(x > 0, x, 0.2 * x) * math.sqrt(2) * gain
    return x.clamp(-clamp * gain, clamp * gain)


def slow_generator(model, ws):
    architecture, clamp = model.config.architecture, model.config.clamp
    x = image = None
    index = 0
    for block in model.synthesis_network.blocks:
        y, gain = None, 1.0
        if block.conv0 is None:
            x = block.const[None].expand(len(ws), -1, -1, -1)
        else:
            if architecture == "resnet":
                gain = math.sqrt(1 / 2)
                weight = block.skip.weight / math.sqrt(block.skip.weight.shape[1])
                y = slow.upsample(torch.nn.functional.conv2d(x, weight), KERNEL) * gain
            x = slow_layer(block.conv0, x, ws[:, index], 1.0, clamp)
            index += 1
        x = slow_layer(block.conv1, x, ws[:, index], gain, clamp)
        index += 1
        x = x if y is None else x + y
        image = None if image is None else slow.upsample(image, KERNEL)
        if architecture == "skip" or block is model.synthesis_network.blocks[-1]:
            layer = block.to_image
            styles = slow_linear(layer.style, ws[:, index]) / math.sqrt(layer.weight.shape[1])
            own = (
                slow.modulated_conv2d(x, layer.weight, styles, demodulate=False)
                + layer.bias[None, :, None, None]
            )
            own = own.clamp(-clamp, clamp)
            image = own if image is None else image + own
    return image


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generator(architecture):
    torch.manual_seed(0)
    options = {
        "z_dim": 8,
        "w_dim": 12,
        "channel_base": 128,
        "max_channels": 8,
        "mapping_depth": 2,
        "image_channels": 2,
    }
    model = shake(StyleGAN2Generator(16, clamp=1.3, architecture=architecture, **options))
    ws = torch.randn(2, model.num_ws, 12, dtype=torch.float64, requires_grad=True)
    images, expected = model.synthesis(ws, "const"), slow_generator(model, ws)
    torch.testing.assert_close(images, expected)
    cotangent = torch.randn_like(images)
    gradients = [torch.autograd.grad((y * cotangent).sum(), ws)[0] for y in (images, expected)]
    torch.testing.assert_close(*gradients)
    unused = gradients[0].abs().sum(dim=(0, 2)) == 0
    assert not unused.any()


def slow_conv(layer, x, gain=1.0, clamp=None):
    kernel = KERNEL if layer.down else None
    return slow.equalized_conv2d(
        x,
        layer.weight,
        layer.bias,
        kernel=kernel,
        activation=layer.activation,
        gain=gain,
        clamp=clamp,
    )


def slow_discriminator(model, image):
    architecture, clamp = model.config.architecture, model.config.clamp
    x = None
    for block in model.blocks:
        if x is None or architecture == "skip":
            y = slow_conv(block.from_image, image, clamp=clamp)
            x = y if x is None else x + y
        if architecture == "skip":
            image = slow.downsample(image, KERNEL)
        if architecture == "resnet":
            y = slow_conv(block.skip, x, gain=math.sqrt(1 / 2))
            x = slow_conv(block.conv0, x, clamp=clamp)
            x = y + slow_conv(block.conv1, x, gain=math.sqrt(1 / 2), clamp=clamp)
        else:
            x = slow_conv(block.conv1, slow_conv(block.conv0, x, clamp=clamp), clamp=clamp)
    if architecture == "skip":
        x = x + slow_conv(model.from_image, image)
    x = slow.minibatch_standard_deviation(
        x, model.config.group_size, model.config.num_deviation_maps
    )
    x = slow_linear(model.linear, slow_conv(model.conv, x, clamp=clamp).flatten(1))
    return slow_linear(model.out, torch.where(x > 0, x, 0.2 * x) * math.sqrt(2))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_discriminator(architecture):
    torch.manual_seed(0)
    options = {
        "channel_base": 128,
        "max_channels": 8,
        "group_size": 2,
        "num_deviation_maps": 2,
        "image_channels": 2,
    }
    model = shake(StyleGANDiscriminator(16, clamp=1.3, architecture=architecture, **options))
    images = torch.randn(4, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    logits, expected = model(images), slow_discriminator(model, images)
    torch.testing.assert_close(logits, expected)
    gradients = [torch.autograd.grad(y.square().sum(), images)[0] for y in (logits, expected)]
    torch.testing.assert_close(*gradients)


def test_number_of_parameters_tells_the_architectures_apart():
    names = [
        {
            name
            for name, _ in StyleGAN2Generator(
                16, channel_base=128, architecture=kind
            ).named_parameters()
        }
        for kind in ARCHITECTURES
    ]
    assert sum("to_image.weight" in name for name in names[0]) == 3
    assert sum("to_image.weight" in name for name in names[1]) == 1
    assert sum("skip" in name for name in names[2]) == 2
    with pytest.raises(ValueError, match="choose skip, orig, resnet"):
        StyleGAN2Generator(16, architecture="dense")


def test_half_precision_holds_for_the_highest_resolutions_alone():
    torch.manual_seed(0)
    model = StyleGAN2Generator(
        32, channel_base=256, max_channels=16, num_reduced_resolutions=2, clamp=256.0
    )
    types = []
    for block in model.synthesis_network.blocks:
        block.conv1.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    ws = model.mapping(torch.randn(2, 512))
    images = model.synthesis(100 * ws, "const", compute_dtype=torch.float16)
    assert types == [torch.float32, torch.float32, torch.float16, torch.float16]
    assert images.isfinite().all()
    full = model.synthesis(100 * ws, "const")
    assert (images - full).abs().max() / full.std() < 0.02
