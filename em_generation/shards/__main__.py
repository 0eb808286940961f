"""Run the shards of generate.py or evaluate.py on an executor of datatrove (extra cluster).

python -m em_generation.shards --logs LOGS --tasks 20 --workers 4 -- generate.py --model MODEL ...
"""

import sys

from em_training.cli import run_command
from em_training.flags import parse_flags


def run() -> None:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    try:
        from em_generation.shards.datatrove_runner import (
            RunnerConfig,
            create_executor,
            read_command,
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            'datatrove is not installed. Install the extra: pip install "em-synthesis[cluster]".'
        ) from error
    (config,) = parse_flags(
        [RunnerConfig],
        words[:split],
        command="-m em_generation.shards",
        description=(__doc__ or "").strip(),
    )
    create_executor(config, read_command(words[split + 1 :])).run()


if __name__ == "__main__":
    run_command(run)
