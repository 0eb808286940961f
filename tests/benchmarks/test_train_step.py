"""The pure parts of the benchmark of a training step: that it times what it says, and equal work on
both sides.
"""

import dataclasses

import pytest
import torch
from plain_loop import PlainLoop
from train_step import BarePass, Laps, LoopInSteps, parse_arguments, summarise

from em_diffusion import PRESETS, denoiser_loop
from em_diffusion.denoiser import create_denoiser, create_scheduler
from em_diffusion.denoiser_loop import compute_denoising_loss
from em_training import make_generator, read_stats


@pytest.fixture
def config():
    return dataclasses.replace(PRESETS["test"]().denoiser, batch_size=4, num_images=32, log_every=4)


@pytest.fixture
def plain(config, vqvae, latents, tiles, paths):
    torch.manual_seed(1)
    unet = create_denoiser(config, latents.shape[-1], latents.shape[0])
    return PlainLoop(
        unet, vqvae, create_scheduler(config), tiles, paths, batch_size=4, learning_rate=1e-4,
        latents_mean=latents.mean, latents_std=latents.std, generator=make_generator(0),
    )  # fmt: skip


def test_the_plain_loss_is_ours_for_the_same_batch(plain, latents, tiles, paths):
    from data_loading import read_png_batch

    view_ids = torch.arange(3, 9).numpy()
    cached = latents.batch(view_ids)
    encoded = plain.encode(read_png_batch(tiles, paths, view_ids))
    assert torch.allclose(encoded, cached, atol=5e-3)  # cached in float16
    noise = torch.randn(cached.shape, generator=torch.Generator().manual_seed(2))
    timesteps = torch.tensor([0, 10, 200, 500, 900, 999])
    ours = compute_denoising_loss(plain.unet, plain.scheduler, cached, noise, timesteps).mean()
    assert plain.compute_loss(cached, noise, timesteps).item() == pytest.approx(
        ours.item(), rel=1e-6
    )
    assert plain.compute_loss(encoded, noise, timesteps).item() == pytest.approx(
        ours.item(), rel=1e-3
    )


def test_the_plain_loop_trains_and_sees_every_view_once_an_epoch(plain, tiles):
    drawn = torch.cat([torch.as_tensor(plain.draw_views()) for _ in range(tiles.num_views // 4)])
    assert sorted(drawn.tolist()) == list(range(tiles.num_views))
    before = [parameter.clone() for parameter in plain.unet.parameters()]
    frozen = [parameter.clone() for parameter in plain.vqvae.parameters()]
    parts = []
    assert torch.isfinite(plain.step(parts.append))
    assert parts == ["decode PNG", "encode", "forward and backward", "clip and optimizer"]
    assert all((a != b).any() for a, b in zip(before, plain.unet.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(frozen, plain.vqvae.parameters()))


def test_the_held_loop_is_the_training_loop_step_by_step(
    config, latents, vqvae, accelerator, tmp_path
):
    def train(out_dir, config):
        denoiser_loop.train_denoiser(
            config, latents, latents, vqvae, accelerator=accelerator, out_dir=out_dir
        )

    held = LoopInSteps(lambda: train(tmp_path / "held", config), num_threads=1)
    for _ in range(3):
        held.step()
    held.stop()
    lines = read_stats(tmp_path / "held" / "denoiser")
    assert [line["num_images_seen"] for line in lines] == [4, 8, 12, 16]
    train(tmp_path / "whole", config)
    whole = read_stats(tmp_path / "whole" / "denoiser")
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole[:4]]
    assert denoiser_loop.TrainingRun.__name__ == "TrainingRun"  # put back


def test_an_error_in_the_held_loop_reaches_its_caller():
    def fail():
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        LoopInSteps(fail, num_threads=1)
    with pytest.raises(RuntimeError, match="came to its end"):
        LoopInSteps(lambda: None, num_threads=1)


def test_the_bare_pass_names_every_part_of_our_step(config, latents, accelerator):
    ticks = iter(range(100))
    laps = Laps(lambda: next(ticks))
    BarePass(config, latents, accelerator).step(laps)
    names = [
        "forward and backward",
        "optimizer",
        "clip",
        "average of the weights",
        "read latents, draw noise",
    ]
    assert laps.seconds == dict.fromkeys(names, 1)


def test_the_figures_are_ratios_of_the_same_rounds():
    parts = {
        "forward and backward": 0.9,
        "optimizer": 0.1,
        "clip": 0.02,
        "average of the weights": 0.02,
    }
    parts["read latents, draw noise"] = 0.01
    plain = {
        "decode PNG": 0.5,
        "encode": 4.0,
        "forward and backward": 1.0,
        "clip and optimizer": 0.5,
    }
    rounds = [
        {
            "ours": 1.1 * slow,
            "plain": {k: v * slow for k, v in plain.items()},
            "parts": {k: v * slow for k, v in parts.items()},
        }
        for slow in (1, 3, 1.5)
    ]
    step, bare, breakdown = summarise(rounds, {"device": "cpu"}, batch_size=8)
    assert step["ratio"] == pytest.approx(6 / 1.1, abs=1e-3)
    assert (
        step["ratio_range"] == [step["ratio"]] * 2
    )  # a machine that is slow for both changes nothing
    assert step["encoder_share"] == pytest.approx(4 / 6, abs=1e-3)
    assert bare["ratio"] == pytest.approx(1.1, abs=1e-3)
    assert bare["ratio_without_optimizer"] == pytest.approx(1.1 / 0.9, abs=1e-3)
    assert breakdown["ours"]["log, bar and the rest"] == pytest.approx(1.5 * 0.05, abs=1e-3)
    difference = sum(breakdown["plain"].values()) - sum(breakdown["ours"].values())
    assert sum(breakdown["saved"].values()) == pytest.approx(difference, abs=1e-3)
    assert all(figure["device"] == "cpu" for figure in (step, bare, breakdown))


def test_arguments():
    arguments = parse_arguments([])
    assert (arguments.resolution, arguments.preset, arguments.threads, arguments.clock) == (
        256,
        "small",
        1,
        "wall",
    )
    assert parse_arguments(["--resolution", "64", "--base-channels", "0"]).base_channels == 0
    with pytest.raises(SystemExit):
        parse_arguments(["--preset", "huge"])
