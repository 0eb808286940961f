import dataclasses
import math

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer

from em_diffusion.autoencoder import create_autoencoder, decode, encode
from em_diffusion.autoencoder_loop import compute_losses, create_perceptual_distance
from em_diffusion.codebook import CodebookMonitor, move_codes, quantise
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.pipeline_em_ldm import nearest_codes
from em_evaluation.perceptual import PerceptualDistance
from em_training.weights import hash_weights
from support.config import refuses_config


def make_latents(seed=0, shape=(3, 4, 5, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def test_quantise_equals_the_slow_twin_and_its_gradients():
    """Our quantiser against diffusers' VectorQuantizer(legacy=False), for values, loss and both
    gradients.
    """
    beta = 0.25
    stock = VectorQuantizer(32, 4, beta=beta, legacy=False)
    torch.nn.init.normal_(stock.embedding.weight)
    z_stock = make_latents().requires_grad_()
    expected, expected_loss, (_, _, expected_indices) = stock(z_stock)
    weights = make_latents(1)
    (expected_loss + (weights * expected).sum()).backward()

    z = make_latents().requires_grad_()
    codebook = stock.embedding.weight.detach().clone().requires_grad_()
    ours = quantise(z, codebook)
    (ours.codebook_loss + beta * ours.commitment_loss + (weights * ours.latents).sum()).backward()

    assert torch.equal(ours.indices.flatten(), expected_indices)
    torch.testing.assert_close(ours.latents, expected)
    torch.testing.assert_close(ours.codebook_loss + beta * ours.commitment_loss, expected_loss)
    torch.testing.assert_close(z.grad, z_stock.grad)
    torch.testing.assert_close(codebook.grad, stock.embedding.weight.grad)


def test_codebook_and_commitment_gradients_have_their_closed_form():
    """d/de mean (z - e)^2 = 2 (n_k e_k - sum of its z) / N, and only the encoder is moved by the
    commitment.
    """
    z = make_latents(2).requires_grad_()
    codebook = make_latents(3, (8, 4)).requires_grad_()
    ours = quantise(z, codebook)
    (codebook_grad,) = torch.autograd.grad(ours.codebook_loss, codebook, retain_graph=True)
    (z_grad,) = torch.autograd.grad(ours.commitment_loss, z)
    vectors, indices = z.detach().movedim(1, -1).reshape(-1, 4), ours.indices.flatten()
    expected = torch.zeros(8, 4)
    for k in range(8):
        chosen = vectors[indices == k]
        expected[k] = 2 * (len(chosen) * codebook[k].detach() - chosen.sum(0)) / z.numel()
    torch.testing.assert_close(codebook_grad, expected)
    codes = codebook.detach()[ours.indices].movedim(-1, 1)
    torch.testing.assert_close(z_grad, 2 * (z.detach() - codes) / z.numel())


def test_codebook_loss_moves_codes_only_and_commitment_the_encoder_only():
    z, codebook = make_latents().requires_grad_(), make_latents(1, (8, 4)).requires_grad_()
    ours = quantise(z, codebook)
    assert torch.autograd.grad(ours.codebook_loss, z, allow_unused=True, retain_graph=True) == (
        None,
    )
    assert torch.autograd.grad(ours.commitment_loss, codebook, allow_unused=True) == (None,)


def test_nearest_codes_equal_brute_force_in_small_pieces(monkeypatch):
    monkeypatch.setattr("em_diffusion.pipeline_em_ldm.MAX_DISTANCES", 100)
    vectors, codebook = make_latents(4, (57, 4)), make_latents(5, (16, 4))
    brute = (vectors[:, None] - codebook[None]).square().sum(-1).argmin(1)
    assert torch.equal(nearest_codes(vectors, codebook), brute)


def test_quantisation_is_float32_under_autocast():
    """Two codes closer than bfloat16 can tell are told apart."""
    codebook = torch.tensor([[1.0], [1.001]])
    z = torch.tensor([1.0, 1.001]).view(1, 1, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        ours = quantise(z, codebook)
    assert ours.indices.flatten().tolist() == [0, 1]
    assert ours.latents.dtype == torch.float32


def test_stock_decode_agrees_with_our_quantiser(vqvae):
    """`VQModel.decode` with its own quantiser, and its commitment loss with legacy off, are what we
    train.
    """
    latents = make_latents(6, (2, 4, 8, 8))
    ours = quantise(latents, vqvae.quantize.embedding.weight)
    with torch.no_grad():
        stock = vqvae.decode(latents)
        again = vqvae.decode(ours.latents, force_not_quantize=True).sample
    torch.testing.assert_close(again, stock.sample)
    torch.testing.assert_close(stock.commit_loss, ours.codebook_loss + 0.25 * ours.commitment_loss)


def test_autoencoder_is_grey_and_in_its_own_scale(config):
    model = create_autoencoder(config.autoencoder, 16)
    assert model.config.in_channels == model.config.out_channels == 1
    assert model.config.scaling_factor == 1.0
    assert not model.quantize.legacy
    assert model.encode(torch.zeros(1, 1, 16, 16)).latents.shape == (1, 4, 8, 8)


def test_every_parameter_of_the_autoencoder_receives_a_gradient(config, tiles):
    model = create_autoencoder(config.autoencoder, 16)
    perceptual = create_perceptual_distance(config.autoencoder)
    arguments = (model, perceptual, tiles.batch(range(8)), None, config.autoencoder)
    latents = compute_losses(*arguments)[3]["latents"]
    # all codes near latents, but not on them, where the gradient vanishes
    move_codes(
        model.quantize.embedding, torch.arange(64), latents, torch.Generator().manual_seed(0)
    )
    model.quantize.embedding.weight.data.add_(0.01)
    _, loss, latent_loss, outputs = compute_losses(*arguments)
    (loss + latent_loss).backward()
    indices = outputs.pop("indices")
    assert set(outputs) == {"l1", "l2", "codebook", "commitment", "perceptual", "latents"}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    used = torch.zeros(64, dtype=torch.bool)
    used[indices.flatten().unique()] = True
    assert torch.equal(model.quantize.embedding.weight.grad.abs().sum(1) > 0, used)


def test_loss_is_the_weighted_sum_of_its_terms(config, tiles):
    c = config.autoencoder
    model, perceptual = create_autoencoder(c, 16), create_perceptual_distance(c)
    _, loss, latent_loss, t = compute_losses(model, perceptual, tiles.batch(range(4)), None, c)
    expected = c.l1_weight * t["l1"] + c.l2_weight * t["l2"] + c.perceptual_weight * t["perceptual"]
    torch.testing.assert_close(loss, expected)
    expected = c.codebook_weight * (t["codebook"] + c.commitment_weight * t["commitment"])
    torch.testing.assert_close(latent_loss, expected)


def test_monitor_counts_usage_and_perplexity():
    monitor = CodebookMonitor(8, window_images=100)
    monitor.count(torch.tensor([[0, 0, 0, 0], [1, 1, 2, 3]]))
    assert monitor.usage() == 0.5
    entropy = -(0.5 * math.log(0.5) + 0.25 * math.log(0.25) + 2 * 0.125 * math.log(0.125))
    assert monitor.perplexity().item() == pytest.approx(math.exp(entropy))
    assert not monitor.is_due(99)
    assert monitor.is_due(100)


def test_dead_codes_are_revived_and_living_ones_stay():
    embedding = torch.nn.Embedding(6, 4)
    before = embedding.weight.detach().clone()
    optimizer = torch.optim.Adam(embedding.parameters(), lr=0.0)
    embedding.weight.square().sum().backward()
    optimizer.step()
    monitor = CodebookMonitor(6, window_images=10)
    monitor.count(torch.tensor([1, 4, 4]))
    latents = make_latents(7, (2, 4, 3, 3))
    moved = monitor.end_window(embedding, latents, torch.Generator().manual_seed(0), optimizer, 10)
    assert moved == 4
    vectors = latents.movedim(1, -1).reshape(-1, 4)
    dead = [0, 2, 3, 5]
    assert torch.equal(embedding.weight[[1, 4]], before[[1, 4]])
    positions = [(vectors == embedding.weight[k]).all(1).nonzero().item() for k in dead]
    assert len(set(positions)) == len(dead)
    assert (optimizer.state[embedding.weight]["exp_avg"][dead] == 0).all()
    assert (optimizer.state[embedding.weight]["exp_avg"][[1, 4]] != 0).all()
    assert monitor.counts.sum() == 0
    assert not monitor.is_due(19)
    assert monitor.is_due(20)
    # what was dead is now the nearest code of the latents that it was put on
    assert set(nearest_codes(vectors[positions], embedding.weight.detach()).tolist()) == set(dead)


def test_late_in_a_run_no_code_moves():
    embedding = torch.nn.Embedding(6, 4)
    before = embedding.weight.detach().clone()
    monitor = CodebookMonitor(6, window_images=10)
    optimizer = torch.optim.Adam(embedding.parameters())
    assert monitor.end_window(embedding, None, torch.Generator(), optimizer, 30) == 0
    assert torch.equal(embedding.weight, before)
    assert not monitor.is_due(39)


def test_weight_hash_sees_every_bit():
    layer = torch.nn.Linear(3, 3)
    before = hash_weights(layer)
    assert before == hash_weights(layer)
    with torch.no_grad():
        layer.bias[0] = torch.nextafter(layer.bias[0], torch.tensor(2.0))
    assert hash_weights(layer) != before


def test_the_configuration_decides_the_perceptual_distance(config, monkeypatch):
    monkeypatch.setattr("em_diffusion.autoencoder_loop.LPIPSDistance", torch.nn.Identity)
    stage = config.autoencoder
    assert isinstance(create_perceptual_distance(stage), PerceptualDistance)
    lpips = dataclasses.replace(stage, perceptual_network="lpips")
    assert isinstance(create_perceptual_distance(lpips), torch.nn.Identity)
    assert create_perceptual_distance(dataclasses.replace(stage, perceptual_weight=0.0)) is None
    with refuses_config("perceptual_network.*efficientnet-lite0.*lpips"):
        dataclasses.replace(stage, perceptual_network="vgg")


@pytest.fixture
def kl_stage(config):
    return dataclasses.replace(config.autoencoder, kind="kl", kl_weight=0.1)


@pytest.mark.parametrize("kind", ["vq", "kl"])
@pytest.mark.parametrize(("channels", "factor"), [((8, 16, 16), 4), ((8, 8, 16, 16), 8)])
def test_f4_and_f8_of_both_families(config, kind, channels, factor):
    stage = dataclasses.replace(
        config.autoencoder, kind=kind, block_out_channels=channels, latent_channels=3
    )
    model = create_autoencoder(stage, 32)
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = encode(model, images)
        assert latents.shape == (2, 3, 32 // factor, 32 // factor)
        assert decode(model, latents).shape == images.shape
    assert stage.downsampling_factor == factor
    assert model.config.scaling_factor == 1


def test_kl_latents_are_the_mean_of_the_posterior(kl_stage, tiles):
    model = create_autoencoder(kl_stage, 16)
    images = tiles.batch(range(3))
    with torch.no_grad():
        moments = model.quant_conv(model.encoder(images))
        torch.testing.assert_close(encode(model, images), moments.chunk(2, dim=1)[0])


def test_kl_is_its_integral_and_the_latents_are_of_the_posterior(kl_stage, tiles):
    """The divergence against a numerical integral of q log(q / p), and the decoded sample of each
    noise.
    """
    model = create_autoencoder(kl_stage, 16)
    perceptual = create_perceptual_distance(kl_stage)
    images = tiles.batch(range(2))
    noise = make_latents(0, (2, 4, 8, 8))
    reconstruction, loss, latent_loss, terms = compute_losses(
        model, perceptual, images, noise, kl_stage
    )
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        mean, deviation = posterior.mean.double(), posterior.std.double()
        q = torch.distributions.Normal(mean, deviation)
        z = mean + deviation * torch.linspace(-9, 9, 4001, dtype=torch.float64).view(-1, 1, 1, 1, 1)
        density = q.log_prob(z).exp() * (
            q.log_prob(z) - torch.distributions.Normal(0, 1).log_prob(z)
        )
        integral = torch.trapezoid(density, z, dim=0).sum() / images.numel()
        decoded = model.decode((mean + deviation * noise).float()).sample
    assert terms["kl"].item() == pytest.approx(integral.item(), rel=1e-5)
    assert terms["l1"].item() == pytest.approx((decoded - images).abs().mean().item(), rel=1e-4)
    torch.testing.assert_close(reconstruction.detach(), decoded)
    c = kl_stage
    expected = c.l1_weight * terms["l1"] + c.perceptual_weight * terms["perceptual"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(latent_loss, c.kl_weight * terms["kl"])
    assert "indices" not in terms
    torch.testing.assert_close(terms["latents"], mean.float())
    (loss + latent_loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_saved_autoencoders_come_back_as_what_they_are(config, kl_stage, tmp_path):
    for stage, cls in ((config.autoencoder, VQModel), (kl_stage, AutoencoderKL)):
        model = create_autoencoder(stage, 16)
        model.save_pretrained(tmp_path / stage.kind)
        read = load_autoencoder(tmp_path / stage.kind)
        assert type(read) is cls
        assert hash_weights(read) == hash_weights(model)
        assert not read.training
