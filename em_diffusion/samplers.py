"""Samplers by name: diffusers' schedulers, set up for latents of unit deviation and for few steps.

What diffusers assumes is wrong here: clipping to [-1, 1] is for pixels; "linspace" and "leading" spacing begin below the
noisiest timestep that was trained, or end above the cleanest. All start at the last timestep ("trailing"), end at no noise at
all ("zero" final sigma), and take the last step at first order, since a higher one divides by that zero.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers

from em_data.files import write_atomically

# of a scheduler's config, what the model was trained for
NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@dataclass(frozen=True)
class Sampler:
    """A scheduler by its class in diffusers, with its options for diffusion and for flow matching; None: not for such models."""

    scheduler: str
    diffusion: dict | None
    flow: dict | None = None
    evaluations_per_step: int = 1


SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", {"set_alpha_to_one": True}),
    "ddpm": Sampler("DDPMScheduler", {}),
    "dpm-solver++": Sampler("DPMSolverMultistepScheduler", {}, FLOW_SIGMAS),
    "dpm-solver++-karras": Sampler("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm-solver++-sde": Sampler(
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}
    ),
    "unipc": Sampler("UniPCMultistepScheduler", {}, FLOW_SIGMAS),
    "unipc-karras": Sampler("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": Sampler("EulerDiscreteScheduler", {}),
    "heun": Sampler("HeunDiscreteScheduler", {}, evaluations_per_step=2),
    "flow-euler": Sampler("FlowMatchEulerDiscreteScheduler", None, {}),
    "flow-heun": Sampler("FlowMatchHeunDiscreteScheduler", None, {}, evaluations_per_step=2),
}
COMMON = {
    "clip_sample": False,
    "timestep_spacing": "trailing",
    "final_sigmas_type": "zero",
    "lower_order_final": True,
}
# by `is_flow`. Diffusion: by benchmarks/sampler_sweep.py on a run of the preset demo, 300 images: of the points with 6 steps, all as good
# as DDIM with 200 at 23 times the images/s, the nearest: Frechet distance 242 [221, 264] against 257 [233, 283].
# Flow matching: the same on such a run with prediction_type flow, 400 images, from 4 steps on: 263 [236, 291] against 285 [255, 315] of
# Euler with 200, at 28 times its images/s. With 2 steps the distance passes as well, but faint defects fade. Another model wants its
# own sweep.
DEFAULT_SAMPLERS = {False: ("dpm-solver++-sde", 6), True: ("flow-euler", 4)}


def is_flow(scheduler) -> bool:
    """Say whether a scheduler is for flow matching: x = (1 - s) latents + s noise, and the U-Net answers noise - latents."""
    return type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get(
        "use_flow_sigmas", False
    )


def list_samplers(scheduler) -> list[str]:
    """Return the names of the samplers that suit the model of `scheduler`."""
    return [
        name
        for name, sampler in SAMPLERS.items()
        if (sampler.flow if is_flow(scheduler) else sampler.diffusion) is not None
    ]


def create_sampler(name: str, scheduler):
    """Return the sampler `name` for the model whose pipeline has `scheduler`: the same noise schedule and prediction, another solver.

    `ValueError` for an unknown name, for one that does not suit the model (diffusion or flow matching), and for a solver that
    cannot start at a zero terminal signal-to-noise ratio when the model was trained with it.
    """
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler {name}; choose {', '.join(SAMPLERS)}")
    flow, sampler = is_flow(scheduler), SAMPLERS[name]
    options = sampler.flow if flow else sampler.diffusion
    if options is None:
        kind = "flow matching" if flow else "diffusion"
        raise ValueError(
            f"{name} is not for a model of {kind}; choose {', '.join(list_samplers(scheduler))}"
        )
    cls = getattr(diffusers, sampler.scheduler)
    known = _list_options(cls)
    if flow:
        config = {"num_train_timesteps": scheduler.config.num_train_timesteps}
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
        config |= {key: shift for key in ("shift", "flow_shift") if key in known}
    else:
        config = {key: scheduler.config[key] for key in NOISE_SCHEDULE if key in scheduler.config}
        if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
            raise ValueError(
                f"{name} cannot start at a zero terminal signal-to-noise ratio; choose another sampler"
            )
    values = {key: value for key, value in (COMMON | config | options).items() if key in known}
    return cls(**values)


def choose_default_sampler(scheduler) -> tuple:
    """Return (scheduler, number of steps) that a model is saved with, for what it was trained with: see `DEFAULT_SAMPLERS`."""
    name, num_steps = DEFAULT_SAMPLERS[is_flow(scheduler)]
    return create_sampler(name, scheduler), num_steps


def store_default_sampler(pipeline_folder, name: str, num_steps: int) -> None:
    """Make the sampler `name` with `num_steps` steps the default of a saved pipeline; its weights stay untouched."""
    folder = Path(pipeline_folder)
    index = json.loads((folder / "model_index.json").read_text())
    cls = getattr(diffusers, index["scheduler"][1])
    scheduler = create_sampler(name, cls.from_pretrained(folder, subfolder="scheduler"))
    scheduler.save_pretrained(folder / "scheduler")
    index |= {
        "scheduler": ["diffusers", type(scheduler).__name__],
        "default_num_inference_steps": num_steps,
    }
    write_atomically(
        folder / "model_index.json", json.dumps(index, indent=2, sort_keys=True) + "\n"
    )


def _list_options(cls) -> set[str]:
    return set(cls._get_init_keys(cls)) - {"self"}
