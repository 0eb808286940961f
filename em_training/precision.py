"""What number format to compute in, and the Accelerator that knows it."""

from datetime import timedelta

import accelerate
import torch
from accelerate.utils import parse_flag_from_env

PROCESS_TIMEOUT = timedelta(
    days=1
)  # other processes wait while the main one cuts tiles, encodes latents or evaluates


def default_precision() -> str:
    """Return "bf16" where the hardware multiplies bfloat16 natively (CUDA of compute capability 8 on, CPUs with AMX), else "no"."""
    if not use_cpu() and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "bf16" if has_amx() else "no"


def use_cpu() -> bool:
    """Say whether to compute on the CPU: no accelerator is there, or ACCELERATE_USE_CPU asks for it.

    Accelerate must be told, or several CPU processes started by torchrun each believe to be alone.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def create_process_state() -> accelerate.PartialState:
    """Return this process's place among the processes that torchrun or `accelerate launch` started; alone otherwise."""
    return accelerate.PartialState(cpu=use_cpu(), timeout=PROCESS_TIMEOUT)


def leave_processes() -> None:
    """Leave the group of processes, if this one is in any: the last thing that a command does when all went well.

    Without it Gloo's threads may drop their last tensors while the interpreter ends, and a finished process aborts ("terminate called
    without an active exception"; https://github.com/pytorch/pytorch/pull/179291). After an error it could wait for the others for ever.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def create_accelerator(out_dir, precision: str = "auto") -> accelerate.Accelerator:
    """Return an Accelerator that logs to TensorBoard under `out_dir`/tensorboard.

    precision: "auto" (`default_precision`), "bf16", "fp16" or "no" (float32). What `accelerate launch --mixed_precision` says is overruled
    by any value but "auto", since the value is part of the run's configuration.
    """
    if precision not in ("auto", "bf16", "fp16", "no"):
        raise ValueError(f"precision '{precision}' is unknown; choose auto, bf16, fp16 or no")
    if precision == "fp16" and use_cpu():
        raise ValueError("precision fp16 needs a GPU; choose bf16, no (float32) or auto on the CPU")
    configuration = accelerate.utils.ProjectConfiguration(
        project_dir=str(out_dir), logging_dir=str(out_dir) + "/tensorboard"
    )
    return accelerate.Accelerator(
        cpu=use_cpu(),
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        mixed_precision=default_precision() if precision == "auto" else precision,
        log_with="tensorboard",
        project_config=configuration,
    )


def scaler_state(accelerator) -> dict:
    """Return {"scaler": the scaler of the loss}, a part of the checkpoint in fp16, or nothing in other precisions."""
    return {} if accelerator.scaler is None else {"scaler": accelerator.scaler}


def step_optimizer(accelerator, optimizer, parameters, max_grad_norm: float | None = None) -> dict:
    """Clip the gradients that the backward pass left to a norm of `max_grad_norm` (None: do not), step, drop them; return what to log.

    In fp16 the loss was scaled: gradients are brought back to scale before they are clipped, and a step whose gradients overflowed
    is skipped, after which the scale is halved. `gradient_norm` is then 0 in the log and `skipped_steps` says how many there were;
    in other precisions a norm that is not finite is logged as it is, and ends the run.
    """
    scaler = accelerator.scaler
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in parameters if parameter.grad is not None]
    )
    # asking a GPU would wait for it
    if max_grad_norm is not None and (
        norm.device.type != "cpu" or not norm + 1e-6 <= max_grad_norm
    ):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    if scaler is None:
        return {"gradient_norm": norm}
    is_finite = torch.isfinite(norm)
    return {
        "gradient_norm": torch.where(is_finite, norm, 0.0),
        "skipped_steps": 1.0 - is_finite.float(),
    }
