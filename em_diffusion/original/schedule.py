"""Turn the noise schedule of a latent diffusion model into a scheduler with the same steps."""

import math

import numpy as np
from diffusers import DDIMScheduler

from em_diffusion.original.config import count, number

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": None, "sqrt": None}
"""Name of the original schedule -> diffusers' name; None if diffusers has none."""
STORED_SCHEDULE_TOLERANCE = 1e-5


def read_schedule(params) -> dict:
    """Return the arguments of `create_scheduler` for the diffusion model of a yaml."""
    prediction, name = params.get("parameterization", "eps"), params.get("beta_schedule", "linear")
    if prediction not in PREDICTION_TYPES:
        raise ValueError(
            f"parameterization is {prediction!r}; known are {', '.join(PREDICTION_TYPES)}"
        )
    if name not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule is {name!r}; known are {', '.join(BETA_SCHEDULES)}")
    return {
        "timesteps": count({"timesteps": params.get("timesteps", 1000)}, "timesteps"),
        "beta_schedule": name,
        "start": number(params, "linear_start", 1e-4),
        "end": number(params, "linear_end", 2e-2),
        "cosine_s": number(params, "cosine_s", 8e-3),
        "prediction_type": PREDICTION_TYPES[prediction],
    }


def create_scheduler(
    timesteps, beta_schedule, start, end, cosine_s, prediction_type, stored_betas=None
) -> DDIMScheduler:
    """Create the noise schedule as DDIM with the original's spacing of steps.

    n of T steps are every T / n-th from 1 on, and the last one leads to the noise of the first
    timestep.

    Args:
        stored_betas: Those of the checkpoint, float [timesteps], which replace the yaml's; None if
            it holds none.
    """
    betas = compute_betas(timesteps, beta_schedule, start, end, cosine_s)
    name = BETA_SCHEDULES[beta_schedule]
    if stored_betas is not None:
        stored = stored_betas.double().numpy()
        if stored.shape != betas.shape:
            raise ValueError(
                f"the checkpoint's noise schedule has {stored.size} steps, the yaml's "
                f"{betas.size}: it is the yaml of another model; name the right one with --config."
            )
        if not ((stored > 0) & (stored < 1)).all():
            raise ValueError(
                "the checkpoint's noise schedule holds numbers outside of (0, 1): the file is "
                "damaged."
            )
        if not np.allclose(stored, betas, rtol=STORED_SCHEDULE_TOLERANCE, atol=0):
            betas, name = stored, None
    arguments = {"trained_betas": betas.tolist()}
    if name is not None:
        arguments = {"beta_schedule": name, "beta_start": start, "beta_end": end}
    return DDIMScheduler(
        num_train_timesteps=timesteps,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
        **arguments,
    )


def compute_betas(timesteps, beta_schedule, start, end, cosine_s):
    """Return the variance that each step adds, float64 [timesteps].

    "linear" is linear in the square root of beta (diffusers' "scaled_linear"), "sqrt_linear" in
    beta, "sqrt" in its square; "cosine" is Nichol and Dhariwal's (2021, arXiv:2102.09672, equation
    17).
    """
    if beta_schedule == "linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), timesteps) ** 2
    if beta_schedule == "cosine":
        steps = np.arange(timesteps + 1) / timesteps + cosine_s
        signal = np.cos(steps / (1 + cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - signal[1:] / signal[:-1], 0, 0.999)
    betas = np.linspace(start, end, timesteps)
    return np.sqrt(betas) if beta_schedule == "sqrt" else betas
