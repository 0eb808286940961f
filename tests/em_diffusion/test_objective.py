"""What the denoiser is trained for: targets, weights, schedules and timesteps, each against its
closed form.
"""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from em_diffusion.config import DenoiserConfig
from em_diffusion.denoiser import create_scheduler
from em_diffusion.denoiser_loop import (
    compute_denoising_loss,
    compute_min_snr_weights,
)
from em_diffusion.optimization import learning_rate_at
from em_training.timesteps import draw_timesteps
from support.config import refuses_config


def draw(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 4, 8, 8, generator=generator) for _ in range(2)]


class Answer(torch.nn.Module):
    """A model that answers `function(x_t, t)`."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, noisy, timesteps):
        return SimpleNamespace(sample=self.function(noisy, timesteps))


def make_scheduler(**changes):
    return create_scheduler(dataclasses.replace(DenoiserConfig(), **changes))


def test_flow_goes_straight_from_latents_to_noise():
    """The target is the derivative of the path by s = t / T, and where the path is comes from the
    model's own input.
    """
    scheduler = make_scheduler(prediction_type="flow")
    latents, noise = draw()
    timesteps = torch.tensor([0.0, 250.0, 1000.0])
    seen = []
    zero = Answer(lambda noisy, t: (seen.append((noisy, t)), torch.zeros_like(noisy))[1])
    losses = compute_denoising_loss(zero, scheduler, latents, noise, timesteps)
    torch.testing.assert_close(losses, (noise - latents).square().mean(dim=(1, 2, 3)))
    ((noisy, t),) = seen
    torch.testing.assert_close(
        noisy, torch.stack([latents[0], 0.75 * latents[1] + 0.25 * noise[1], noise[2]])
    )
    assert torch.equal(t, timesteps)  # what the sampler will ask with: sigma * num_train_timesteps
    step = 1e-2
    ahead = compute_path(latents, noise, (timesteps + step) / 1000)
    torch.testing.assert_close((ahead - noisy) / (step / 1000), noise - latents, rtol=0, atol=0.05)


def compute_path(latents, noise, s):
    s = s.view(-1, 1, 1, 1)
    return (1 - s) * latents + s * noise


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_a_perfect_model_has_no_loss(prediction_type):
    """What answers from x_t and the one image there is; the sampler then gives that image from any
    noise, in any number of steps.
    """
    scheduler = make_scheduler(
        prediction_type=prediction_type, zero_terminal_snr=prediction_type == "v_prediction"
    )
    (latents, noise), abars = draw(), getattr(scheduler, "alphas_cumprod", None)
    image = latents[:1]

    def answer(noisy, timesteps):
        timesteps = timesteps.reshape(-1).expand(len(noisy))
        if prediction_type == "flow":
            return (noisy - image) / (timesteps / 1000).view(-1, 1, 1, 1)
        abar = abars[timesteps].view(-1, 1, 1, 1)
        found = (noisy - abar.sqrt() * image) / (1 - abar).sqrt()
        return (
            found
            if prediction_type == "epsilon"
            else abar.sqrt() * found - (1 - abar).sqrt() * image
        )

    for timesteps in ([50, 500, 998], [1, 20, 999]):
        timesteps = torch.tensor(
            timesteps, dtype=torch.float32 if prediction_type == "flow" else torch.int64
        )
        losses = compute_denoising_loss(
            Answer(answer), scheduler, image.expand(3, -1, -1, -1), noise, timesteps
        )
        assert losses.max() < 1e-6
    for num_steps in (1, 4, 50):
        scheduler.set_timesteps(num_steps)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(answer(x, t), t, x).prev_sample
        tolerance = (
            0.05 if prediction_type == "epsilon" and num_steps == 1 else 5e-3
        )  # of x_0 from noise alone
        torch.testing.assert_close(x, image.expand_as(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_count_the_latents_error_min_snr_times(prediction_type):
    """weight x (error of the answer)^2 = min(SNR, gamma) x (error of the latents that follows from
    it)^2, at every timestep.
    """
    scheduler = make_scheduler(prediction_type=prediction_type)
    abar = scheduler.alphas_cumprod.double()
    timesteps = torch.arange(1000)
    weights = compute_min_snr_weights(scheduler, timesteps, 5.0).double()
    error = 0.1
    latents_error = (
        (1 - abar).sqrt() * error
        if prediction_type == "v_prediction"
        else ((1 - abar) / abar).sqrt() * error
    )
    snr = abar / (1 - abar)
    torch.testing.assert_close(
        weights * error**2, snr.clamp(max=5) * latents_error**2, rtol=1e-3, atol=1e-12
    )
    if prediction_type == "epsilon":
        assert (weights[snr < 5] == 1).all()


def test_min_snr_weights_at_known_snr():
    for prediction_type, expected in (
        ("epsilon", [1.0, 1.0, 0.5]),
        ("v_prediction", [0.5, 5 / 6, 5 / 11]),
    ):
        scheduler = make_scheduler(prediction_type=prediction_type)
        scheduler.alphas_cumprod = torch.tensor([1 / 2, 5 / 6, 10 / 11])  # SNR 1, 5, 10
        weights = compute_min_snr_weights(scheduler, torch.arange(3), 5.0)
        torch.testing.assert_close(weights, torch.tensor(expected))


def test_zero_terminal_snr_ends_in_noise_and_begins_as_before():
    """Algorithm 1 of Lin et al.: sqrt(abar) is shifted and scaled, so that its last is 0 and its
    first is kept.
    """
    plain, rescaled = (
        make_scheduler(prediction_type="v_prediction", zero_terminal_snr=zero)
        .alphas_cumprod.double()
        .sqrt()
        for zero in (False, True)
    )
    assert rescaled[-1] == 0
    assert plain[-1] > 0.01
    expected = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    torch.testing.assert_close(rescaled, expected, rtol=1e-3, atol=1e-5)


def test_schedules_are_saved_and_loaded_as_trained(tmp_path):
    scheduler = make_scheduler(prediction_type="v_prediction", zero_terminal_snr=True)
    scheduler.save_pretrained(tmp_path / "v")
    loaded = DDIMScheduler.from_pretrained(tmp_path / "v")
    assert loaded.config.rescale_betas_zero_snr
    assert loaded.config.timestep_spacing == "trailing"
    assert loaded.config.prediction_type == "v_prediction"
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    loaded.set_timesteps(7)
    assert loaded.timesteps[0] == 999  # begins where nothing of the image is left
    make_scheduler(prediction_type="flow").save_pretrained(tmp_path / "flow")
    assert (
        FlowMatchEulerDiscreteScheduler.from_pretrained(
            tmp_path / "flow"
        ).config.num_train_timesteps
        == 1000
    )


@torch.no_grad()
def test_the_pipeline_samples_flow(pipeline):
    """What it draws is Euler's way from noise along the U-Net's answers, asked for s x 1000."""
    pipeline.register_modules(scheduler=make_scheduler(prediction_type="flow"))
    drawn = pipeline(
        2, torch.Generator().manual_seed(0), num_inference_steps=4, output_type="latent"
    ).images
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    s = torch.cat([pipeline.scheduler.sigmas[:4], torch.zeros(1)])
    assert s[0] == 1
    for now, after in itertools.pairwise(s):
        x = x + (after - now) * pipeline.unet(x, now * 1000).sample
    torch.testing.assert_close(pipeline.normalise_latents(drawn), x, rtol=1e-3, atol=1e-3)


def test_continuous_timesteps_have_their_density():
    generator = torch.Generator().manual_seed(0)
    for density in ("uniform", "logit_normal"):
        draws = torch.cat(
            [draw_timesteps(8, 1000, generator, density, continuous=True) for _ in range(3000)]
        )
        assert draws.dtype == torch.float32
        assert draws.min() >= 0
        assert draws.max() <= 1000
        assert (draws != draws.floor()).float().mean() > 0.9
        uniform = draws.double() / 1000
        if density == "logit_normal":
            uniform = torch.special.ndtr(torch.logit(uniform))
        assert (
            uniform.sort().values - torch.linspace(0, 1, len(uniform), dtype=torch.float64)
        ).abs().max() < 0.01


def test_inverse_square_root_falls_from_the_reference_on():
    config = DenoiserConfig(
        learning_rate=1.0,
        warmup_images=0,
        learning_rate_decay="inverse_sqrt",
        learning_rate_reference_images=1000,
    )
    assert learning_rate_at(config, 0) == learning_rate_at(config, 1000) == 1
    assert learning_rate_at(config, 4000) == pytest.approx(0.5)
    assert learning_rate_at(config, 100_000) == pytest.approx(0.1)
    longer = dataclasses.replace(config, num_images=10**9)
    assert learning_rate_at(longer, 4000) == learning_rate_at(config, 4000)
    warming = dataclasses.replace(config, warmup_images=8000, batch_size=64)
    assert learning_rate_at(warming, 4000 - 64) == pytest.approx(0.5 / (3936 / 1000) ** 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "sample"}, "'v_prediction' or 'flow'"),
        ({"beta_schedule": "cosine"}, "'scaled_linear' or 'linear'"),
        ({"min_snr_gamma": -1.0}, "must be at least 0"),
        ({"zero_terminal_snr": True}, 'needs prediction_type "v_prediction"'),
        (
            {"zero_terminal_snr": True, "prediction_type": "flow"},
            "with flow, the last timestep is pure noise already",
        ),
        ({"min_snr_gamma": 5.0, "prediction_type": "flow"}, "timestep-density"),
        (
            {"min_snr_gamma": 5.0, "zero_terminal_snr": True, "prediction_type": "v_prediction"},
            "Turn one of the two off",
        ),
        ({"learning_rate_reference_images": 0}, "must be greater than 0"),
        ({"learning_rate_decay": "linear"}, "'cosine', 'constant' or 'inverse_sqrt'"),
        ({"micro_batch_size": -1}, "must be at least 0"),
    ],
)
def test_objectives_that_cannot_be_trained_name_the_way_out(changes, message):
    with refuses_config(message):
        DenoiserConfig(**changes)
