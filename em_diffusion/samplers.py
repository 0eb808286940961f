"""Samplers by name: diffusers' schedulers, set up for latents of unit deviation and few steps.

Some of diffusers' defaults do not suit latents. Clipping to [-1, 1] is for pixels. "linspace" and
"leading" spacing start below the noisiest timestep that was trained, or end above the cleanest. All
samplers here start at the last timestep ("trailing"), end without noise ("zero" final sigma), and
take the last step at first order, because a higher one divides by that zero.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers

from em_data.files import write_atomically
from em_diffusion.em_schedulers import is_flow

# keys of a scheduler's config that belong to the trained model
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@dataclass(frozen=True)
class Sampler:
    """A scheduler class of diffusers with its options; None where it does not suit the model."""

    scheduler: str
    diffusion: dict | None
    flow: dict | None = None
    evaluations_per_step: int = 1


SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", {}),
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
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
    "final_sigmas_type": "zero",
    "lower_order_final": True,
}
# By `is_flow`. The kinds were chosen by benchmarks/sampler_sweep.py on runs of the preset demo. The
# steps are on the safe side: on latents of 8 x 8 the fewer steps of those sweeps (6 and 4) lost
# nothing, on latents of 16 x 16 they lose a third of the contrast.
DEFAULT_SAMPLERS = {False: ("dpm-solver++-sde", 20), True: ("flow-euler", 20)}


def list_samplers(scheduler) -> list[str]:
    """Return the names of the samplers that suit the model of `scheduler`."""
    return [
        name
        for name, sampler in SAMPLERS.items()
        if (sampler.flow if is_flow(scheduler) else sampler.diffusion) is not None
    ]


def create_sampler(name: str, scheduler):
    """Create the sampler `name` for the model whose pipeline has `scheduler`.

    It keeps the noise schedule and the prediction type. Its config also holds the options of
    `COMMON` that its class does not know, so that `OtherScheduler.from_config(scheduler.config)`
    takes them instead of its own defaults.

    Raises:
        ValueError: For an unknown name, a sampler that does not suit the model (diffusion or flow
            matching), or one that cannot start at a zero terminal signal-to-noise ratio when the
            model was trained with it.
    """
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler {name}; choose {', '.join(SAMPLERS)}")
    flow, entry = is_flow(scheduler), SAMPLERS[name]
    options = entry.flow if flow else entry.diffusion
    if options is None:
        kind = "flow matching" if flow else "diffusion"
        raise ValueError(
            f"{name} is not for a model of {kind}; choose {', '.join(list_samplers(scheduler))}"
        )
    cls = getattr(diffusers, entry.scheduler)
    known = _list_options(cls)
    if flow:
        config = {"num_train_timesteps": scheduler.config.num_train_timesteps}
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
        config |= {key: shift for key in ("shift", "flow_shift") if key in known}
    else:
        config = {key: scheduler.config[key] for key in NOISE_SCHEDULE if key in scheduler.config}
        if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
            raise ValueError(
                f"{name} cannot start at a zero terminal signal-to-noise ratio; choose another one"
            )
    values = COMMON | config | options
    sampler = cls(**{key: value for key, value in values.items() if key in known})
    if not flow:
        sampler.register_to_config(**{k: v for k, v in COMMON.items() if k not in known})
    return sampler


def choose_default_sampler(scheduler) -> tuple:
    """Return (scheduler, number of steps) that a model is saved with; see `DEFAULT_SAMPLERS`."""
    name, num_steps = DEFAULT_SAMPLERS[is_flow(scheduler)]
    return create_sampler(name, scheduler), num_steps


def store_default_sampler(pipeline_folder, name: str, num_steps: int) -> None:
    """Make the sampler `name` with `num_steps` steps the default of a saved pipeline."""
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
