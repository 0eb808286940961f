"""Run the shards of a command on an executor of datatrove, on this machine or by SLURM.

The extra `cluster` installs datatrove. Its executors keep their own logs and marks in a folder; the
marks of files, which generate.py and evaluate.py check, lie with the images.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

COMMANDS = ("generate", "evaluate")


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """Run the shards of a command on an executor of datatrove.

    Behind `--` comes the command without --shard.
    """

    logs: str
    """Folder of your own for datatrove's logs and marks. A SLURM job loads the executor from a
    pickle in it, which runs code: nobody else may have the right to write there."""
    tasks: int = 20
    """Number of shards."""
    workers: int = 1
    """Shards at a time."""
    executor: Literal["local", "slurm"] = "local"
    """local: processes of this machine. slurm: an array job; call it on a login node."""
    partition: str = ""
    """Partition of SLURM."""
    time: str = "12:00:00"
    """Time limit of a shard on SLURM."""
    cpus: int = 4
    """Processor cores of a shard on SLURM."""
    gpus: int = 0
    """GPUs of a shard on SLURM."""

    def __post_init__(self):
        if self.tasks < 1 or self.workers < 1:
            raise ValueError("--tasks and --workers must be at least 1.")
        if self.executor == "slurm" and not self.partition:
            raise ValueError("--executor slurm needs --partition NAME.")


class ShardStep(PipelineStep):
    """Runs one shard of a command in a process of its own.

    Args:
        command: "generate" or "evaluate".
        words: Its flags without --shard.
    """

    name = "shard"
    type = "EM Synthesis"

    def __init__(self, command: str, words: Sequence[str]):
        super().__init__()
        self.command, self.words = command, list(words)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Run shard `rank` + 1 of `world_size`; a failure raises `CalledProcessError`."""
        program = f"from em_commands.{self.command} import main; main()"
        shard = ["--shard", f"{rank + 1}/{world_size}"]
        with self.track_time("shard"):
            subprocess.run([sys.executable, "-c", program, *self.words, *shard], check=True)
        return data


def read_command(words: Sequence[str]) -> ShardStep:
    """Return the step of a command line such as "python generate.py --model MODEL ..."."""
    rest = list(words[1:] if words and words[0] == "python" else words)
    command = Path(rest[0]).stem.removeprefix("em-") if rest else ""
    if command not in COMMANDS or "--shard" in rest:
        raise ValueError(
            "Behind -- comes generate.py or evaluate.py with its flags, without --shard; not "
            f"{' '.join(words) or 'nothing'}."
        )
    return ShardStep(command, rest[1:])


def create_executor(config: RunnerConfig, step: ShardStep) -> Any:
    """Return the executor that `run` starts."""
    options: dict[str, Any] = {
        "pipeline": [step],
        "tasks": config.tasks,
        "workers": config.workers,
        "logging_dir": os.path.abspath(config.logs),
    }
    if config.executor == "local":
        return LocalPipelineExecutor(**options)
    return SlurmPipelineExecutor(
        **options,
        job_name=step.command,
        partition=config.partition,
        time=config.time,
        cpus_per_task=config.cpus,
        gpus_per_task=config.gpus,
        qos="",
    )
