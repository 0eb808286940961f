"""The denoiser's loop: whatever state an option adds, a resumed run is the run, to the bit."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file

from em_data.batch import Batch
from em_diffusion import denoiser_loop
from em_diffusion.denoiser import create_denoiser, create_scheduler, load_denoiser
from em_diffusion.denoiser_loop import (
    compute_denoising_loss,
    draw_noise,
    draw_validation_batch,
    evaluate_denoising,
    train_denoiser,
)
from em_diffusion.em_unet2d_model import EMUNet2DModel
from em_training import (
    create_accelerator,
    list_checkpoints,
    load_checkpoint,
    make_generator,
    read_best,
    read_stats,
)
from em_training.posthoc_ema import list_snapshots
from support.config import refuses_config

sys.path.insert(0, str(Path(__file__).parent))
from test_loops import Killed, assert_same_run, kill_at, make_latents


@pytest.fixture
def train(vqvae, accelerator, tmp_path):
    """Train a stage in the folder `name`; with `kill_after` batches, end there."""

    def train(stage, name, kill_after=None, accelerator=accelerator, **options):
        latents, held_out = make_latents(), make_latents(6, seed=1)
        arguments = {
            "vqvae": vqvae,
            "accelerator": accelerator,
            "out_dir": tmp_path / name,
            **options,
        }
        if kill_after is None:
            train_denoiser(stage, latents, held_out, **arguments)
        else:
            kill_at(latents, kill_after)
            with pytest.raises(Killed):
                train_denoiser(stage, latents, held_out, **arguments)
        return tmp_path / name / "denoiser"

    return train


def load_last(folder):
    return load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])["state"]


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "flow", "timestep_density": "logit_normal"},
        {"prediction_type": "v_prediction", "zero_terminal_snr": True},
        {
            "prediction_type": "v_prediction",
            "min_snr_gamma": 5.0,
            "learning_rate_decay": "inverse_sqrt",
        },
        {"micro_batch_size": 3, "gradient_checkpointing": True},
        {"posthoc_ema_every": 24},
        {"num_attention_heads": 4},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_options_resume_to_the_bit(config, train, changes):
    stage = dataclasses.replace(config.denoiser, **changes)
    whole = train(stage, "whole")
    train(stage, "parts", kill_after=6)
    assert_same_run(whole, train(stage, "parts"))
    line = read_stats(whole)[-1]
    assert {"held_out_loss", "held_out_loss_q1", "held_out_loss_q4"} <= set(line)


def test_snapshots_resume_to_the_bit(config, train):
    stage = dataclasses.replace(config.denoiser, posthoc_ema_every=16)
    whole = train(stage, "whole")
    train(stage, "parts", kill_after=7)  # has written one at 48 that lies after the checkpoint
    parts = train(stage, "parts")
    snapshots = list_snapshots(whole / "posthoc_ema")
    assert [count for count, _ in snapshots.values()] == [16, 16, 32, 32, 48, 48, 64, 64]
    for path in snapshots:
        same = [load_file(folder / "posthoc_ema" / path.name) for folder in (whole, parts)]
        assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_heads_of_one_number_are_counted_and_saved(config, tmp_path):
    """As many on every level, whatever its channels; the stock model where heads have one width."""
    stage = dataclasses.replace(
        config.denoiser, channel_multipliers=(1, 2, 4), attention_levels=(1, 2)
    )
    for changes, kind, heads in (
        ({"num_attention_heads": 8}, EMUNet2DModel, {8}),
        ({}, UNet2DModel, {4, 8}),
    ):
        unet = create_denoiser(dataclasses.replace(stage, **changes), 8, 4)
        assert type(unet) is kind
        assert {module.heads for module in unet.modules() if isinstance(module, Attention)} == heads
        unet.save_pretrained(tmp_path / kind.__name__)
        loaded = load_denoiser(tmp_path / kind.__name__)
        assert type(loaded) is kind
        x, t = torch.randn(1, 4, 8, 8, generator=make_generator(0)), torch.tensor([3])
        assert torch.equal(loaded(x, t).sample, unet.eval()(x, t).sample)
    with refuses_config("num_attention_heads is 3, but must divide"):
        dataclasses.replace(stage, num_attention_heads=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match="holds a VQModel"):
        load_denoiser(tmp_path / "other")


def test_the_best_resumes_to_the_bit(config, train, held_out):
    """Killed after the best at 48 was kept and before it was in a checkpoint: it is found again, by
    replay.
    """
    stage = dataclasses.replace(
        config.denoiser, evaluate_every=16, num_evaluation_images=6, num_evaluation_steps=2
    )
    whole = train(stage, "whole", held_out=held_out)
    train(stage, "parts", kill_after=7, held_out=held_out)
    assert_same_run(whole, train(stage, "parts", held_out=held_out))
    parts = whole.parents[1] / "parts/denoiser"
    distances = {
        line["num_images_seen"]: line["held_out_frechet_distance"] for line in read_stats(whole)
    }
    best = read_best(whole)
    assert best == read_best(parts)
    assert best["frechet_distance"] == min(distances.values()) == distances[best["num_images_seen"]]
    weights = [
        load_file(f / "best/unet/diffusion_pytorch_model.safetensors") for f in (whole, parts)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_parts_and_recomputation_change_nothing_but_rounding(config, train):
    """Weights after 8 steps, against those of the plain loop, and with a memory that holds 3
    images.
    """
    plain = load_last(train(config.denoiser, "plain"))["model"]
    for name, changes in (
        ("micro", {"micro_batch_size": 3}),
        ("again", {"gradient_checkpointing": True}),
    ):
        weights = load_last(train(dataclasses.replace(config.denoiser, **changes), name))["model"]
        for key, value in plain.items():
            torch.testing.assert_close(weights[key], value, rtol=2e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("default")
def test_compiled_trains_as_it_is(config, train):
    """To rounding; and resumes to the bit."""
    stage = dataclasses.replace(config.denoiser, compile=True, micro_batch_size=4)
    plain = load_last(train(dataclasses.replace(stage, compile=False), "plain"))["model"]
    whole = train(stage, "whole")
    for key, value in load_last(whole)["model"].items():
        torch.testing.assert_close(value, plain[key], rtol=2e-3, atol=2e-5)
    train(stage, "parts", kill_after=6)
    assert_same_run(whole, train(stage, "parts"))


def test_memory_that_runs_out_is_survived_and_resumed(config, train, monkeypatch, capfd):
    """Where 3 images fit, the run goes on with parts of 2 and is said so once; resumed, it begins
    with them.
    """

    def small_memory(unet, scheduler, latents, *rest, **conditions):
        if unet.training and len(latents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return compute_denoising_loss(unet, scheduler, latents, *rest, **conditions)

    monkeypatch.setattr(denoiser_loop, "compute_denoising_loss", small_memory)
    whole = train(config.denoiser, "whole")
    assert capfd.readouterr().err.count("--denoiser.micro-batch-size 2 makes it permanent") == 1
    train(config.denoiser, "parts", kill_after=6)
    capfd.readouterr()
    assert_same_run(whole, train(config.denoiser, "parts"))
    assert "makes it permanent" not in capfd.readouterr().err
    assert load_last(whole)["micro_batching"] == {"configured": 0, "size": 2}


class TestFloat16:
    """The scaler on the CPU, in float32: a scale of a power of two changes no bit unless something
    overflows.
    """

    @pytest.fixture
    def scaled(self, tmp_path):
        def make(**options):
            accelerator = create_accelerator(tmp_path, "no")
            accelerator.scaler = torch.amp.GradScaler("cpu", **options)
            return accelerator

        return make

    def test_scaled_is_unscaled(self, config, train, scaled):
        """Clipping acts on gradients brought back to scale: most steps here are clipped."""
        stage = dataclasses.replace(config.denoiser, max_grad_norm=0.1)
        plain = train(stage, "plain")
        half = train(stage, "half", accelerator=scaled(init_scale=2.0**14, growth_interval=3))
        for key in ("model", "ema"):
            for name, value in load_last(plain)[key].items():
                assert torch.equal(value, load_last(half)[key][name]), name
        lines = [read_stats(folder)[-1] for folder in (plain, half)]
        assert lines[0]["gradient_norm"] == lines[1]["gradient_norm"] > 0.1
        assert load_last(half)["scaler"]["scale"] == 2.0**16

    def test_overflow_skips_steps_and_resumes_to_the_bit(self, config, train, scaled, monkeypatch):
        """A loss of about 16 overflows at the first scales, and once more when the scale has grown
        again.
        """
        monkeypatch.setattr(
            denoiser_loop,
            "compute_denoising_loss",
            lambda *args, **conditions: 16 * compute_denoising_loss(*args, **conditions),
        )
        stage = dataclasses.replace(config.denoiser, log_every=8)
        options = {
            "init_scale": 2.0**127,
            "growth_interval": 3,
            "backoff_factor": 0.125,
            "growth_factor": 8.0,
        }
        whole = train(stage, "whole", accelerator=scaled(**options))
        train(stage, "parts", kill_after=6, accelerator=scaled(**options))
        assert_same_run(whole, train(stage, "parts", accelerator=scaled(**options)))
        skipped = [line["skipped_steps"] for line in read_stats(whole)]
        assert skipped == [1, 0, 0, 0, 1, 0, 0, 0]
        assert load_last(whole)["scaler"]["scale"] == 2.0**127
        assert load_last(whole)["optimizer"]["state"][0]["step"] == 6

    def test_the_cpu_has_none(self, tmp_path):
        with pytest.raises(ValueError, match="fp16 needs a GPU"):
            create_accelerator(tmp_path, "fp16")


def test_validation_is_the_loss_by_quarters_of_the_timesteps(config, accelerator):
    stage = dataclasses.replace(config.denoiser, num_validation_images=32)
    torch.manual_seed(0)
    unet, scheduler = create_denoiser(stage, 8, 4).eval(), create_scheduler(stage)
    batch = draw_validation_batch(make_latents(32), stage)
    with torch.no_grad():
        noised = (batch.images, batch.noise, batch.timesteps)
        losses = compute_denoising_loss(unet, scheduler, *noised)
    values = evaluate_denoising(unet, scheduler, batch, accelerator, stage)
    torch.testing.assert_close(values.pop("held_out_loss"), losses.mean())
    quarters = {
        f"held_out_loss_q{q + 1}": losses[batch.timesteps // 250 == q].mean() for q in range(4)
    }
    torch.testing.assert_close(values, quarters)
    few = evaluate_denoising(unet, scheduler, next(batch.split(1)), accelerator, stage)
    assert len(few) == 2  # no quarter without timesteps


def test_flow_draws_timesteps_between_the_integers(config):
    stage = dataclasses.replace(config.denoiser, prediction_type="flow")
    batch = Batch(torch.zeros(64, 4, 8, 8), torch.arange(64))
    timesteps = draw_noise(batch, stage, make_generator(0)).timesteps
    assert timesteps.dtype == torch.float32
    assert (timesteps != timesteps.round()).any()


@pytest.mark.parametrize("num_levels", [3, 4, 5])
@pytest.mark.parametrize("batch_size", [8, 16, 32, 64])
def test_the_studys_variants_are_built_and_stepped(config, num_levels, batch_size):
    """Three to five levels and batches of 8 to 64 at the study's 32 x 32 x 4 latents, narrow: every
    parameter gets a gradient.
    """
    stage = dataclasses.replace(
        config.denoiser,
        base_channels=8,
        channel_multipliers=(1, 2, 2, 4, 4)[:num_levels],
        attention_levels=tuple(range(1, num_levels)),
        batch_size=batch_size,
    )
    unet, scheduler = create_denoiser(stage, 32, 4), create_scheduler(stage)
    latents = torch.randn(batch_size, 4, 32, 32, generator=make_generator(0))
    batch = draw_noise(Batch(latents, torch.arange(batch_size)), stage, make_generator(1))
    losses = compute_denoising_loss(unet, scheduler, latents, batch.noise, batch.timesteps)
    assert losses.shape == (batch_size,)
    losses.mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in unet.parameters())
