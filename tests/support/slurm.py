"""A stand-in for SLURM on this machine: the steps of a batch script run as local processes.

`Slurm(folder).sbatch(script)` starts a job as `sbatch` does. Within it, `srun` and
`scontrol requeue | show hostnames` of this file are found before others. It knows the options that
our templates use, and refuses others. What it does as SLURM does:

- Options are read from the #SBATCH lines; those of the call overrule them.
- An array runs its tasks in order, at most so many at once, each with SLURM_ARRAY_TASK_ID.
- `srun` starts nodes x tasks processes with SLURM_PROCID, SLURM_NODEID and SLURM_LOCALID. A signal
  to it goes on to these, not to their children. Its exit code is the largest of theirs; 128 + n
  for a process that ended by signal n.
- `Task.warn` sends the signal of --signal: to the steps, with B: to the batch shell alone.
- `Task.cancel` is `scancel`: SIGTERM to the steps and to the batch shell.
- `Task.fail_node` ends all processes at once. The task is started again if it has --requeue.
- `scontrol requeue` starts the task again when its script has ended.
- A task that is started again has SLURM_RESTART_COUNT. Its output goes on in the same file.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

# what a cluster needs and one machine has not
IGNORED = {
    "account", "cpus-per-task", "exclusive", "export", "gpus-per-node", "gpus-per-task", "gres",
    "job-name", "label", "mem", "mem-per-cpu", "open-mode", "output", "partition", "qos", "time",
}  # fmt: skip
USED = {"array", "kill-on-bad-exit", "nodes", "ntasks", "ntasks-per-node", "requeue", "signal"}
SHORT = {"-N": "--nodes", "-n": "--ntasks", "-a": "--array", "-J": "--job-name", "-t": "--time",
         "-p": "--partition", "-A": "--account", "-c": "--cpus-per-task", "-o": "--output",
         "-l": "--label", "-K": "--kill-on-bad-exit"}  # fmt: skip
FLAGS = {"requeue", "label", "exclusive", "kill-on-bad-exit"}  # a value only after "="
POLL, KILL_WAIT = 0.02, 10.0  # seconds


class Slurm:
    """A cluster with one queue. `folder` gets the outputs of jobs, as slurm-JOB[_TASK].out."""

    def __init__(self, folder: Path):
        self.folder, self.num_jobs = Path(folder), 0
        bin_folder = self.folder / "bin"
        bin_folder.mkdir(parents=True, exist_ok=True)
        for name in ("srun", "scontrol"):
            path = bin_folder / name
            path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
            path.chmod(0o755)

    def sbatch(
        self,
        script: Path,
        *words: str,
        options: Sequence[str] = (),
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> "Job":
        """Start `sbatch OPTIONS script WORDS` in folder `cwd`.

        env: What the environment has besides that of this process.
        """
        self.num_jobs += 1
        lines = Path(script).read_text().splitlines()
        own = [line.split("#SBATCH", 1)[1] for line in lines if line.startswith("#SBATCH")]
        given = [word for line in own for word in re.split(r"\s+#", line)[0].split()]
        settings, rest = read_options([*given, *options])
        assert not rest, f"sbatch does not know {rest}"
        # as SLURM does, a copy is run: the file may change
        copy = self.folder / f"job-{self.num_jobs}.sh"
        shutil.copy(script, copy)
        environment = os.environ | (env or {})
        environment["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{environment['PATH']}"
        environment["SLURM_SUBMIT_DIR"] = str(cwd or Path.cwd())
        return Job(self.folder, self.num_jobs, [str(copy), *words], settings, environment)


class Job:
    """A started job: `tasks` by the number in the array, or {None: the only one}."""

    def __init__(self, folder, number, command, settings, environment):
        numbers, at_once = read_array(settings.get("array"))
        self.tasks = {
            task: Task(folder, number, task, numbers, command, settings, environment)
            for task in numbers
        }
        self._slots = threading.Semaphore(at_once)
        self._threads = [
            threading.Thread(target=self._run, args=[task]) for task in self.tasks.values()
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, seconds: float = 300) -> dict[int | None, int]:
        """Wait for the end of all tasks and return their exit codes."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            for task in self.tasks.values():
                task.cancel(signal.SIGKILL)
            texts = "\n".join(task.text[-2000:] for task in self.tasks.values())
            raise AssertionError(f"the job did not end within {seconds} s:\n{texts}")
        return {number: task.code for number, task in self.tasks.items()}

    def _run(self, task):
        with self._slots:
            task.run()


class Task:
    """A task of an array, or a job without one. `code` is that of its last end; None before."""

    def __init__(self, folder, job, number, numbers, command, settings, environment):
        name = f"{job}" if number is None else f"{job}_{number}"
        self.output, self.steps = folder / f"slurm-{name}.out", folder / f"steps-{name}"
        self.steps.mkdir()
        self.command, self.settings = command, settings
        self.code: int | None = None
        self.num_restarts = 0
        self.process: subprocess.Popen | None = None
        self._is_cancelled = self._has_failed = False
        self._starts = threading.Lock()  # held until `process` is known
        num_nodes, num_tasks = find_sizes(settings)
        self.environment = environment | {
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NUM_NODES": str(num_nodes),
            "SLURM_NNODES": str(num_nodes),
            "SLURM_NTASKS": str(num_tasks),
            "SLURM_NTASKS_PER_NODE": str(num_tasks // num_nodes),
            "SLURM_JOB_NODELIST": f"node[0-{num_nodes - 1}]",
            "SLURM_STAND_IN": str(self.steps),
        }
        if "cpus-per-task" in settings:
            self.environment["SLURM_CPUS_PER_TASK"] = settings["cpus-per-task"]
        if number is not None:
            self.environment |= {
                "SLURM_ARRAY_JOB_ID": str(job),
                "SLURM_ARRAY_TASK_ID": str(number),
                "SLURM_ARRAY_TASK_COUNT": str(len(numbers)),
                "SLURM_ARRAY_TASK_MIN": str(min(numbers)),
                "SLURM_ARRAY_TASK_MAX": str(max(numbers)),
            }

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, text: str, count: int = 1, seconds: float = 120) -> None:
        """Wait until it has printed `text` so often."""
        self._wait(lambda: self.text.count(text) >= count, f"{count} times {text!r}", seconds)

    def wait_for_path(self, path: Path, seconds: float = 120) -> None:
        """Wait until it has made a file or folder."""
        self._wait(path.exists, path, seconds)

    def warn(self) -> None:
        """Send the signal that --signal asks for before the time limit."""
        batch, name = re.fullmatch(r"(B:)?(\w+)(?:@\d+)?", self.settings["signal"]).groups()
        self._send(getattr(signal, f"SIG{name.removeprefix('SIG')}"), to_batch=bool(batch))

    def signal_steps(self, number: int) -> None:
        """Send a signal to the steps, as `scancel --signal` does."""
        self._send(number)

    def cancel(self, number: int = signal.SIGTERM) -> None:
        """Cancel the task for good, as `scancel` does."""
        self._is_cancelled = True
        self._send(number)
        if self.process is not None:
            self._send(number, to_batch=True)

    def fail_node(self) -> None:
        """End all of its processes without a warning, as the failure of a node does."""
        self._has_failed = True
        with self._starts:
            processes = psutil.Process(self.process.pid)
        for each in [*processes.children(recursive=True), processes]:
            kill(each.pid, signal.SIGKILL)

    def run(self) -> None:
        """Run the script, again and again while it is requeued."""
        while not self._is_cancelled:
            for left in self.steps.iterdir():
                left.unlink()
            self._has_failed = False
            restarts = {"SLURM_RESTART_COUNT": str(self.num_restarts)} if self.num_restarts else {}
            with self._starts, self.output.open("ab") as out:
                self.process = subprocess.Popen(
                    ["bash", *self.command],
                    env=self.environment | restarts,
                    cwd=self.environment["SLURM_SUBMIT_DIR"],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
            code = self.process.wait()
            code = 128 - code if code < 0 else code
            fails = self._has_failed and "requeue" in self.settings
            if not (fails or (self.steps / "requeue").exists()):
                break
            self.num_restarts += 1
        self.code = 130 if self.process is None else code

    def _wait(self, is_done, what, seconds):
        deadline = time.monotonic() + seconds
        while not is_done():
            if self.code is not None or time.monotonic() > deadline:
                raise AssertionError(f"there is no {what}:\n{self.text}")
            time.sleep(POLL)

    def _send(self, number, *, to_batch=False):
        if to_batch:
            with self._starts:
                kill(self.process.pid, number)
            return
        for step in self.steps.glob("step-*"):
            kill(int(step.name.removeprefix("step-")), number)


def kill(process: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def read_options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return {long name: value} of the options that `words` begins with, and the other words."""
    settings, words = {}, list(words)
    while words and words[0].startswith("-"):
        word, _, value = words.pop(0).partition("=")
        if not word.startswith("--") and word not in SHORT and word[:2] in SHORT:
            word, value = word[:2], word[2:]
        name = SHORT.get(word, word).removeprefix("--")
        assert name in USED | IGNORED, f"this stand-in does not know {word}"
        if not value and name not in FLAGS:
            value = words.pop(0)
        settings[name] = value
    return settings, words


def read_array(text: str | None) -> tuple[list, int]:
    """Return the numbers of "0-19%4" or "1,3-5", and how many run at once; [None] without one."""
    if text is None:
        return [None], 1
    numbers, _, at_once = text.partition("%")
    tasks = []
    for part in numbers.split(","):
        first, _, last = part.partition("-")
        tasks += range(int(first), int(last or first) + 1)
    return tasks, int(at_once or len(tasks))


def find_sizes(settings: dict[str, str]) -> tuple[int, int]:
    """Return the numbers of nodes and tasks that options ask for."""
    num_nodes = int(settings.get("nodes", 1))
    num_tasks = int(settings.get("ntasks", num_nodes * int(settings.get("ntasks-per-node", 1))))
    assert num_tasks % num_nodes == 0, "tasks are shared evenly here"
    return num_nodes, num_tasks


def srun(words: Sequence[str]) -> int:
    """Run a command as the tasks of a step; return the exit code."""
    settings, command = read_options(words)
    of_job = {
        "nodes": os.environ["SLURM_NNODES"],
        "ntasks-per-node": os.environ["SLURM_NTASKS_PER_NODE"],
    }
    num_nodes, num_tasks = find_sizes(of_job | settings)
    folder = Path(os.environ["SLURM_STAND_IN"])
    tasks = []

    def forward(number, frame):
        for task in tasks:
            if task.poll() is None:
                kill(task.pid, number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, forward)
    for rank in range(num_tasks):
        node, local = divmod(rank, num_tasks // num_nodes)
        variables = {
            "SLURM_PROCID": rank,
            "SLURM_NODEID": node,
            "SLURM_LOCALID": local,
            "SLURM_NTASKS": num_tasks,
            "SLURM_NNODES": num_nodes,
            "SLURM_STEP_NUM_TASKS": num_tasks,
            "SLURMD_NODENAME": f"node{node}",
        }
        variables = {name: str(value) for name, value in variables.items()}
        tasks.append(subprocess.Popen(command, env=os.environ | variables))
    mark = folder / f"step-{os.getpid()}"  # from now on the step can be signalled
    mark.touch()
    deadline = None
    while any(task.poll() is None for task in tasks):
        if "kill-on-bad-exit" in settings and any(task.poll() for task in tasks):
            if deadline is None:
                deadline = time.monotonic() + KILL_WAIT
                forward(signal.SIGTERM, None)
            elif time.monotonic() > deadline:
                forward(signal.SIGKILL, None)
        time.sleep(POLL)
    mark.unlink()
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def scontrol(words: Sequence[str]) -> int:
    """Do `scontrol requeue JOB` or `scontrol show hostnames LIST`; all nodes are this machine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["requeue", "show"])
    parser.add_argument("rest", nargs="+")
    asked = parser.parse_args(words)
    if asked.verb == "requeue":
        assert asked.rest == [os.environ["SLURM_JOB_ID"]]
        (Path(os.environ["SLURM_STAND_IN"]) / "requeue").touch()
    else:
        assert asked.rest[0] == "hostnames"
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -n 1` may close it early
        print("\n".join(["127.0.0.1"] * int(os.environ["SLURM_NNODES"])))
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
