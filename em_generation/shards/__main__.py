"""Run the shards of generate.py or evaluate.py on an executor of datatrove (extra cluster).

python -m em_generation.shards --logs LOGS --tasks 20 --workers 4 -- generate.py --model MODEL ...
"""

import sys

from em_generation.shards.runner_config import RunnerConfig, read_command
from em_training.cli import run_command
from em_training.flags import parse_flags


def run() -> None:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    (config,) = parse_flags(
        [RunnerConfig],
        words[:split],
        command="-m em_generation.shards",
        description=(__doc__ or "").strip(),
    )
    command = read_command(words[split + 1 :])
    try:
        from em_generation.shards.datatrove_runner import ShardStep, create_executor
    except ModuleNotFoundError as error:
        raise ValueError(
            'datatrove is not installed. Install the extra: pip install "em-synthesis[cluster]".'
        ) from error
    create_executor(config, ShardStep(*command)).run()


if __name__ == "__main__":
    run_command(run)
