"""Run the shards of a command on an executor of datatrove, on this machine or by SLURM.

The extra `cluster` installs datatrove. Its executors keep their own logs and marks in a folder; the
marks of files, which generate.py and evaluate.py check, lie with the images.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from em_generation.shards.runner_config import RunnerConfig


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


def create_executor(config: RunnerConfig, step: ShardStep) -> Any:
    """Return the executor that `run` starts."""
    options: dict[str, Any] = {
        "pipeline": [step],
        "tasks": config.tasks,
        "workers": config.workers,
        "logging_dir": os.path.abspath(config.logs),
        "skip_completed": False,  # files are marked one by one; a task may have more to do now
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
