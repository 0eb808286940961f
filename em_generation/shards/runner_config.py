"""What to run on an executor of datatrove: its flags, and the command behind `--`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

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


def read_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return (command, its flags) of a line such as "python generate.py --model MODEL ..."."""
    rest = list(words[1:] if words and words[0] == "python" else words)
    command = Path(rest[0]).stem.removeprefix("em-") if rest else ""
    if command not in COMMANDS or "--shard" in rest:
        raise ValueError(
            "Behind -- comes generate.py or evaluate.py with its flags, without --shard; not "
            f"{' '.join(words) or 'nothing'}."
        )
    return command, rest[1:]
