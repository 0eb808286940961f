import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
    VQModel,
)

from em_data import to_uint8
from em_diffusion import EMLatentDiffusionPipeline
from em_diffusion.denoiser import load_denoiser
from em_diffusion.em_unet2d_model import EMUNet2DModel
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.samplers import choose_default_sampler

numpy_2_in_diffusers = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def ddim_by_hand(pipeline, noise, num_steps, eta, step_noises):
    """DDIM (Song et al. 2021, equation 12) in float64, from the betas up."""
    config = pipeline.scheduler.config
    betas = (
        torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float32) ** 2
    )
    abar = torch.cumprod(1 - betas.double(), 0)
    stride = 1000 // num_steps
    x = noise.double()
    for i in range(num_steps):
        t = 999 - i * stride
        a, a_before = (
            abar[t],
            abar[t - stride] if t >= stride else torch.tensor(1.0, dtype=torch.float64),
        )
        with torch.no_grad():
            e = pipeline.unet(x.float(), t).sample.double()
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        sigma = eta * ((1 - a_before) / (1 - a) * (1 - a / a_before)).sqrt()
        x = (
            a_before.sqrt() * x0
            + (1 - a_before - sigma**2).clamp(min=0).sqrt() * e
            + sigma * step_noises[i].double()
        )
    return x


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_the_formula_in_float64(pipeline, eta):
    shape = (2, 4, 8, 8)
    pair = generators(3, 4)
    draw = lambda: torch.cat([torch.randn(1, *shape[1:], generator=g) for g in pair])  # noqa: E731
    noise = draw()
    step_noises = [draw() for _ in range(10)]
    expected = ddim_by_hand(pipeline, noise, 10, eta, step_noises)
    latents = pipeline(
        2, generators(3, 4), num_inference_steps=10, eta=eta, output_type="latent"
    ).images
    torch.testing.assert_close(
        pipeline.normalise_latents(latents).double(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_an_image_depends_on_its_generator_alone(pipeline, eta):
    options = {"num_inference_steps": 4, "eta": eta, "output_type": "latent"}
    batch = pipeline(3, generators(5, 6, 7), **options).images
    swapped = pipeline(2, generators(7, 5), **options).images
    alone = pipeline(1, generators(6), **options).images
    single = pipeline(1, generators(6)[0], **options).images
    torch.testing.assert_close(batch[[2, 0]], swapped, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch[[1]], alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(alone, single)
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_output_types_are_one_image(pipeline):
    def run(kind):
        return pipeline(2, generators(0, 1), num_inference_steps=3, output_type=kind).images

    pt, array, pil, latents = (run(kind) for kind in ("pt", "np", "pil", "latent"))
    assert pt.shape == (2, 1, 16, 16)
    assert pt.dtype == torch.float32
    assert pt.min() >= 0
    assert pt.max() <= 1
    assert array.shape == (2, 16, 16, 1)
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [image.mode for image in pil] == ["L", "L"]
    difference = np.stack([np.asarray(image, np.int16) for image in pil]) - to_uint8(
        pt[:, 0] * 2 - 1
    )
    assert np.abs(difference).max() <= 1  # rounding at a tie
    assert np.abs(difference).mean() < 0.01
    with torch.no_grad():
        decoded = pipeline.vqvae.decode(latents).sample
    torch.testing.assert_close(pt, (decoded / 2 + 0.5).clamp(0, 1))
    assert torch.equal(
        run("pt"), pipeline(2, generators(0, 1), 3, output_type="pt", return_dict=False)[0]
    )


def test_latent_scale_is_that_of_the_autoencoders_config(pipeline):
    latents = torch.randn(2, 4, 8, 8)
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.4]), torch.tensor([0.5, 1.5, 2.0, 0.8])
    expected = latents * std.view(1, 4, 1, 1) + mean.view(1, 4, 1, 1)
    torch.testing.assert_close(pipeline.denormalise_latents(latents), expected)
    torch.testing.assert_close(pipeline.normalise_latents(expected), latents)
    pipeline.vqvae.register_to_config(latents_mean=None, latents_std=None, scaling_factor=0.5)
    torch.testing.assert_close(pipeline.denormalise_latents(latents), latents * 2)


@numpy_2_in_diffusers
@pytest.mark.parametrize(
    "scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler]
)
def test_other_schedulers_solve_the_same_equation(pipeline, scheduler):
    """The image is a function of the noise: with many steps another solver ends where DDIM ends."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ddim = pipeline(latents=noise, num_inference_steps=100, output_type="latent").images
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    other = pipeline(latents=noise, num_inference_steps=40, output_type="latent").images
    distance = (ddim - other).square().mean().sqrt() / ddim.std()
    assert distance < 0.05


@numpy_2_in_diffusers
def test_ancestral_scheduler_honours_generators_and_refuses_eta(pipeline):
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    options = {"num_inference_steps": 3, "output_type": "latent"}
    batch = pipeline(2, generators(1, 2), **options).images
    torch.testing.assert_close(
        pipeline(1, generators(2), **options).images, batch[1:], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="takes no `eta`"):
        pipeline(eta=0.5)


def test_bfloat16_is_near_float32(pipeline):
    options = {"num_inference_steps": 10, "output_type": "pt"}
    exact = pipeline(2, generators(0, 1), **options).images
    seen = []
    pipeline.to(torch.bfloat16)
    narrow = pipeline(
        2,
        generators(0, 1),
        **options,
        callback_on_step_end=lambda p, i, t, x: seen.append(x["latents"].dtype),
    ).images
    assert seen == [torch.float32] * 10
    assert narrow.dtype == torch.float32
    assert pipeline.unet.dtype == torch.bfloat16
    assert (exact - narrow).abs().mean() < 0.05
    assert (exact - narrow).abs().mean() < 0.2 * (exact - exact.flip(0)).abs().mean()


def test_callback_sees_every_step_and_its_latents_take_over(pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipeline(
        num_inference_steps=4, output_type="latent", callback_on_step_end=callback
    ).images
    assert steps == [(0, 999), (1, 749), (2, 499), (3, 249)]
    torch.testing.assert_close(latents, pipeline.denormalise_latents(torch.zeros(1, 4, 8, 8)))


def test_a_callback_can_end_the_denoising(pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        assert pipe.interrupt == (step == 1)
        return {}

    options = {"num_inference_steps": 5, "output_type": "latent", "callback_on_step_end": callback}
    interrupted = pipeline(1, generators(0), **options).images
    assert steps == [0, 1]
    assert pipeline.num_timesteps == 5
    pipeline(1, generators(0), **options)
    assert steps == [0, 1, 0, 1]  # an interruption does not last
    assert interrupted.isfinite().all()


@pytest.mark.parametrize("part", ["unet", "vqvae"])
def test_a_model_that_diverged_gives_no_image(pipeline, part):
    getattr(pipeline, part).requires_grad_(False)
    model = {"unet": pipeline.unet.conv_out, "vqvae": pipeline.vqvae.decoder.conv_out}[part]
    model.weight.fill_(float("nan"))
    name = {"unet": "latents", "vqvae": "decoded images"}[part]
    with pytest.raises(ValueError, match=f"the model diverged: its {name} are not finite"):
        pipeline(num_inference_steps=2)
    with pytest.raises(ValueError, match="the model diverged"):
        pipeline.decode(torch.full((1, 4, 8, 8), float("inf")))


def test_variants_and_pickles_are_as_diffusers_has_them(pipeline, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization is False, but pickled weights"):
        pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled").exists()
    unet = EMUNet2DModel.from_config(pipeline.unet.config)
    EMLatentDiffusionPipeline(pipeline.vqvae, unet, pipeline.scheduler).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variant=fp16"):
        EMLatentDiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    pipeline.vqvae.save_pretrained(tmp_path / "vqvae", variant="fp16")
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    assert type(loaded.unet) is EMUNet2DModel


@numpy_2_in_diffusers
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, PNDMScheduler])
def test_a_swap_of_the_saved_sampler_does_not_clip(pipeline, tmp_path, scheduler):
    """These schedulers clip by default, which is wrong for latents."""
    pipeline.scheduler, _ = choose_default_sampler(pipeline.scheduler)
    pipeline.save_pretrained(tmp_path)
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path)
    config = scheduler.from_config(loaded.scheduler.config).config
    assert not config.get("clip_sample", False)
    assert config.get("set_alpha_to_one", True)
    assert config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 2, "generator": generators(1)}, "1 generators for 2 images"),
        ({"output_type": "jpeg"}, "choose one of"),
        ({"batch_size": 0}, "at least 1"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "starts from"),
        ({"callback_on_step_end_tensor_inputs": ("noise",)}, "only latents"),
    ],
)
def test_mistakes_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_saved_folder_gives_equal_images_without_running_its_code(pipeline, tmp_path):
    expected = pipeline(2, generators(0, 1), num_inference_steps=3, output_type="np").images
    pipeline.save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "pipeline_em_ldm.py").write_text(
        "raise SystemExit('the code of the folder ran')"
    )
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is EMLatentDiffusionPipeline
    assert loaded.config.pixel_size_nm == 0.5
    np.testing.assert_array_equal(loaded(2, generators(0, 1), 3, output_type="np").images, expected)
    loaded.save_pretrained(tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "vqvae" / "config.json").read_text())
    assert stored["latents_mean"] == [0.1, -0.2, 0.3, 0.4]
    assert stored["latents_std"] == [0.5, 1.5, 2.0, 0.8]
    assert str(tmp_path) not in "".join(
        path.read_text() for path in (tmp_path / "again").rglob("*.json")
    )


def test_loaded_weights_are_aligned_in_memory(pipeline, tmp_path):
    """safetensors loads at any address, and some kernels round differently there."""

    def addresses(*models):
        tensors = [t for model in models for t in [*model.parameters(), *model.buffers()]]
        return {tensor.data_ptr() % 64 for tensor in tensors if tensor.numel()}

    pipeline.save_pretrained(tmp_path)
    unet = type(pipeline.unet).from_pretrained(tmp_path / "unet")
    assert addresses(unet) != {0}, "the test needs a file with unaligned tensors"
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    for pipe in (loaded, stock, loaded.to(torch.bfloat16)):
        assert addresses(pipe.unet, pipe.vqvae) == {0}
    loaded.unet = unet
    assert addresses(unet) == {0}
    assert addresses(load_denoiser(tmp_path / "unet")) == {0}
    assert addresses(load_autoencoder(tmp_path)) == {0}
    expected = pipeline.unet.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in unet.state_dict().items())


def test_latent_statistics_survive_a_stock_model(vqvae, tmp_path):
    vqvae.save_pretrained(tmp_path / "a")
    loaded = VQModel.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = VQModel.from_pretrained(tmp_path / "b")
    assert again.config.latents_mean == [0.1, -0.2, 0.3, 0.4]
    assert again.config.latents_std == [0.5, 1.5, 2.0, 0.8]


def test_unknown_pixel_size_stays_unknown(pipeline, tmp_path):
    parts = pipeline.vqvae, pipeline.unet, pipeline.scheduler
    pipe = EMLatentDiffusionPipeline(*parts, pixel_size_nm=None)
    pipe.save_pretrained(tmp_path)
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path)
    again = EMLatentDiffusionPipeline(**loaded.components)
    new = EMLatentDiffusionPipeline(parts[0], type(parts[1]).from_config(parts[1].config), parts[2])
    for each in (pipe, loaded, again, new):
        assert each.config.pixel_size_nm is None
        assert each.config.default_num_inference_steps == 50


def test_another_pipelines_folder_is_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(
        json.dumps({**index, "_class_name": ["pipeline_x", "OtherPipeline"]})
    )
    with pytest.raises(ValueError, match="This is a OtherPipeline"):
        EMLatentDiffusionPipeline.from_pretrained(tmp_path)


def test_code_is_not_run_without_trust(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_folder_loads_where_our_packages_are_absent(pipeline, tmp_path):
    """In an isolated process, from another folder: the same image, and the copy saved there loads
    again.
    """
    expected = pipeline(1, generators(0), num_inference_steps=3, output_type="np").images
    pipeline.save_pretrained(tmp_path / "pipe")
    program = f"""
import importlib.util, sys, warnings
import numpy as np, torch
from diffusers import DiffusionPipeline
sys.path = [p for p in sys.path if "site-packages" in p or "lib/python" in p or p.endswith(".zip")]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
assert importlib.util.find_spec("em_diffusion") is None
folder = {str(tmp_path)!r}
for name in ("pipe", "copy"):
    pipe = DiffusionPipeline.from_pretrained(folder + "/" + name, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder + "/copy")
assert type(pipe).__module__.startswith("diffusers_modules")
image = pipe(1, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images
np.save(folder + "/image.npy", image)
"""
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "ignored" not in done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "image.npy"), expected, atol=1e-6)
