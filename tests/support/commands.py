"""The commands as a user calls them, in forked processes that can be watched, killed and starved.

A fork server imports the libraries once, so that a start takes moments.
"""

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.faults import Watcher, watch

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
PRELOAD = [
    "torch",
    "diffusers",
    "datasets",
    "em_cyclegan.train",
    "em_diffusion.train",
    "em_stable_diffusion.train",
    "em_stylegan.train",
    "em_generation.evaluate",
    "em_generation.generate",
    "em_evaluation.report",
    "support.faults",
]


@dataclass(frozen=True)
class Command:
    """A command that writes below one folder.

    name: the module in `em_commands`. words: its flags; {root} is the folder. results: patterns of
    the files that must be equal in the end.
    """

    name: str
    words: Sequence[str]
    results: Sequence[str]

    def start(
        self, root: Path, watcher: Watcher | None = None, *, is_read: bool = True
    ) -> "Started":
        """Start it in a process of its own.

        watcher: is told of what it does to files. is_read: else nobody reads its output, as after
        `| head -1`.
        """
        log = root.with_name(f"{root.name}.log")
        words = [word.format(root=root) for word in self.words]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        arguments = self.name, words, log if is_read else None, watcher
        process = context.Process(target=_run, args=arguments)
        process.start()
        return Started(process, log)

    def run(self, root: Path, watcher: Watcher | None = None, *, is_read=True) -> "Started":
        """Start it and wait for its end."""
        return self.start(root, watcher, is_read=is_read).wait()

    def read_results(self, root: Path) -> dict[str, str]:
        """Return {path: hash of the content} of the files that must be equal in the end."""
        paths = [path for pattern in self.results for path in root.glob(pattern)]
        assert paths, f"{self.name} made nothing in {root}"
        return {str(path.relative_to(root)): _hash(path, root) for path in sorted(paths)}


@dataclass
class Started:
    """A command that was started; `code` and `text` are those of its end."""

    process: multiprocessing.Process
    log: Path
    code: int | None = field(default=None)

    def wait(self, seconds: float = 300) -> "Started":
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"it did not end within {seconds} s: {self.text}")
        self.code = self.process.exitcode
        return self

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text()


def make_commands(models: Path) -> dict[str, Command]:
    """Return small calls of the commands, which use the runs and the base in `models`."""
    train = ["test", "--tiles.cache-dir", "{root}/cache", "--out"]
    generate = ["--num-images", "40", "--batch-size", "8", "--out", "{root}/images"]
    evaluate = ["--num-images", "12", "--cache-dir", "{root}/cache", "--out", "{root}/report"]
    weights, log = "*/pipeline/*/*.safetensors", "*/*/stats.jsonl"
    return {
        "train_ldm": Command("train_ldm", [*train, "{root}/ldm"], (weights, log, "ldm/grain/*.s*")),
        "train_gan": Command("train_gan", [*train, "{root}/gan"], (weights, log)),
        "train_cyclegan": Command("train_cyclegan", [*train, "{root}/cyclegan"], (weights, log)),
        "train_lora": Command(
            "train_lora", [*train, "{root}/lora", "--base", f"{models}/base"], (weights, log)
        ),
        "generate": Command(
            "generate", ["--model", f"{models}/ldm", *generate], ("images/*.png", "*.png")
        ),
        "evaluate": Command(
            "evaluate",
            ["--models", f"{models}/ldm", f"{models}/gan", *evaluate],
            ("report/report.json", "report/images*/*/*.png"),
        ),
    }


def _run(name: str, words: list[str], log: Path | None, watcher: Watcher | None) -> None:
    """Be the command `name` in this process; without a log, its output is a closed pipe."""
    import importlib

    import torch

    torch.set_num_threads(1)
    if log is None:
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(ROOT)
    sys.argv = [f"{name}.py", *words]
    main = importlib.import_module(f"em_commands.{name}").main
    if watcher is None:
        main()
    else:
        with watch(watcher):
            main()


def _hash(path: Path, root: Path) -> str:
    """Return a hash of a file without the times of day and durations that it holds."""
    content = path.read_bytes()
    if path.suffix == ".json":
        content = json.dumps(_drop_times(json.loads(content)), sort_keys=True).encode()
        content = content.replace(str(root).encode(), b"ROOT")
    if path.suffix == ".jsonl":
        lines = map(json.loads, content.splitlines())
        content = json.dumps([_drop_times(line) for line in lines]).encode()
    return hashlib.sha256(content).hexdigest()


def _drop_times(value):
    if isinstance(value, dict):
        return {
            key: _drop_times(each)
            for key, each in value.items()
            if not any(word in key for word in ("second", "date", "created", "time"))
        }
    return [_drop_times(each) for each in value] if isinstance(value, list) else value
