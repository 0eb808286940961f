import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from em_data.batch import Batch
from em_diffusion import autoencoder_loop, first_autoencoder
from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.autoencoder_loop import (
    backward_losses,
    build_autoencoder,
    create_perceptual_distance,
    train_autoencoder,
)
from em_diffusion.codebook import CodebookMonitor
from em_diffusion.config import AutoencoderConfig, DenoiserConfig, LDMConfig
from em_diffusion.denoiser import create_denoiser, create_scheduler
from em_diffusion.denoiser_loop import compute_denoising_loss, train_denoiser
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.optimization import create_optimizer, learning_rate_at
from em_diffusion.reconstruction import spectrum_error_db, ssim
from em_diffusion.validation import evaluate_reconstruction
from em_training import (
    EMA,
    MicroBatching,
    list_checkpoints,
    load_checkpoint,
    match_memory_format,
    read_stats,
)
from em_training.latents import Latents
from em_training.timesteps import draw_timesteps
from support.config import refuses_config


class Killed(Exception):
    pass


def kill_at(tiles, num_batches):
    """`tiles` that end the process, as it were, when the loop asks for one batch more than
    `num_batches`.
    """
    read, count = tiles.batch, 0

    def batch(view_ids):
        nonlocal count
        count += 1
        if count > num_batches:
            raise Killed
        return read(view_ids)

    tiles.batch = batch
    return lambda: setattr(tiles, "batch", read)


def assert_equal_to_the_bit(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal_to_the_bit(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_equal_to_the_bit(*pair, f"{path}/{i}")
    else:
        assert a == b, path


def assert_same_run(whole, parts):
    """Same checkpoint, to the bit, and the same log, times aside."""
    left, right = (
        load_checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in (whole, parts)
    )
    for content in (left, right):
        content.pop("train_seconds")
    assert_equal_to_the_bit(left, right)
    times = {"train_seconds", "images_per_second"}
    logs = [
        [{k: v for k, v in line.items() if k not in times} for line in read_stats(f)]
        for f in (whole, parts)
    ]
    assert logs[0] == logs[1]
    assert left["num_images_seen"] == 64


def test_autoencoder_resumes_to_the_bit(config, tiles, held_out, accelerator, tmp_path):
    """8 steps equal 4 + kill + 4, codebook window (every 32 images, so inside and at the cut)
    included.
    """
    stage = dataclasses.replace(config.autoencoder, revive_after_images=24)
    train_autoencoder(stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path / "whole")
    restore = kill_at(tiles, 6)
    with pytest.raises(Killed):
        train_autoencoder(
            stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path / "parts"
        )
    restore()
    assert list_checkpoints(tmp_path / "parts/autoencoder/checkpoints")[-1].name == "000000000032"
    path, seconds = train_autoencoder(
        stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path / "parts"
    )
    assert_same_run(tmp_path / "whole/autoencoder", tmp_path / "parts/autoencoder")
    assert seconds > 0
    weights = "diffusion_pytorch_model.safetensors"
    assert (path / weights).read_bytes() == (
        tmp_path / "whole/autoencoder/vqvae" / weights
    ).read_bytes()
    last = read_stats(tmp_path / "parts/autoencoder")[-1]
    assert {"held_out_psnr", "held_out_l1", "held_out_ssim", "held_out_spectrum_error_db"} <= set(
        last
    )
    assert {"perceptual", "codebook", "commitment"} <= set(last)


def make_latents(num_views=24, seed=0):
    array = (
        torch.randn(num_views, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        .half()
        .numpy()
    )
    return Latents(array, [0.0] * 4, [1.0] * 4)


def test_denoiser_resumes_to_the_bit(config, vqvae, accelerator, tmp_path):
    latents, held_out = make_latents(), make_latents(6, seed=1)
    arguments = {"vqvae": vqvae, "accelerator": accelerator}
    train_denoiser(config.denoiser, latents, held_out, **arguments, out_dir=tmp_path / "whole")
    restore = kill_at(latents, 6)
    with pytest.raises(Killed):
        train_denoiser(config.denoiser, latents, held_out, **arguments, out_dir=tmp_path / "parts")
    restore()
    train_denoiser(config.denoiser, latents, held_out, **arguments, out_dir=tmp_path / "parts")
    assert_same_run(tmp_path / "whole/denoiser", tmp_path / "parts/denoiser")
    grids = sorted(path.name for path in (tmp_path / "parts/denoiser/samples").glob("*.png"))
    assert grids == ["000000000032.png", "000000000064.png"]
    for name in grids:
        same = [
            (tmp_path / run / "denoiser/samples" / name).read_bytes() for run in ("whole", "parts")
        ]
        assert same[0] == same[1]


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_autoencoder_learns(config, tiles, accelerator, tmp_path, kind):
    """On what it trains on, the error falls far below that of the mean image, and no code is left
    to die.
    """
    stage = dataclasses.replace(
        config.autoencoder,
        kind=kind,
        num_images=800,
        perceptual_weight=0.0,
        learning_rate=3e-3,
        checkpoint_every=800,
    )
    stage = dataclasses.replace(stage, revive_after_images=200, sample_every=800, log_every=200)
    train_autoencoder(stage, tiles, tiles, accelerator=accelerator, out_dir=tmp_path)
    last = read_stats(tmp_path / "autoencoder")[-1]
    images = tiles.batch(range(24))
    deviation = images.std(dim=(1, 2, 3)).mean().item()
    assert last["held_out_l1"] < 0.25 * deviation
    if kind == "vq":
        assert last["codebook_usage"] > 0.9
        assert last["codebook_perplexity"] > 20


def test_denoising_loss_is_the_formula_and_reaches_every_parameter(config):
    unet = create_denoiser(config.denoiser, 8, 4)
    scheduler = create_scheduler(config.denoiser)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.randn(2, 4, 8, 8, generator=generator),
    )
    timesteps = torch.tensor([10, 900])
    losses = compute_denoising_loss(unet, scheduler, latents, noise, timesteps)
    abar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    predicted = unet(abar.sqrt() * latents + (1 - abar).sqrt() * noise, timesteps).sample
    torch.testing.assert_close(losses, (predicted - noise).square().mean(dim=(1, 2, 3)))
    losses.mean().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_velocity_target_gives_the_latents_back(config):
    """For a U-Net that answered the velocity itself, the loss is 0 and one DDIM step to the start
    gives the latents.
    """
    scheduler = create_scheduler(
        dataclasses.replace(config.denoiser, prediction_type="v_prediction")
    )
    generator = torch.Generator().manual_seed(0)
    latents, noise = (
        torch.randn(3, 4, 8, 8, generator=generator),
        torch.randn(3, 4, 8, 8, generator=generator),
    )
    timesteps = torch.full((3,), 400)
    abar = scheduler.alphas_cumprod[400]
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * latents

    class Oracle(torch.nn.Module):
        def forward(self, noisy, timesteps):
            torch.testing.assert_close(noisy, abar.sqrt() * latents + (1 - abar).sqrt() * noise)
            return SimpleNamespace(sample=velocity)

    assert compute_denoising_loss(Oracle(), scheduler, latents, noise, timesteps).max() < 1e-10
    scheduler.set_timesteps(1000)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    restored = scheduler.step(velocity, 400, noisy).pred_original_sample
    torch.testing.assert_close(restored, latents, atol=1e-4, rtol=1e-4)


def test_logit_normal_timesteps_have_their_density():
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat(
        [draw_timesteps(8, 1000, generator, "logit_normal") for _ in range(3000)]
    ).double()
    assert draws.min() >= 0
    assert draws.max() <= 999
    logits = torch.logit((draws + 0.5) / 1000)
    assert logits.mean().abs() < 0.01
    assert abs(logits.std() - 1) < 0.01


def test_scheduler_suits_latents(config):
    scheduler = create_scheduler(config.denoiser)
    assert not scheduler.config.clip_sample
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999
    assert (
        scheduler.alphas_cumprod[-1].sqrt() < 0.02
    )  # hardly anything of the image is left at the start


def test_timesteps_are_uniform_and_spread():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_timesteps(8, 1000, generator) for _ in range(2000)])
    assert draws.min() >= 0
    assert draws.max() <= 999
    counts = torch.bincount(draws.flatten() // 100, minlength=10).float()
    assert (counts / counts.sum() - 0.1).abs().max() < 0.005
    assert torch.equal((draws // 125).sort(dim=1).values, torch.arange(8).expand(2000, 8))


def test_learning_rate_counts_images(config):
    stage = dataclasses.replace(
        config.denoiser,
        learning_rate=1.0,
        warmup_images=80,
        num_images=8000,
        learning_rate_decay="cosine",
    )
    assert learning_rate_at(stage, 0) == pytest.approx(0.1)
    assert learning_rate_at(stage, 4000) == pytest.approx(0.5)
    assert learning_rate_at(stage, 8000) == pytest.approx(0.0)
    constant = dataclasses.replace(stage, learning_rate_decay="constant", warmup_images=0)
    assert learning_rate_at(constant, 0) == learning_rate_at(constant, 7000) == 1.0


def test_resumed_moments_lie_as_their_parameters(config):
    """The fused optimizer reads memory in order: contiguous moments of a channels-last weight would
    be shuffled.
    """

    def build():
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        return layer, create_optimizer(layer.parameters(), config.denoiser)

    def step(layer, optimizer):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    (layer, optimizer), (resumed, resumed_optimizer) = build(), build()
    step(layer, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    for moments in state["state"].values():
        moments.update(
            {k: v.clone(memory_format=torch.contiguous_format) for k, v in moments.items()}
        )
    resumed.load_state_dict(layer.state_dict())
    resumed_optimizer.load_state_dict(state)
    match_memory_format(resumed_optimizer)
    for _ in range(2):
        step(layer, optimizer)
        step(resumed, resumed_optimizer)
    assert torch.equal(layer.weight, resumed.weight)


def test_reconstruction_metrics_are_their_formulas(vqvae, tiles, accelerator):
    images = tiles.batch(range(5))
    with torch.no_grad():
        decoded = vqvae(images).sample.clamp(-1, 1)
    error = decoded - images
    psnr = (10 * torch.log10(4 / error.square().mean(dim=(1, 2, 3)))).mean().item()
    metrics = evaluate_reconstruction(vqvae, images, accelerator, batch_size=2)
    assert metrics["held_out_l1"] == pytest.approx(error.abs().mean().item(), rel=1e-4)
    assert metrics["held_out_psnr"] == pytest.approx(psnr, rel=1e-4)
    assert metrics["held_out_ssim"] == pytest.approx(ssim(images, decoded).mean().item(), rel=1e-4)
    assert metrics["held_out_spectrum_error_db"] == pytest.approx(
        spectrum_error_db(images, decoded), rel=1e-4
    )
    assert "held_out_ssim" not in evaluate_reconstruction(vqvae, images[..., :8, :8], accelerator)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AutoencoderConfig(norm_num_groups=48), "must divide the channels"),
        (
            lambda: AutoencoderConfig(perceptual_layers=9),
            "perceptual_layers is 9, but must be at most 4",
        ),
        (
            lambda: AutoencoderConfig(kind="gumbel"),
            "kind is 'gumbel', but must be 'vq', 'kl' or 'basis'",
        ),
        (lambda: LDMConfig(autoencoder=AutoencoderConfig(num_images=0)), "init-from"),
        (
            lambda: AutoencoderConfig(micro_batch_size=-1),
            "micro_batch_size is -1, but must be at least 0",
        ),
        (lambda: AutoencoderConfig(discriminator_weight=-1.0), "must be at least 0"),
        (lambda: DenoiserConfig(attention_levels=(7,)), "counted from 0"),
        (lambda: DenoiserConfig(attention_head_dim=60), "must divide the channels of all levels"),
        (lambda: DenoiserConfig(batch_size=0), "must be greater than 0"),
        (lambda: DenoiserConfig(learning_rate_decay="linear"), "cosine"),
        (lambda: LDMConfig(precision="fp8"), "bf16"),
        (
            lambda: LDMConfig(tiles=dataclasses.replace(LDMConfig().tiles, resolution=100)),
            "multiple of 128",
        ),
    ],
)
def test_impossible_configurations_name_the_way_out(build, message):
    with refuses_config(message):
        build()


def with_discriminator(stage, **changes):
    """The full recipe, its discriminator beginning after three of eight steps."""
    changes = {
        "discriminator_start_images": 24,
        "ema_half_life_images": 16.0,
        "revive_after_images": 24,
    } | changes
    small = {"discriminator_weight": 1.0, "discriminator_channels": 8, "discriminator_layers": 1}
    return dataclasses.replace(stage, **small, **changes)


@pytest.mark.parametrize(("kind", "killed_after"), [("vq", 2), ("vq", 6), ("kl", 6)])
def test_full_recipe_resumes_to_the_bit(
    config, tiles, held_out, accelerator, tmp_path, kind, killed_after
):
    """Both players, both optimizers, average and codebook; killed before the discriminator's first
    step and after.
    """
    stage = with_discriminator(
        config.autoencoder, checkpoint_every=16 if killed_after == 2 else 32, kind=kind
    )
    train_autoencoder(stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path / "whole")
    restore = kill_at(tiles, killed_after)
    with pytest.raises(Killed):
        train_autoencoder(
            stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path / "parts"
        )
    restore()
    path, _ = train_autoencoder(
        stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path / "parts"
    )
    assert_same_run(tmp_path / "whole/autoencoder", tmp_path / "parts/autoencoder")
    state = load_checkpoint(list_checkpoints(tmp_path / "parts/autoencoder/checkpoints")[-1])[
        "state"
    ]
    expected = {"model", "optimizer", "ema", "discriminator", "optimizer_D", "micro_batching"}
    assert set(state) == (expected | {"codebook"} if kind == "vq" else expected)
    assert state["optimizer_D"]["state"][0]["step"] == 5  # of eight steps, those from the third on
    saved = load_file(path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], state["ema"][name]) for name in saved)
    assert not all(torch.equal(saved[name], state["model"][name]) for name in saved)
    lines = read_stats(tmp_path / "parts/autoencoder")
    game = {"generator", "discriminator", "logits_real", "logits_fake", "adaptive_weight"}
    assert [bool(game & set(line)) for line in lines] == [False, True, True, True]
    assert all(game <= set(line) for line in lines[1:])


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_batch_that_does_not_fit_is_halved_and_the_run_goes_on(
    config, tiles, held_out, accelerator, tmp_path, monkeypatch, capfd, kind
):
    """Parts of 2 of a batch of 8, found by two halvings, give the weights of the whole batch but
    for rounding.
    """
    stage = dataclasses.replace(
        config.autoencoder, kind=kind, num_images=24, checkpoint_every=24, validate_every=24
    )
    whole, _ = train_autoencoder(
        stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path / "whole"
    )
    compute, sizes = autoencoder_loop.compute_losses, []

    def compute_within_memory(model, perceptual, images, *rest):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return compute(model, perceptual, images, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(autoencoder_loop, "compute_losses", compute_within_memory)
        parts, _ = train_autoencoder(
            stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path / "parts"
        )
    assert sizes == [8, 4] + [2] * 12
    said = capfd.readouterr().err
    assert said.count("From now on, batches are computed in parts of 2 images") == 1
    assert "--autoencoder.micro-batch-size 2" in said
    a, b = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (whole, parts))
    start = build_autoencoder(stage, tiles, accelerator)[0].state_dict()
    apart, moved = (
        torch.stack([(x[name] - y[name]).square().sum() for name in a if "quantize" not in name])
        .sum()
        .sqrt()
        for x, y in ((a, b), (a, start))
    )
    assert apart < 0.05 * moved
    logs = [read_stats(tmp_path / name / "autoencoder")[-1] for name in ("whole", "parts")]
    assert logs[0].keys() == logs[1].keys()
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=0.02)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_parts_of_a_batch_have_its_gradients(config, tiles, accelerator, kind):
    """Without a discriminator the loss is a mean over images: gradients and outputs of parts are
    those of the batch.
    """
    stage = dataclasses.replace(config.autoencoder, kind=kind, kl_weight=0.01)
    model, _ = build_autoencoder(stage, tiles, accelerator)
    perceptual = create_perceptual_distance(stage)
    parameters = list(model.parameters())

    def backward(part, share):
        return backward_losses(part, share, model, perceptual, None, stage, accelerator)

    batch = Batch(tiles.batch(range(8)), ids=torch.arange(8))
    if kind == "kl":
        noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        batch = dataclasses.replace(batch, noise=noise)
    run = SimpleNamespace(accelerator=accelerator, stage="autoencoder")
    results = []
    for size in (0, 3):
        micro_batching = MicroBatching(size, run=run, flag="")
        outputs = micro_batching.accumulate(backward, batch, parameters)
        results.append((outputs, [p.grad.clone() for p in parameters]))
        model.zero_grad()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * max(1e-6, a.abs().max().item()))


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_training_goes_on_from_a_loaded_autoencoder(
    config, tiles, held_out, accelerator, tmp_path, capfd, kind
):
    """Its weights and architecture, not the configuration's; the codebook stays where it is;
    resumable to the bit.
    """
    torch.manual_seed(5)
    source = create_autoencoder(
        dataclasses.replace(config.autoencoder, kind=kind, latent_channels=3, num_codes=32), 16
    )
    if kind == "vq":
        torch.nn.init.normal_(source.quantize.embedding.weight)
    source.register_to_config(latents_mean=[9.0] * 3, latents_std=[9.0] * 3)  # of other micrographs
    source.save_pretrained(tmp_path / "source")
    stage = with_discriminator(
        config.autoencoder,
        init_from=str(tmp_path / "source"),
        learning_rate=1e-8,
        discriminator_start_images=0,
    )
    path, _ = train_autoencoder(
        stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path / "whole"
    )
    trained = load_autoencoder(path)
    assert trained.config.latent_channels == 3
    assert trained.config.latents_mean is None
    for name, value in trained.state_dict().items():
        if "quantize" not in name:
            torch.testing.assert_close(value, source.state_dict()[name], rtol=0, atol=1e-5)
    said = capfd.readouterr().out
    assert said.count("keeps its own architecture") == 1
    assert "latent_channels 3 (not 4)" in said
    assert ("kind kl (not vq)" in said) == (kind == "kl")
    assert ("num_codes 32 (not 64)" in said) == (kind == "vq")

    restore = kill_at(tiles, 6)
    with pytest.raises(Killed):
        train_autoencoder(
            stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path / "parts"
        )
    restore()
    train_autoencoder(stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path / "parts")
    assert_same_run(tmp_path / "whole/autoencoder", tmp_path / "parts/autoencoder")


def test_a_loaded_codebook_is_not_placed_anew(config, tiles, held_out, accelerator, tmp_path):
    source = create_autoencoder(config.autoencoder, 16)
    torch.nn.init.normal_(source.quantize.embedding.weight, mean=5.0)
    source.save_pretrained(tmp_path / "source")
    stage = dataclasses.replace(
        config.autoencoder,
        init_from=str(tmp_path / "source"),
        learning_rate=1e-9,
        num_images=16,
        revive_after_images=10_000,
    )
    path, _ = train_autoencoder(stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path)
    codes = load_autoencoder(path).quantize.embedding.weight
    torch.testing.assert_close(codes, source.quantize.embedding.weight, rtol=0, atol=1e-5)


class ArgMaxQuantizer(torch.nn.Module):
    """Codes by a classifier, as those of a GumbelVQ and of DALL-E: no nearest ones."""

    n_e = 64

    def forward(self, latents):
        return latents, None, (None, None, None)


def test_an_autoencoder_that_cannot_be_trained_is_refused_but_used(
    config, vqvae, tiles, held_out, accelerator, tmp_path, monkeypatch
):
    vqvae.quantize = ArgMaxQuantizer()
    monkeypatch.setattr(first_autoencoder, "load_autoencoder", lambda source: vqvae)
    stage = dataclasses.replace(config.autoencoder, init_from="somewhere")
    with pytest.raises(
        ValueError,
        match=r"somewhere is a VQModel, which cannot be trained here.*--autoencoder.num-images 0",
    ):
        train_autoencoder(stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path)
    stage = dataclasses.replace(stage, num_images=0)
    path, seconds = train_autoencoder(
        stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path
    )
    assert seconds == 0
    saved = load_file(path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, vqvae.state_dict()[name]) for name, value in saved.items())
    (line,) = read_stats(tmp_path / "autoencoder")
    assert line["num_images_seen"] == 0
    assert line["held_out_psnr"] == pytest.approx(
        evaluate_reconstruction(vqvae, held_out.batch(range(6)), accelerator)["held_out_psnr"]
    )


def test_before_the_discriminator_begins_training_is_as_without(
    config, tiles, held_out, accelerator, tmp_path
):
    plain = dataclasses.replace(config.autoencoder, num_images=32)
    late = with_discriminator(
        plain, discriminator_start_images=32, ema_half_life_images=0.0, revive_after_images=32
    )
    arguments = {"accelerator": accelerator}
    a, _ = train_autoencoder(plain, tiles, held_out, **arguments, out_dir=tmp_path / "plain")
    b, _ = train_autoencoder(late, tiles, held_out, **arguments, out_dir=tmp_path / "late")
    weights = "diffusion_pytorch_model.safetensors"
    assert (a / weights).read_bytes() == (b / weights).read_bytes()


def test_validated_and_saved_are_the_averaged_weights(
    config, tiles, held_out, accelerator, tmp_path
):
    stage = with_discriminator(config.autoencoder)
    path, _ = train_autoencoder(stage, tiles, held_out, accelerator=accelerator, out_dir=tmp_path)
    images = held_out.batch(range(6))
    metrics = evaluate_reconstruction(load_autoencoder(path), images, accelerator)
    last = read_stats(tmp_path / "autoencoder")[-1]
    assert {name: last[name] for name in metrics} == pytest.approx(metrics, rel=1e-5)


def test_revived_codes_are_revived_in_the_average(config):
    """A moved code stands in the average where it stands in the model, at once; the living ones go
    on trailing.
    """
    model = torch.nn.Embedding(6, 4)
    ema = EMA(model, half_life_images=1e6, ramp_up=None)
    with torch.no_grad():
        model.weight += 1
    ema.update(model, 100, 10)
    before = ema.model.weight.clone()
    monitor = CodebookMonitor(6, window_images=10)
    monitor.count(torch.tensor([1, 4]))
    optimizer = torch.optim.Adam(model.parameters())
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    monitor.end_window(model, latents, torch.Generator().manual_seed(0), optimizer, 10, ema.model)
    dead = [0, 2, 3, 5]
    assert torch.equal(ema.model.weight[dead], model.weight[dead])
    assert torch.equal(ema.model.weight[[1, 4]], before[[1, 4]])
    assert not torch.equal(model.weight[[1, 4]], before[[1, 4]])
