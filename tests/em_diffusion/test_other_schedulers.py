"""Every scheduler of diffusers on our models: a proper result, or a sentence."""

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.import_utils import is_torchsde_available

from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_diffusion.samplers import choose_default_sampler
from support.models import make_ldm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and numpy 2

SCHEDULERS = sorted(
    name for name in dir(diffusers) if name.endswith("Scheduler") and hasattr(diffusers, name)
)
NEED_TORCHSDE = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
WORK = {  # beside the compatible ones
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}
FLOW_WORK = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}


def make_pipeline(flow, num_steps=20):
    """A pipeline whose denoiser knows the exact answer for latents of N(0, 1)."""
    pipe = make_ldm()
    base = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(clip_sample=False)
    scheduler, _ = choose_default_sampler(base)
    pipe = EMLatentDiffusionPipeline(
        pipe.vqvae, pipe.unet, scheduler, default_num_inference_steps=num_steps
    )
    pipe.set_progress_bar_config(disable=True)

    def forward(x, timestep):
        if flow:
            sigma = timestep.float() / 1000
            answer = (2 * sigma - 1) / (sigma**2 + (1 - sigma) ** 2) * x
        else:
            step = int(timestep.float().round().clamp(0, 999))
            answer = (1 - base.alphas_cumprod[step]).sqrt() * x
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=answer)

    pipe.unet.forward = forward
    return pipe


def measure(pipe, num_images=48):
    """The deviation of latents in the denoiser's scale; 1 is exact."""
    rngs = [torch.Generator().manual_seed(seed) for seed in range(num_images)]
    return pipe.normalise_latents(pipe.denoise(num_images, rngs)).std().item()


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_scheduler_works_or_says_why_not(name, flow):
    if name in NEED_TORCHSDE and not is_torchsde_available():
        pytest.skip("needs torchsde")
    pipe = make_pipeline(flow)
    compatible = {cls.__name__ for cls in DDIMScheduler().compatibles} - {"EDMEulerScheduler"}
    works = FLOW_WORK if flow else WORK | compatible
    cls = getattr(diffusers, name)
    required = {"AmusedScheduler", "VQDiffusionScheduler", "RFD4ProteinaScheduler"}
    refused_by_diffusers = {"UnCLIPScheduler": ValueError} | dict.fromkeys(required, TypeError)
    if name in refused_by_diffusers and not (flow and name == "UnCLIPScheduler"):
        with pytest.raises(refused_by_diffusers[name], match=r"beta_schedule|required positional"):
            cls.from_config(pipe.scheduler.config)
        return
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    if name in works:
        assert measure(pipe) == pytest.approx(1, abs=0.17)  # of 20 steps; DDPM is the farthest
    else:
        with pytest.raises(ValueError, match=f"{name} is (not set up|made for other)"):
            measure(pipe)


def test_the_default_algorithm_survives_where_it_exists(tmp_path):
    pipe = make_pipeline(False)
    assert pipe.scheduler.config.algorithm_type == "sde-dpmsolver++"
    expected = measure(pipe)
    pipe.save_pretrained(tmp_path)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.algorithm_type == "sde-dpmsolver++"
    assert measure(pipe) == expected
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.algorithm_type == "sde-dpmsolver++"
    deis = diffusers.DEISMultistepScheduler.from_config(loaded.scheduler.config)
    assert deis.config.algorithm_type == "deis"
    loaded.scheduler = deis
    other = DPMSolverMultistepScheduler.from_config(
        loaded.scheduler.config, algorithm_type="dpmsolver++"
    )
    loaded.scheduler = other
    assert loaded.scheduler.config.algorithm_type == "dpmsolver++"


def test_others_do_not_take_their_own_noise_schedule():
    pipe = make_pipeline(False)
    pipe.scheduler = DDIMScheduler(clip_sample=False)  # all of its schedule by default
    config = diffusers.TCDScheduler.from_config(pipe.scheduler.config).config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.0001, 0.02, "linear")
