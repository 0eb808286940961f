import dataclasses

import pytest
import torch
import torch.nn.functional as F

from em_diffusion.autoencoder import AutoencoderObjective, create_autoencoder
from em_diffusion.autoencoder_loop import create_discriminator
from em_diffusion.config import AutoencoderConfig, LDMConfig
from em_diffusion.optimization import set_learning_rate
from em_diffusion.patch_discriminator import (
    ADAPTIVE_EPSILON,
    MAX_ADAPTIVE_WEIGHT,
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    smallest_side,
)
from support.config import refuses_config


@pytest.mark.parametrize(
    ("num_layers", "side", "patch"), [(1, 32, 16), (2, 64, 34), (3, 128, 70), (3, 256, 70)]
)
def test_a_logit_sees_its_patch_and_no_more(num_layers, side, patch):
    """The input's gradient of one logit spans the receptive field that the papers state, but for the norms' common view."""
    discriminator = PatchDiscriminator(8, num_layers)
    for i, layer in enumerate(discriminator.layers):
        if isinstance(layer, torch.nn.GroupNorm):
            discriminator.layers[i] = torch.nn.Identity()
    image = torch.zeros(1, 1, side, side, requires_grad=True)
    logits = discriminator(image)
    assert logits.shape == (1, 1, side // 2**num_layers - 2, side // 2**num_layers - 2)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], image)
    seen = (gradient[0, 0] != 0).any(dim=0).sum().item()
    assert seen == patch


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_the_smallest_image_has_one_logit(num_layers):
    discriminator = PatchDiscriminator(4, num_layers)
    side = smallest_side(num_layers)
    assert discriminator(torch.zeros(2, 1, side, side)).shape == (2, 1, 1, 1)
    with refuses_config("Use fewer with --autoencoder.discriminator-layers"):
        LDMConfig(
            tiles=dataclasses.replace(LDMConfig().tiles, resolution=64),
            autoencoder=AutoencoderConfig(
                block_out_channels=(32,),
                discriminator_weight=1.0,
                discriminator_layers=5,
                norm_num_groups=32,
            ),
            denoiser=dataclasses.replace(
                LDMConfig().denoiser, channel_multipliers=(1,), attention_levels=()
            ),
        )


def test_widths_double_up_to_eight_times():
    widths = [
        m.out_channels
        for m in PatchDiscriminator(64, 3).modules()
        if isinstance(m, torch.nn.Conv2d)
    ]
    assert widths == [64, 128, 256, 512, 1]  # C64-C128-C256-C512 of the paper
    assert (
        max(
            m.out_channels
            for m in PatchDiscriminator(6, 6).modules()
            if isinstance(m, torch.nn.Conv2d)
        )
        == 48
    )


def test_an_answer_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 2)
    images = torch.randn(4, 1, 32, 32)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(discriminator(images), alone)


def test_hinge_loss_is_its_closed_form():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, -0.25, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(
        ((0 + 0.5 + 2) / 3 + (0 + 0.75 + 2) / 3) / 2
    )
    assert hinge_loss(torch.zeros(3), torch.zeros(3)).item() == 1


def test_adaptive_weight_is_the_ratio_of_the_norms_and_clamped():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert adaptive_weight(a, b).item() == pytest.approx(5 / (0.5 + ADAPTIVE_EPSILON))
    assert adaptive_weight(a, torch.zeros(2)).item() == MAX_ADAPTIVE_WEIGHT
    assert not adaptive_weight(a.requires_grad_(), b).requires_grad


@pytest.fixture
def game(config, tiles):
    """An objective with all terms, its slow twin's parts, and a discriminator that sees differences."""
    stage = dataclasses.replace(config.autoencoder, discriminator_weight=0.7, l2_weight=0.3)
    torch.manual_seed(0)
    model = create_autoencoder(stage, 16)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    discriminator = PatchDiscriminator(8, 1)
    for parameter in discriminator.parameters():  # logits on both sides of the hinge's corners
        parameter.data.mul_(4).add_(0.02 * torch.randn_like(parameter))
    return stage, AutoencoderObjective(model, stage), discriminator, tiles.batch(range(8))


def test_one_pass_equals_the_slow_twin(game):
    """Gradients of autoencoder and discriminator against the plain way: the paper's loss, a pass for each player."""
    stage, objective, discriminator, images = game
    model = objective.model
    parameters, last = list(model.parameters()), model.decoder.conv_out.weight

    ours = objective(images, None, discriminator)
    gradients = torch.autograd.grad(ours.loss, parameters, retain_graph=True)
    gradients_D = torch.autograd.grad(ours.discriminator_loss, list(discriminator.parameters()))

    plain = objective(
        images
    )  # without the game: its graph gives L_rec + L_VQ and, apart, the decoded images
    codes = model.quantize.embedding.weight
    from em_diffusion.autoencoder import quantise

    decoded = model.decode(
        quantise(model.encode(images).latents, codes).latents, force_not_quantize=True
    ).sample
    reconstruction, _ = objective.compare(decoded, images)
    adversarial = -discriminator(decoded).mean()
    norms = [
        torch.autograd.grad(t, last, retain_graph=True)[0].norm()
        for t in (reconstruction, adversarial)
    ]
    weight = norms[0] / (norms[1] + ADAPTIVE_EPSILON)
    loss = plain.loss + stage.discriminator_weight * weight.detach() * adversarial
    expected = torch.autograd.grad(loss, parameters)
    logits_real, logits_fake = discriminator(images), discriminator(decoded.detach())
    loss_D = (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()) / 2
    expected_D = torch.autograd.grad(loss_D, list(discriminator.parameters()))

    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert ours.terms["adaptive_weight"].item() == pytest.approx(weight.item(), rel=1e-4)
    assert ours.terms["generator"].item() == pytest.approx(adversarial.item(), rel=1e-4)
    assert ours.terms["discriminator"].item() == pytest.approx(loss_D.item(), rel=1e-5)
    assert ours.terms["logits_real"].item() == pytest.approx(logits_real.mean().item(), rel=1e-4)
    assert ours.terms["logits_fake"].item() == pytest.approx(logits_fake.mean().item(), rel=1e-4)
    assert {"l1", "l2", "perceptual", "codebook", "commitment"} <= set(ours.terms)
    assert not any(term.requires_grad for term in ours.terms.values())
    for a, b in zip([*gradients, *gradients_D], [*expected, *expected_D], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3 * max(1e-6, b.abs().max().item()))


def test_each_player_moves_alone(game):
    """The autoencoder's loss gives the discriminator no gradient, nor the discriminator's loss the autoencoder."""
    _, objective, discriminator, images = game
    ours = objective(images, None, discriminator)
    ours.loss.backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(parameter.grad is not None for parameter in objective.model.parameters())
    objective.zero_grad()
    ours.discriminator_loss.backward()
    assert all(parameter.grad is None for parameter in objective.model.parameters())
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_a_step_makes_one_pass_of_each_network(game):
    """One pass of the autoencoder; of the discriminator one over the real and one over the decoded images."""
    _, objective, discriminator, images = game
    passes = {"decoder": 0, "encoder": 0, "discriminator": 0}
    for name, module in (
        ("decoder", objective.model.decoder),
        ("encoder", objective.model.encoder),
        ("discriminator", discriminator),
    ):
        module.register_forward_pre_hook(
            lambda *_, name=name: passes.update({name: passes[name] + 1})
        )
    objective(images, None, discriminator)
    assert passes == {"decoder": 1, "encoder": 1, "discriminator": 2}


def test_the_discriminator_learns_to_tell_blurred_from_sharp(config):
    torch.manual_seed(0)
    stage = dataclasses.replace(
        config.autoencoder, discriminator_weight=1.0, discriminator_learning_rate=2e-3
    )
    discriminator, optimizer = create_discriminator(
        dataclasses.replace(stage, discriminator_channels=8, discriminator_layers=2), "cpu"
    )
    set_learning_rate(optimizer, stage.learning_rate)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        real = torch.randn(8, 1, 32, 32, generator=generator)
        fake = F.avg_pool2d(real, 3, 1, 1) * 3  # the same deviation without the fine grain
        loss = hinge_loss(discriminator(real), discriminator(fake))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.2
