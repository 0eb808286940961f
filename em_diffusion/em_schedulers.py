"""Which schedulers suit a model, and how one replaces another. A part of the published pipeline."""

from diffusers import ConfigMixin, DPMSolverMultistepScheduler

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# parts of the names of diffusers' schedulers for other models or tasks
OTHER_SCHEDULERS = ("LCM", "Inverse", "CogVideoX", "UnCLIP", "RePaint", "Wuerstchen")


def is_flow(scheduler) -> bool:
    """Return True if the model of `scheduler` was trained by flow matching.

    Its path is x = (1 - s) latents + s noise, and the U-Net predicts noise - latents.
    """
    by_class = type(scheduler).__name__.startswith("FlowMatch")
    return by_class or bool(scheduler.config.get("use_flow_sigmas"))


def make_exchangeable(scheduler):
    """Let `OtherScheduler.from_config(scheduler.config)` give a scheduler that suits the model.

    diffusers ignores entries that are listed in `_use_default_values`. An `algorithm_type` of
    stochastic DPM-Solvers, which others refuse, is listed there; a DPM-Solver that was made with
    the default gets it back. The noise schedule is not listed, since others' defaults differ.
    Entries with an underscore pass through any class.
    """
    if not isinstance(scheduler, ConfigMixin):
        return
    config = scheduler.config
    defaults = set(config.get("_use_default_values", ()))
    kept = {"_em_is_flow": config.get("_em_is_flow", is_flow(scheduler))}
    algorithm = config.get("algorithm_type")
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        if "algorithm_type" in defaults:
            algorithm = config.get("_em_algorithm_type", algorithm)
        kept |= {"algorithm_type": algorithm, "_em_algorithm_type": algorithm}
        defaults = {*defaults, "algorithm_type"} if algorithm.startswith("sde") else defaults
    defaults -= {"beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
    scheduler.register_to_config(**kept, _use_default_values=sorted(defaults))


def refuse_unsuitable(scheduler):
    """Raise `ValueError` for a scheduler of diffusers that cannot sample from the model."""
    name = type(scheduler).__name__
    if not type(scheduler).__module__.startswith("diffusers."):
        return
    needs_flow = scheduler.config.get("_em_is_flow", False)
    known = FLOW_SCHEDULERS if needs_flow else ("DDIMScheduler", "DPMSolverMultistepScheduler")
    known = " or ".join(known)
    if needs_flow != is_flow(scheduler):
        kind = "flow matching" if needs_flow else "diffusion"
        raise ValueError(f"{name} is not set up for a model of {kind}. Use {known}.")
    is_known = name in FLOW_SCHEDULERS or hasattr(scheduler, "alphas_cumprod")
    if not is_known or any(part in name for part in OTHER_SCHEDULERS):
        raise ValueError(f"{name} is made for other models or tasks. Use {known}.")
