import dataclasses

import pytest
import torch
import torch.nn.functional as F

from em_data.batch import Batch
from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.autoencoder_loop import backward_losses, create_perceptual_distance
from em_diffusion.codebook import quantise
from em_diffusion.config import AutoencoderConfig, LDMConfig
from em_diffusion.optimization import set_learning_rate
from em_diffusion.patch_discriminator import (
    ADAPTIVE_EPSILON,
    MAX_ADAPTIVE_WEIGHT,
    PatchDiscriminator,
    adaptive_weight,
    create_discriminator,
    hinge_loss,
    smallest_side,
)
from support.config import refuses_config


@pytest.mark.parametrize(
    ("num_layers", "side", "patch"), [(1, 32, 16), (2, 64, 34), (3, 128, 70), (3, 256, 70)]
)
def test_a_logit_sees_its_patch_and_no_more(num_layers, side, patch):
    """The input's gradient of one logit spans the receptive field that the papers state, but for
    the norms' common view.
    """
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


@pytest.mark.parametrize("scale", [1.0, 512.0])
def test_adaptive_weight_is_the_ratio_of_the_norms_and_clamped(scale):
    last = torch.ones(2, requires_grad=True)
    a, b = ((last * torch.tensor(gradient)).sum() for gradient in ([3.0, 4.0], [0.0, 0.5]))
    weight = adaptive_weight(a, b, last, scale)
    assert weight.item() == pytest.approx(5 / (0.5 + ADAPTIVE_EPSILON))
    assert not weight.requires_grad
    assert adaptive_weight(a, (0 * last).sum(), last, scale).item() == MAX_ADAPTIVE_WEIGHT


@pytest.fixture
def game(config, tiles):
    """A configuration with all terms, the networks, and a discriminator that sees differences."""
    stage = dataclasses.replace(config.autoencoder, discriminator_weight=0.7, l2_weight=0.3)
    torch.manual_seed(0)
    model = create_autoencoder(stage, 16)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    discriminator = PatchDiscriminator(8, 1)
    for parameter in discriminator.parameters():  # logits on both sides of the hinge's corners
        parameter.data.mul_(4).add_(0.02 * torch.randn_like(parameter))
    batch = Batch(tiles.batch(range(8)), torch.arange(8))
    return stage, model, create_perceptual_distance(stage), discriminator, batch


def test_gradients_are_those_of_the_papers_losses(game, accelerator):
    """Each network has the gradients of its own loss, here computed by a pass for each."""
    stage, model, perceptual, discriminator, batch = game
    parameters = [*model.parameters(), *discriminator.parameters()]
    ours = backward_losses(batch, 1.0, model, perceptual, discriminator, stage, accelerator)
    gradients = [parameter.grad for parameter in parameters]

    images, codes = batch.images, model.quantize.embedding.weight
    quantised = quantise(model.encode(images).latents, codes)
    decoded = model.decode(quantised.latents, force_not_quantize=True).sample
    loss_rec = (decoded - images).abs().mean() + 0.3 * (decoded - images).square().mean()
    loss_rec = loss_rec + stage.perceptual_weight * perceptual(decoded, images)
    loss_vq = quantised.codebook_loss + stage.commitment_weight * quantised.commitment_loss
    adversarial = -discriminator(decoded).mean()
    last = model.decoder.conv_out.weight
    norms = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
        for loss in (loss_rec, adversarial)
    ]
    weight = (norms[0] / (norms[1] + ADAPTIVE_EPSILON)).detach()
    loss = loss_rec + loss_vq + 0.7 * weight * adversarial
    expected = torch.autograd.grad(loss, list(model.parameters()))
    logits_real, logits_fake = discriminator(images), discriminator(decoded.detach())
    loss_D = (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()) / 2
    expected += torch.autograd.grad(loss_D, list(discriminator.parameters()))

    assert ours["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert ours["adaptive_weight"].item() == pytest.approx(weight.item(), rel=1e-4)
    assert ours["generator"].item() == pytest.approx(adversarial.item(), rel=1e-4)
    assert ours["discriminator"].item() == pytest.approx(loss_D.item(), rel=1e-5)
    assert ours["logits_real"].item() == pytest.approx(logits_real.mean().item(), rel=1e-4)
    assert ours["logits_fake"].item() == pytest.approx(logits_fake.mean().item(), rel=1e-4)
    assert {"l1", "l2", "perceptual", "codebook", "commitment"} <= set(ours)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3 * max(1e-6, b.abs().max().item()))
    for name, parameter in [*model.named_parameters(), *discriminator.named_parameters()]:
        assert parameter.grad.abs().sum() > 0, name


def test_a_step_makes_one_pass_of_each_network(game, accelerator):
    """One of the autoencoder; the discriminator sees the real and the decoded images once."""
    stage, model, perceptual, discriminator, batch = game
    passes = {"decoder": 0, "encoder": 0, "discriminator": 0}
    networks = zip(passes, (model.decoder, model.encoder, discriminator))
    for name, module in networks:
        module.register_forward_pre_hook(
            lambda *_, name=name: passes.update({name: passes[name] + 1})
        )
    backward_losses(batch, 1.0, model, perceptual, discriminator, stage, accelerator)
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
