"""Generator and discriminator: shapes, statistics, options, gradients."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.em_style_mapping import MappingNetwork, normalize_second_moment
from em_stylegan.em_stylegan1_generator import StyleGAN1Generator, adaptive_instance_norm
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator, modulated_conv2d
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.game import compute_gradient_penalty, compute_path_lengths
from em_stylegan.losses import path_lengths, r1_penalty
from em_stylegan.second_derivatives import second_derivatives

SMALL = {"channel_base": 256, "max_channels": 16}


def make_generator(**options):
    torch.manual_seed(0)
    return StyleGAN2Generator(
        **{"resolution": 16, "z_dim": 8, "w_dim": 12, "mapping_depth": 2, **SMALL, **options}
    )


def make_discriminator(**options):
    torch.manual_seed(1)
    return StyleGANDiscriminator(**{"resolution": 16, "group_size": 2, **SMALL, **options})


def draw_z(count=4, seed=0):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("resolution", "num_ws"), [(8, 4), (16, 6), (32, 8)])
def test_shapes(resolution, num_ws):
    generator = make_generator(resolution=resolution, image_channels=3)
    ws = generator.mapping(draw_z())
    assert ws.shape == (4, num_ws, 12)
    images = generator.synthesis(ws)
    assert images.shape == (4, 3, resolution, resolution)
    discriminator = make_discriminator(resolution=resolution, image_channels=3)
    assert discriminator(images).shape == (4, 1)


KINDS = {"1": StyleGAN1Generator, "2": StyleGAN2Generator, "3": StyleGAN3Generator}


def make_kind(kind, **options):
    torch.manual_seed(0)
    return KINDS[kind](
        **{"resolution": 16, "z_dim": 8, "w_dim": 12, "mapping_depth": 2, **SMALL, **options}
    ).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_styles_can_be_mixed_in_place(kind):
    generator = make_kind(kind)
    ws, other = generator.mapping(draw_z(2)), generator.mapping(draw_z(2, seed=1))
    ws[:, 3:] = other[:, 3:]
    assert not torch.equal(ws[:, 0], ws[:, 3])
    assert generator.synthesis(ws).shape == (2, 1, 16, 16)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_z_may_have_another_type(kind):
    generator, z = make_kind(kind), draw_z(2)
    torch.testing.assert_close(
        generator(z.double(), noise_mode="const"), generator(z, noise_mode="const")
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_classes_in_every_form(kind):
    generator, z = make_kind(kind, num_classes=3), draw_z(2)
    expected = generator.mapping(z, torch.tensor([2, 2]))
    for labels in ([2, 2], 2, torch.eye(3)[[2, 2]], torch.tensor(2)):
        torch.testing.assert_close(generator.mapping(z, labels), expected)
    assert not torch.allclose(generator.mapping(z, [2, 1]), expected)
    wrong = (
        None,
        3,
        [-1, 0],
        [1],
        [0, 1, 2],
        torch.zeros(2, 1),
        torch.tensor([0.0, 1.0]),
        torch.eye(3),
    )
    for labels in wrong:
        with pytest.raises(ValueError, match="class_labels"):
            generator.mapping(z, labels)
    unconditional = make_kind(kind)
    torch.testing.assert_close(
        unconditional.mapping(z, torch.zeros(2, 0)), unconditional.mapping(z)
    )
    with pytest.raises(ValueError, match="has no classes"):
        unconditional.mapping(z, [0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_wrong_shapes_are_refused(kind):
    generator = make_kind(kind)
    for z in (torch.zeros(2, 9), torch.zeros(8)):
        with pytest.raises(ValueError, match=r"z must be \[B, 8\]"):
            generator(z)
    ws = torch.zeros(2, generator.num_ws, 12)
    for wrong in (ws[..., :-1], ws[:, :-1], ws[0]):
        with pytest.raises(ValueError, match="ws must be"):
            generator.synthesis(wrong)
    if kind != "3":
        with pytest.raises(ValueError, match="1 generators for 2 images"):
            generator.synthesis(ws, generator=[torch.Generator()])


def test_images_that_a_discriminator_was_not_made_for_are_refused():
    discriminator = make_discriminator()
    for shape in ((2, 3, 16, 16), (2, 1, 32, 32), (1, 16, 16)):
        with pytest.raises(ValueError, match="image must be"):
            discriminator(torch.zeros(shape))
    with pytest.raises(ValueError, match="has no classes"):
        discriminator(torch.zeros(2, 1, 16, 16), [0, 1])
    with pytest.raises(ValueError, match="class_labels"):
        make_discriminator(num_classes=3)(torch.zeros(2, 1, 16, 16), [0])


@torch.no_grad()
def test_the_first_stylegan_bears_constant_maps_in_half_precision():
    x = torch.full((1, 2, 4, 4), 3.0, dtype=torch.float16)
    one = torch.ones(1, 2, dtype=torch.float16)
    torch.testing.assert_close(
        adaptive_instance_norm(x, one, one), torch.ones_like(x), atol=0.01, rtol=0
    )


def test_feature_maps_follow_base_and_maximum():
    generator = make_generator(resolution=32)
    assert [block.conv1.weight.shape[0] for block in generator.synthesis_network.blocks] == [
        16,
        16,
        16,
        8,
    ]
    discriminator = make_discriminator(resolution=32)
    assert [block.conv0.weight.shape[0] for block in discriminator.blocks] == [8, 16, 16]


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_mapping_depth(depth):
    assert len(make_generator(mapping_depth=depth).mapping_network.layers) == depth


def test_mapping_learns_a_hundred_times_more_slowly():
    """The same relative step in weights moves w as a layer of multiplier 1 does: storage is 100
    times larger.
    """
    torch.manual_seed(0)
    layer = MappingNetwork(256, 256, 1).layers[0]
    effective = layer.weight * layer.weight_gain
    assert layer.weight.std().item() == pytest.approx(100, rel=0.02)
    assert effective.std().item() == pytest.approx(256**-0.5, rel=0.02)


def test_mapping_ignores_the_length_of_z():
    generator = make_generator()
    torch.testing.assert_close(generator.mapping(draw_z()), generator.mapping(3 * draw_z()))
    assert normalize_second_moment(draw_z()).square().mean(dim=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_demodulation_gives_unit_deviation_whatever_the_style(scale):
    """Independent unit inputs come out with unit deviation in every sample and map (2020, section
    2.2).
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(2, 32, 64, 64, generator=generator),
        torch.randn(5, 32, 3, 3, generator=generator),
    )
    styles = scale * torch.randn(2, 32, generator=generator)
    y = modulated_conv2d(x * styles.sign()[:, :, None, None], weight, styles)[:, :, 1:-1, 1:-1]
    assert y.std(dim=(2, 3)) == pytest.approx(1, abs=0.05)


def test_truncation():
    generator = make_generator()
    generator.mapping_network.w_mean.copy_(torch.linspace(-1, 1, 12))
    ws = generator.mapping(draw_z())
    half = generator.mapping(draw_z(), truncation_psi=0.5)
    torch.testing.assert_close(half, (ws + generator.mapping_network.w_mean) / 2)
    cut = generator.mapping(draw_z(), truncation_psi=0.5, truncation_cutoff=2)
    assert torch.equal(cut[:, :2], half[:, :2])
    assert torch.equal(cut[:, 2:], ws[:, 2:])
    mean_images = generator(draw_z(), truncation_psi=0.0, noise_mode="none")
    torch.testing.assert_close(mean_images, mean_images[:1].expand_as(mean_images))


def test_w_mean_follows_batches():
    network = MappingNetwork(8, 3, 2)
    network.update_w_mean(torch.tensor([1.0, 2.0, 3.0]), decay=0.75)
    network.update_w_mean(torch.tensor([1.0, 2.0, 3.0]), decay=0.75)
    torch.testing.assert_close(network.w_mean, torch.tensor([1.0, 2.0, 3.0]) * (1 - 0.75**2))


def test_noise_modes():
    generator = make_generator()
    z = draw_z()

    def run(mode, seed=0):
        return generator(z, noise_mode=mode, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run("random"), run("none")), "strengths start at zero"
    for block in generator.synthesis_network.blocks:
        torch.nn.init.constant_(block.conv1.noise_strength, 0.3)
    assert torch.equal(run("const", 0), run("const", 1))
    assert torch.equal(run("random", 0), run("random", 0))
    assert not torch.allclose(run("random", 0), run("random", 1))
    assert not torch.allclose(run("const"), run("none"))
    with pytest.raises(ValueError, match=r"noise_mode is .* choose random, const, none"):
        run("loud")


def test_every_parameter_of_the_generator_learns():
    generator = make_generator()
    for block in generator.synthesis_network.blocks:
        for layer in (block.conv0, block.conv1):
            if layer is not None:
                torch.nn.init.constant_(layer.noise_strength, 0.1)
    generator(draw_z(), generator=torch.Generator().manual_seed(0)).square().mean().backward()
    without = [
        name
        for name, p in generator.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert without == []


def test_every_parameter_of_the_discriminator_learns():
    discriminator = make_discriminator()
    discriminator(torch.rand(4, 1, 16, 16)).square().mean().backward()
    without = [
        name
        for name, p in discriminator.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert without == []


def test_classes_reach_both_networks():
    generator, discriminator = make_generator(num_classes=3), make_discriminator(num_classes=3)
    z = draw_z(1).expand(2, -1)
    labels = torch.tensor([0, 2])
    images = generator(z, labels, noise_mode="none")
    assert not torch.allclose(images[0], images[1])
    same = images[:1].expand(2, -1, -1, -1)
    logits = discriminator(same, labels)
    assert not torch.allclose(logits[0], logits[1])
    (logits.square().mean() + images.square().mean()).backward()
    for network in (generator, discriminator):
        without = [n for n, p in network.named_parameters() if p.grad is None and "noise" not in n]
        assert without == []
    with pytest.raises(ValueError, match="has 3 classes"):
        generator(z)


def test_reduced_precision_stays_close():
    generator, discriminator = make_generator(), make_discriminator()
    ws = generator.mapping(draw_z())
    full = generator.synthesis(ws, "const")
    reduced = generator.synthesis(ws, "const", compute_dtype=torch.bfloat16)
    assert reduced.dtype == torch.float32
    assert 0 < (reduced - full).abs().max() / full.std() < 0.1
    logits, reduced = discriminator(full), discriminator(full, compute_dtype=torch.bfloat16)
    assert reduced.dtype == torch.float32
    assert 0 < (reduced - logits).abs().max() < 0.1


def test_clamp_bounds_the_feature_maps():
    generator = make_generator(clamp=0.25)
    outputs = []
    generator.synthesis_network.blocks[1].conv1.register_forward_hook(
        lambda m, args, output: outputs.append(output)
    )
    images = generator(draw_z(), noise_mode="none")
    assert outputs[0].abs().max() == 0.25
    assert images.abs().max() <= 0.25 * 3 * (1 + 1e-6)  # three resolutions are added


@pytest.mark.parametrize("convolutions", [nullcontext, second_derivatives])
def test_second_derivatives_through_whole_networks(convolutions):
    """R1's and path length's gradients in the weights equal difference quotients."""
    generator, discriminator = make_generator().double(), make_discriminator().double()
    images = torch.rand(
        2, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    noise = torch.randn(
        2, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    def penalty_D():
        with convolutions():
            return r1_penalty(discriminator(images), images).mean()

    def penalty_G():
        ws = generator.mapping(draw_z(2).double())
        with convolutions():
            return path_lengths(generator.synthesis(ws, "none"), ws, noise).square().mean()

    weights = [
        (penalty_D, discriminator.blocks[0].conv1.weight),
        (penalty_D, discriminator.linear.bias),
        (penalty_G, generator.synthesis_network.blocks[1].conv0.weight),
        (penalty_G, generator.synthesis_network.blocks[1].conv0.style.weight),
        (penalty_G, generator.mapping_network.layers[0].weight),
    ]
    for penalty, weight in weights:
        direction = torch.randn(
            weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        (gradient,) = torch.autograd.grad(penalty(), weight)
        values = []
        for sign in (1, -2):  # one step up, then two down
            weight.data += sign * 1e-6 * direction
            values.append(penalty().item())
        assert (gradient * direction).sum().item() == pytest.approx(
            (values[0] - values[1]) / 2e-6, rel=1e-4
        )


@pytest.mark.parametrize("group_size", [None, 2, 4, 8])
def test_batches_in_one_pass_are_judged_as_alone(group_size):
    discriminator = make_discriminator(group_size=group_size, num_deviation_maps=2).double()
    images = torch.rand(
        8, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    apart = torch.cat([discriminator(batch) for batch in images.chunk(2)])
    torch.testing.assert_close(discriminator(images, num_batches=2), apart)
    assert (discriminator(images) - apart).abs().max() > 1e-6
    with pytest.raises(ValueError, match="8 images are not 3 batches of the same size"):
        discriminator(images, num_batches=3)


class CountConvolutions(TorchDispatchMode):
    """Counts the convolutions and derivatives of convolutions that run within it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packets = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
        self.count += function._overloadpacket in packets
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("penalty", ["r1", "path length"])
def test_penalties_have_no_more_convolutions_than_their_derivatives(penalty):
    """Each convolution leads to one back and one for the weights; to the derivatives of the first,
    one forward again and one for the weights; and of the forward pass where something is curved,
    one back. PyTorch's own second derivatives make one of each channel of the fixed filters."""
    generator, discriminator = make_generator(), make_discriminator()
    images = torch.rand(4, 1, 16, 16)
    with CountConvolutions() as forward:
        discriminator(images) if penalty == "r1" else generator(draw_z())
    with CountConvolutions() as whole:
        if penalty == "r1":
            value = compute_gradient_penalty(discriminator, images, lambda images: images)
        else:
            value = compute_path_lengths(generator, 4, 0.0, torch.Generator().manual_seed(0)).sum()
        network = discriminator if penalty == "r1" else generator
        torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
    assert whole.count < 5 * forward.count


def test_networks_are_saved_and_loaded_whole(tmp_path):
    for network, inputs in (
        (make_generator(), draw_z()),
        (make_discriminator(), torch.rand(4, 1, 16, 16)),
    ):
        options = {"noise_mode": "const"} if isinstance(network, StyleGAN2Generator) else {}
        network.save_pretrained(tmp_path)
        loaded = type(network).from_pretrained(tmp_path)
        assert all(
            loaded.config[name] == value
            for name, value in network.config.items()
            if not name.startswith("_")
        )
        assert torch.equal(loaded(inputs, **options), network(inputs, **options))


@pytest.mark.parametrize("options", [{"resolution": 24}, {"resolution": 4}, {"channel_base": 8}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match=r"give a power of two|give at least"):
        make_generator(**options)
