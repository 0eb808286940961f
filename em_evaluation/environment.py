"""The versions and the hardware in a report, without anything that names the machine."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PACKAGES = (
    "em-synthesis",
    "torch",
    "diffusers",
    "accelerate",
    "datasets",
    "numpy",
    "scipy",
    "clean-fid",
)


def describe_environment() -> dict:
    """Return versions, processor, threads and platform; no host name, user or path."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _find_cpu(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version for name in PACKAGES if (version := _find_version(name))},
    }


def count_cores() -> int:
    """Return how many cores this process may use: those that the system or SLURM gives it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _find_cpu():
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _find_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
