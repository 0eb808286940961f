"""Number format, device and processes of a run."""

import os
from datetime import timedelta
from pathlib import Path

import accelerate
import torch
from accelerate.utils import parse_flag_from_env

# others wait while the main process cuts tiles, encodes latents or evaluates
PROCESS_TIMEOUT = timedelta(days=1)


def default_precision() -> str:
    """Return "bf16" where the hardware computes in it, else "no" (float32).

    These are CUDA devices of compute capability 8 or more, and CPUs with AMX.
    """
    if not use_cpu() and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "bf16" if has_amx() else "no"


def choose_precision(precision: str = "auto") -> str:
    """Return "bf16", "fp16" or "no"; "auto" is the launcher's, else `default_precision`.

    `accelerate launch --mixed_precision` says it in the environment.
    """
    if precision != "auto":
        return precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return launched if launched in ("bf16", "fp16") else default_precision()


def use_cpu() -> bool:
    """Say whether to compute on the CPU: without an accelerator, or with ACCELERATE_USE_CPU.

    Accelerate must be told; else several CPU processes of torchrun each believe to be alone.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def describe_device() -> str:
    """Return the device that a run will use, such as "NVIDIA H200" or "CPU, 2 threads"."""
    if use_cpu():
        num = torch.get_num_threads()
        return f"CPU, {num} thread{'' if num == 1 else 's'}"
    if not torch.cuda.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None  # else `use_cpu`
        return device.type
    count = torch.cuda.device_count()
    return torch.cuda.get_device_name() + (f" ({count} devices)" if count > 1 else "")


def create_process_state() -> accelerate.PartialState:
    """Return this process's place among those that torchrun or `accelerate launch` started."""
    return accelerate.PartialState(cpu=use_cpu(), timeout=PROCESS_TIMEOUT)


def leave_processes() -> None:
    """Leave the group of processes, if there is one: the last act of a successful command.

    Otherwise Gloo's threads may abort a finished process while the interpreter ends
    (https://github.com/pytorch/pytorch/pull/179291). After an error, leaving could wait for the
    other processes for ever.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Accelerator(accelerate.Accelerator):
    def print(self, *args, **kwargs):
        """Print from the main process alone; accelerate does so from one process of each node."""
        if self.is_main_process:
            print(*args, **kwargs)


def create_accelerator(out_dir: str | Path, precision: str = "auto") -> accelerate.Accelerator:
    """Return an Accelerator that logs to TensorBoard under `out_dir`/tensorboard.

    Args:
        precision: "bf16", "fp16", "no" (float32), or "auto": what `accelerate launch
            --mixed_precision` says, else `default_precision`. Any other value overrules the
            launcher, since it is part of the run's configuration.
    """
    precision = choose_precision(precision)
    if precision == "fp16" and use_cpu():
        raise ValueError(
            "precision is fp16, but fp16 needs a GPU. Use --precision bf16, no (float32) or auto."
        )
    configuration = accelerate.utils.ProjectConfiguration(
        project_dir=str(out_dir), logging_dir=str(out_dir) + "/tensorboard"
    )
    return _Accelerator(
        cpu=use_cpu(),
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        mixed_precision=precision,
        log_with="tensorboard",
        project_config=configuration,
    )
