"""The pipeline with other components: KL autoencoders, U-Nets of our own, flow matching, solvers
with noise of their own.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
)

from em_diffusion import EMLatentDiffusionPipeline
from em_diffusion.em_grain import EMGrain
from em_diffusion.em_unet2d_model import EMUNet2DModel
from em_diffusion.pipeline_em_ldm import nearest_codes
from em_diffusion.samplers import (
    SAMPLERS,
    create_sampler,
    is_flow,
    list_samplers,
    store_default_sampler,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 1.5, 2.0, 0.8]}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def kl():
    torch.manual_seed(2)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    channels = {
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 4,
        "block_out_channels": (8, 8),
    }
    return AutoencoderKL(
        **channels, **blocks, norm_num_groups=4, sample_size=16, **STATISTICS
    ).eval()


@pytest.fixture
def own_unet(pipeline):
    torch.manual_seed(3)
    config = {
        k: v
        for k, v in pipeline.unet.config.items()
        if not k.startswith("_") and k != "attention_head_dim"
    }
    return EMUNet2DModel(**config, num_attention_heads=2).eval()


@pytest.fixture
def own(kl, own_unet, pipeline):
    pipe = EMLatentDiffusionPipeline(
        kl, own_unet, pipeline.scheduler, 0.5, default_num_inference_steps=3
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_grain(strength=0.2):
    """Grain at 16 x 16 of a random spectrum, stronger in the bright."""
    grain = EMGrain(sample_size=(16, 16), num_grey_levels=2, num_strengths=3)
    amplitude = torch.rand(16, 9, generator=torch.Generator().manual_seed(4)) + 0.5
    values = {"amplitude": amplitude, "deviations": torch.tensor([0.5, 1.0]) * strength}
    grain.load_state_dict(grain.state_dict() | values)
    return grain


class StraightVelocity(torch.nn.Module):
    """The exact velocity noise - latents of flow matching where all latents are one point: linear
    in x, dx/ds = (x - point) / s.
    """

    def __init__(self, unet, point):
        super().__init__()
        self.config, self.dtype, self.point, self.seen = unet.config, torch.float32, point, []

    def forward(self, x, timestep):
        self.seen.append(float(timestep))
        return type("Output", (), {"sample": (x - self.point) / (float(timestep) / 1000)})


# ---------------------------------------------------------------- grain


def test_a_grain_given_later_is_saved_and_one_taken_away_is_not(own, tmp_path):
    own.grain = make_grain()
    own.save_pretrained(tmp_path / "with")
    again = EMLatentDiffusionPipeline.from_pretrained(tmp_path / "with")
    again.set_progress_bar_config(disable=True)
    expected = own(2, generators(0, 1), output_type="pt").images
    assert torch.equal(again(2, generators(0, 1), output_type="pt").images, expected)
    again.grain = None
    again.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "grain").exists()
    bare = EMLatentDiffusionPipeline.from_pretrained(tmp_path / "without")
    assert bare.grain is None
    bare.set_progress_bar_config(disable=True)
    expected = own(2, generators(0, 1), output_type="pt", add_grain=False).images
    assert torch.equal(bare(2, generators(0, 1), output_type="pt").images, expected)


def test_generators_of_the_grain_are_one_an_image_or_one_for_all(own):
    own.grain = make_grain()
    latents = torch.zeros(2, 4, 8, 8)
    expected = own.decode(latents, generators(0, 1))
    assert torch.equal(own.decode(latents, tuple(generators(0, 1))), expected)
    for wrong in (generators(0), generators(0, 1, 2)):
        with pytest.raises(ValueError, match=f"{len(wrong)} generators for 2 images"):
            own.decode(latents, wrong)


# ---------------------------------------------------------------- autoencoders


def test_a_kl_autoencoder_decodes_latents_as_they_are(own, kl):
    latents = own.denoise(2, generators(0, 1))
    with torch.no_grad():
        expected = kl.decode(latents).sample.clamp(-1, 1)
    assert torch.equal(own.decode(latents), expected)
    images = own(2, generators(0, 1), output_type="pt").images
    assert images.shape == (2, 1, 16, 16)
    torch.testing.assert_close(images * 2 - 1, expected)


def test_a_kl_autoencoder_without_statistics_is_scaled_and_shifted(own, kl):
    kl.register_to_config(
        latents_mean=None, latents_std=None, scaling_factor=0.25, shift_factor=0.1
    )
    latents = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(own.denormalise_latents(latents), latents / 0.25 + 0.1)
    torch.testing.assert_close(own.normalise_latents(own.denormalise_latents(latents)), latents)


def test_colour_autoencoders_are_refused_with_the_way_out(own):
    torch.manual_seed(0)
    own.vqvae = AutoencoderKL(latent_channels=4, block_out_channels=(32,))
    with pytest.raises(ValueError, match="3 channels, not to one"):
        own.decode(torch.zeros(1, 4, 8, 8))


def test_denoise_and_decode_are_the_call(pipeline):
    latents = pipeline.denoise(3, generators(1, 2, 3), 4)
    expected = pipeline(3, generators(1, 2, 3), 4, output_type="latent").images
    assert torch.equal(latents, expected)
    images = torch.cat([pipeline.decode(part) for part in latents.split(2)])
    whole = pipeline(3, generators(1, 2, 3), 4, output_type="pt").images
    torch.testing.assert_close(images / 2 + 0.5, whole, atol=1e-5, rtol=0)


def test_nearest_codes_are_those_of_training(pipeline):
    latents = torch.randn(2, 4, 8, 8)
    codes = pipeline.vqvae.quantize.embedding.weight
    expected = (
        codes[nearest_codes(latents.movedim(1, -1).reshape(-1, 4), codes)]
        .reshape(2, 8, 8, 4)
        .movedim(-1, 1)
    )
    assert torch.equal(pipeline._quantise(latents, codes), expected)
    distances = (latents.movedim(1, -1)[..., None, :] - codes).norm(dim=-1)  # the slow twin
    assert torch.equal(expected, codes[distances.argmin(-1)].movedim(-1, 1))


def test_codes_stay_float32_when_the_models_are_rounded(pipeline, tmp_path):
    """Two codes that are one in bfloat16: the search still tells them apart, by either road to the
    narrower type.
    """
    near = torch.tensor([[1.0, 1, 1, 1], [1.001, 1.001, 1.001, 1.001]])
    assert torch.equal(near[0].bfloat16(), near[1].bfloat16())
    with torch.no_grad():
        pipeline.vqvae.quantize.embedding.weight.mul_(100)[:2] = near
    pipeline.save_pretrained(tmp_path)
    latents = near.view(2, 4, 1, 1).expand(2, 4, 8, 8)
    expected = pipeline._quantise(latents, pipeline._find_codes())
    assert torch.equal(expected, latents)
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for pipe in (pipeline.to(torch.bfloat16).to("cpu"), loaded):
        assert pipe.vqvae.quantize.embedding.weight.dtype == pipe.unet.dtype == torch.bfloat16
        assert torch.equal(pipe._quantise(latents, pipe._find_codes()), expected)
    with torch.no_grad():
        loaded.vqvae.quantize.embedding.weight.zero_()  # other codes: the kept ones are out of date
    assert not loaded._find_codes().any()
    assert not pipeline.to(torch.float32)._find_codes().isnan().any()


# ---------------------------------------------------------------- components of our own


def test_own_components_come_back_without_running_the_folders_code(own, tmp_path):
    expected = own(2, generators(0, 1), output_type="np").images
    own.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["em_unet2d_model", "EMUNet2DModel"]
    assert index["vqvae"] == ["diffusers", "AutoencoderKL"]
    for path in (tmp_path / "pipeline_em_ldm.py", tmp_path / "unet" / "em_unet2d_model.py"):
        assert path.exists()
        path.write_text("raise SystemExit('the code of the folder ran')")
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is EMUNet2DModel
    assert type(loaded.vqvae) is AutoencoderKL
    assert loaded.config.default_num_inference_steps == 3
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(loaded(2, generators(0, 1), output_type="np").images, expected)
    given = EMLatentDiffusionPipeline.from_pretrained(tmp_path, unet=own.unet, dtype=torch.bfloat16)
    assert given.unet is own.unet
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        ["os", "system"],
        ["em_unknown", "EMUNet2DModel"],
        ["em_unet2d_model", "Attention"],
        ["em_unet2d_model", "torch"],
    ],
)
def test_unknown_components_are_refused_and_not_imported(own, tmp_path, entry):
    own.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "unet": entry}))
    with pytest.raises(ValueError, match=rf"holds the unet {entry[0]}\.{entry[1]}"):
        EMLatentDiffusionPipeline.from_pretrained(tmp_path)


def test_a_stranger_loads_own_components(own, tmp_path):
    own.scheduler = FlowMatchEulerDiscreteScheduler()
    own.register_modules(grain=make_grain())
    own.save_pretrained(tmp_path / "saved")
    (tmp_path / "load_elsewhere.py").write_text(
        Path(__file__).with_name("load_elsewhere.py").read_text()
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    # -S and a path of the site-packages alone: an editable install of our packages stays out of
    # sight
    packages = [path for path in sys.path if path.endswith("site-packages")]
    program = (
        f"import sys, runpy; sys.path += {packages!r}; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0])"
    )
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        program,
        "load_elsewhere.py",
        str(tmp_path / "saved"),
        str(tmp_path),
    ]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    expected = own(2, generators(0, 1), output_type="np").images
    for name in ("first", "again"):
        np.testing.assert_allclose(np.load(tmp_path / f"images_{name}.npy"), expected, atol=1e-6)
    for file in ("unet/em_unet2d_model.py", "grain/em_grain.py"):
        assert (tmp_path / "again" / file).read_text() == (tmp_path / "saved" / file).read_text()


# ---------------------------------------------------------------- grain


def test_grain_is_added_to_decoded_images_and_can_be_left_out(own):
    plain = own(3, generators(0, 1, 2), output_type="pt").images
    own.register_modules(grain=make_grain())
    assert torch.equal(own(3, generators(0, 1, 2), output_type="pt", add_grain=False).images, plain)
    grainy = own(3, generators(0, 1, 2), output_type="pt").images
    assert 0.02 < (grainy - plain).std() < 0.2
    assert grainy.min() >= 0
    assert grainy.max() <= 1
    latents = own(3, generators(0, 1, 2), output_type="latent").images
    after = generators(0, 1, 2)
    own.denoise(3, after)  # the grain goes on where the denoising left the generators
    torch.testing.assert_close(own.decode(latents, after) / 2 + 0.5, grainy)
    torch.testing.assert_close(
        own(1, generators(1), output_type="pt").images, grainy[1:2], atol=1e-5, rtol=0
    )


def test_a_pipeline_keeps_its_grain_or_that_it_has_none(own, tmp_path):
    own.save_pretrained(tmp_path / "without")
    assert EMLatentDiffusionPipeline.from_pretrained(tmp_path / "without").grain is None
    index = json.loads((tmp_path / "without" / "model_index.json").read_text())
    del index["grain"]  # as versions wrote it that knew no grain
    (tmp_path / "without" / "model_index.json").write_text(json.dumps(index))
    assert EMLatentDiffusionPipeline.from_pretrained(tmp_path / "without").grain is None
    own.register_modules(grain=make_grain())
    own.save_pretrained(tmp_path / "with")
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path / "with")
    assert all(
        torch.equal(value, own.grain.state_dict()[key])
        for key, value in loaded.grain.state_dict().items()
    )
    narrow = EMLatentDiffusionPipeline.from_pretrained(tmp_path / "with", dtype=torch.bfloat16)
    narrow.set_progress_bar_config(disable=True)
    images = narrow(2, generators(0, 1), output_type="pt").images
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert EMLatentDiffusionPipeline.from_pipe(loaded).grain is loaded.grain


# ---------------------------------------------------------------- samplers


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_steps_are_even_and_end_at_the_latents(pipeline, num_steps, cls, shift):
    """dx/ds = (x - point) / s has straight paths: every solver arrives exactly, if its timesteps
    are 1000 s and its last is not wasted.
    """
    point = torch.randn(1, 4, 8, 8)
    unet = StraightVelocity(pipeline.unet, point)
    pipeline.register_modules(unet=UNet2DModel.from_config(pipeline.unet.config))
    pipeline.unet.forward = unet.forward
    pipeline.scheduler = cls(shift=shift)
    for _ in range(2):  # set_timesteps leaves nothing behind
        unet.seen.clear()
        latents = pipeline.denoise(2, generators(0, 1), num_steps)
        torch.testing.assert_close(
            pipeline.normalise_latents(latents), point.expand(2, -1, -1, -1), atol=1e-4, rtol=1e-4
        )
    even = [1 - i / num_steps for i in range(num_steps)]
    shifted = [1000 * shift * s / (1 + (shift - 1) * s) for s in even]
    evaluations = [
        shifted[0],
        *[s for s in shifted[1:] for _ in range(2 if "Heun" in cls.__name__ else 1)],
    ]
    np.testing.assert_allclose(unet.seen, evaluations, rtol=1e-5)


@pytest.mark.parametrize("flow", [False, True])
def test_all_samplers_find_the_exact_answer_where_it_is_known(pipeline, flow):
    """Latents of one Gaussian: the best prediction is linear in x, and the image is mean +
    deviation * noise.
    """
    base = FlowMatchEulerDiscreteScheduler() if flow else pipeline.scheduler
    mean, std = 0.7, 0.4
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def answer(x, timestep):
        t = torch.as_tensor(float(timestep))
        if flow:
            a, b = 1 - t / 1000, t / 1000
        else:  # between the timesteps that were trained, where solvers put some
            level = torch.tensor(
                np.interp(
                    t.numpy(), np.arange(1000), (1 / base.alphas_cumprod - 1).sqrt().log().numpy()
                )
            )
            a, b = 1 / (1 + (2 * level).exp()).sqrt(), level.exp() / (1 + (2 * level).exp()).sqrt()
        centred = (x - a * mean) / (a**2 * std**2 + b**2)
        predicted_noise, predicted_latents = b * centred, mean + a * std**2 * centred
        output = predicted_noise - predicted_latents if flow else predicted_noise
        return type("Output", (), {"sample": output.float()})

    pipeline.unet.forward = answer
    names = [name for name in list_samplers(base) if name not in ("ddpm", "dpm-solver++-sde")]
    assert len(names) == (4 if flow else 7)
    for name in names:
        pipeline.scheduler = create_sampler(name, base)
        assert is_flow(pipeline.scheduler) == flow
        errors = []
        for num_steps in (10, 40):
            latents = pipeline.normalise_latents(
                pipeline.denoise(2, latents=noise, num_inference_steps=num_steps)
            )
            errors.append(float((latents - (mean + std * noise)).square().mean().sqrt() / std))
        # evenly spaced timesteps leave much noise to the last step, whatever the order; Karras's
        # and those of flow do not
        assert errors[1] < (0.05 if flow or name.endswith("karras") else 0.16), (name, errors)
        assert errors[1] < 0.5 * errors[0], (name, errors)


def test_samplers_keep_the_models_noise_schedule(pipeline):
    base = pipeline.scheduler
    for name in list_samplers(base):
        sampler = create_sampler(name, create_sampler("dpm-solver++-karras", base))
        torch.testing.assert_close(sampler.alphas_cumprod, base.alphas_cumprod)
        assert sampler.config.prediction_type == base.config.prediction_type
        assert sampler.config.get("use_karras_sigmas", False) == name.endswith("karras")
        sampler.set_timesteps(10)
        assert float(sampler.timesteps[0]) == 999
    flow = create_sampler("unipc", FlowMatchEulerDiscreteScheduler(shift=2.0))
    assert flow.config.flow_shift == create_sampler("flow-heun", flow).config.shift == 2.0


def test_unsuitable_samplers_are_refused(pipeline):
    with pytest.raises(ValueError, match="there is no sampler magic; choose ddim"):
        create_sampler("magic", pipeline.scheduler)
    with pytest.raises(ValueError, match="flow-euler is not for a model of diffusion"):
        create_sampler("flow-euler", pipeline.scheduler)
    with pytest.raises(
        ValueError, match="ddim is not for a model of flow matching; choose dpm-solver"
    ):
        create_sampler("ddim", FlowMatchEulerDiscreteScheduler())
    zero = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=True
    )
    with pytest.raises(ValueError, match="zero terminal"):
        create_sampler("heun", zero)
    assert create_sampler("dpm-solver++", zero).config.rescale_betas_zero_snr
    with pytest.raises(ValueError, match="at least 1"):
        pipeline.denoise(num_inference_steps=0)


@pytest.mark.parametrize("name", ["ddpm", "dpm-solver++-sde"])
def test_noisy_samplers_honour_each_images_generator(pipeline, name):
    pipeline.scheduler = create_sampler(name, pipeline.scheduler)
    batch = pipeline.denoise(2, generators(1, 2), 4)
    torch.testing.assert_close(
        pipeline.denoise(1, generators(2), 4), batch[1:], rtol=1e-4, atol=1e-4
    )
    noise = torch.randn(2, 4, 8, 8)
    runs = [
        pipeline.denoise(2, generators(*seeds), 4, latents=noise)
        for seeds in ((1, 2), (1, 2), (1, 3))
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(
        runs[0][1], runs[2][1]
    )  # the noise of the steps, too, is the generator's


def test_a_scheduler_that_knows_seeds_only_gets_one_of_each_generator(pipeline):
    """As DPMSolverSDEScheduler, whose own package (torchsde) is not needed to see what it is
    told.
    """
    scheduler = pipeline.scheduler
    scheduler.noise_sampler_seed, scheduler.noise_sampler, seen = 5, "used up", []
    step = scheduler.step
    scheduler.step = lambda *a, **k: (
        seen.append((scheduler.noise_sampler_seed, scheduler.noise_sampler)) or step(*a, **k)
    )
    pipeline.denoise(2, generators(1, 2), 1)
    pipeline.denoise(1, generators(2), 1)
    pipeline.denoise(2, generators(1)[0], 1)
    pipeline.denoise(1, None, 1)
    (pair, sampler), (single, _), (shared, _), (nothing, _) = seen
    assert sampler is None
    assert len({*pair}) == len({*shared}) == 2
    assert single == [pair[1]]
    assert nothing is None


def test_the_default_is_stored_in_the_pipeline(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    before = copy.deepcopy(pipeline.unet.state_dict())
    store_default_sampler(tmp_path, "dpm-solver++-karras", 7)
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler).__name__ == SAMPLERS["dpm-solver++-karras"].scheduler
    assert loaded.scheduler.config.use_karras_sigmas
    assert loaded.config.default_num_inference_steps == 7
    assert all(torch.equal(before[name], value) for name, value in loaded.unet.state_dict().items())
    steps = []
    loaded(output_type="latent", callback_on_step_end=lambda p, i, t, x: steps.append(i))
    assert steps == list(range(7))
    pipeline.scheduler = create_sampler("dpm-solver++-karras", pipeline.scheduler)
    assert torch.equal(pipeline.denoise(1, generators(0), 7), loaded.denoise(1, generators(0)))
