"""One stage of training on disk and on screen: resume, log, progress bar, checkpoints, stop."""

import contextlib
import fcntl
import json
import math
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from em_training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint

AGREE_EVERY_STEPS = (
    8  # how often several processes tell each other that one of them was asked to stop
)


class TrainingInterrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved itself; the same command goes on from there."""


class NonFiniteLossError(RuntimeError):
    """A logged value became infinite or not a number; nothing was saved since the last good checkpoint."""


class TrainingRun:
    """Everything about one training stage that is not the method.

    out_dir, stage: the stage lives in `out_dir`/`stage` (checkpoints/, samples/, stats.jsonl).
    accelerator: its main process writes; its trackers get the same numbers as stats.jsonl.
    num_images, batch_size: length of the run and global batch, both in images.
    log_every, sample_every, checkpoint_every: intervals in images, at least a batch; sample_every 0 turns samples off.
    num_checkpoints: how many are kept.

    Raises `ValueError` when another process is training in the same folder.
    """

    def __init__(
        self,
        out_dir,
        stage: str,
        *,
        accelerator,
        num_images: int,
        batch_size: int,
        log_every: int,
        sample_every: int,
        checkpoint_every: int,
        num_checkpoints: int = 2,
    ):
        if log_every < 1 or checkpoint_every < 1 or sample_every < 0:
            raise ValueError(
                "log_every and checkpoint_every are at least 1 image, sample_every at least 0 (none)"
            )
        self.dir = Path(out_dir) / stage
        self.stage = stage
        self.accelerator = accelerator
        self.num_images = num_images
        self.batch_size = batch_size
        self.log_every = max(log_every, batch_size)
        self.sample_every = sample_every
        self.checkpoint_every = max(checkpoint_every, batch_size)
        self.num_checkpoints = num_checkpoints
        self._state: dict = {}
        self._sums: dict[
            str, list
        ] = {}  # name -> [sum (tensor or float), count] since the last log line
        self._stop_signal: int | None = None
        self._seconds_before = 0.0
        self._last_saved: int | None = None
        self._bar = None
        self._old_handlers: dict = {}
        self._lock = lock_folder(self.dir, is_main_process=accelerator.is_main_process)

    def __enter__(self):
        self._lock.__enter__()
        self.dir.mkdir(parents=True, exist_ok=True)
        if self.accelerator.log_with:
            self.accelerator.init_trackers(self.stage)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        self._started = time.monotonic()
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if self._bar is not None:
            self._bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []
        self._lock.__exit__(None, None, None)
        if kind is None and self._stop_signal is not None and self._old_handlers:
            signal.raise_signal(
                self._stop_signal
            )  # came after the last agreement: to whoever handles it now
            if signal.getsignal(self._stop_signal) is signal.SIG_IGN:
                raise KeyboardInterrupt  # nobody does: shells start what runs in the background so

    def resume(self, state: dict) -> int:
        """Load the newest whole checkpoint into `state`, {name: object with state_dict and load_state_dict}; return its images seen, or 0.

        The same objects are saved from then on. A damaged checkpoint is named and the one before it taken.
        """
        self._state = state
        num_images_seen = 0
        for path in reversed(list_checkpoints(self.dir / "checkpoints")):
            try:
                saved = load_checkpoint(path)
            except ValueError as error:
                self.say(f"{error}; trying the one before it")
                if path == list_checkpoints(self.dir / "checkpoints")[0]:
                    raise ValueError(
                        f"no checkpoint in {self.dir / 'checkpoints'} can be read; remove that folder to start the stage again"
                    ) from error
                continue
            self._restore(saved)
            num_images_seen = saved["num_images_seen"]
            self.say(
                f"{self.stage}: going on at {num_images_seen:,} of {self.num_images:,} images from {path}"
            )
            break
        self._last_saved = num_images_seen if num_images_seen else None
        if self.accelerator.is_main_process:
            self._cut_stats(num_images_seen)
        self._start_count = num_images_seen
        self._bar = tqdm(
            total=self.num_images,
            initial=num_images_seen,
            desc=self.stage,
            unit="img",
            unit_scale=True,
            smoothing=0.1,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15,
            disable=not self.accelerator.is_main_process,
        )
        self._started = time.monotonic()
        return num_images_seen

    def log(self, **scalars) -> None:
        """Add scalars (tensors are not synchronised) to the averages of the next line of the log."""
        for name, value in scalars.items():
            value = value.detach().float() if isinstance(value, torch.Tensor) else float(value)
            if name in self._sums:
                self._sums[name][0] = self._sums[name][0] + value
                self._sums[name][1] += 1
            else:
                self._sums[name] = [value, 1]

    def is_due(self, every: int, num_images_seen: int) -> bool:
        """Say whether the last step, of `batch_size` images, crossed a multiple of `every` images or ended the run; never for 0."""
        if not every:
            return False
        return (
            num_images_seen // every > (num_images_seen - self.batch_size) // every
            or num_images_seen >= self.num_images
        )

    def samples_due(self, num_images_seen: int) -> bool:
        """Say whether it is time for a sample grid."""
        return self.is_due(self.sample_every, num_images_seen)

    def samples_path(self, num_images_seen: int) -> Path:
        """Return the path of the sample grid (PNG) at this count; its folder exists."""
        folder = self.dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{num_images_seen:012d}.png"

    def step(self, num_images_seen: int) -> None:
        """Close one optimiser step: move the bar, write the log and the checkpoint when due, stop when asked to.

        Raises `TrainingInterrupted` after saving on SIGINT or SIGTERM, `NonFiniteLossError` without saving on a loss that is not finite.
        """
        self._bar.update(num_images_seen - self._bar.n)
        if self.is_due(self.log_every, num_images_seen):
            self._write_log(num_images_seen)
        if self.is_due(self.checkpoint_every, num_images_seen):
            self.save(num_images_seen)
        if self._must_stop(num_images_seen):
            self.save(num_images_seen)
            raise self._interruption(num_images_seen)

    def finish(self, num_images_seen: int) -> float:
        """Save the end of the stage and return its training time in seconds, summed over all resumed parts.

        Raises `TrainingInterrupted` when one of the processes was asked to stop since they last agreed: what comes after the stage
        waits for the next start.
        """
        self.save(num_images_seen)
        if self._agree_to_stop():
            raise self._interruption(num_images_seen)
        return self.train_seconds

    @property
    def train_seconds(self) -> float:
        """Seconds spent training so far, resumed parts included."""
        return self._seconds_before + time.monotonic() - self._started

    def save(self, num_images_seen: int) -> None:
        """Write a checkpoint now, unless this count is already on disk."""
        if self._last_saved == num_images_seen:
            return
        pending = {
            name: self._mean_over_processes(total / count)
            for name, (total, count) in self._sums.items()
        }
        self._refuse_non_finite(pending, num_images_seen)
        sums = self._gather_sums()
        if self.accelerator.is_main_process:
            state = {name: part.state_dict() for name, part in self._state.items()}
            content = {
                "num_images_seen": num_images_seen,
                "train_seconds": self.train_seconds,
                "pending": sums,
                "state": state,
            }
            save_checkpoint(
                self.dir / "checkpoints", num_images_seen, content, keep=self.num_checkpoints
            )
        self._last_saved = num_images_seen
        self.accelerator.wait_for_everyone()

    def say(self, text: str, *, from_any_process: bool = False) -> None:
        """Print a line without breaking the progress bar, from the main process alone or from any, which then names itself."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)
        elif from_any_process:
            tqdm.write(f"process {self.accelerator.process_index}: {text}", file=sys.stderr)

    def _restore(self, saved: dict) -> None:
        missing = set(self._state) ^ set(saved["state"])
        if missing:
            raise ValueError(
                f"the checkpoint in {self.dir} was made by another version: {sorted(missing)} differ; choose a new folder"
            )
        for name, part in self._state.items():
            part.load_state_dict(saved["state"][name])
        self._sums = {}
        for name, pending in saved["pending"].items():
            totals = pending["totals"]
            rank, is_same = (
                self.accelerator.process_index,
                len(totals) == self.accelerator.num_processes,
            )
            total = totals[rank] if is_same else sum(totals) / len(totals)
            if pending["is_tensor"]:
                total = torch.tensor(total, dtype=torch.float32, device=self.accelerator.device)
            self._sums[name] = [total, pending["count"]]
        self._seconds_before = saved["train_seconds"]

    def _write_log(self, num_images_seen: int) -> None:
        values = {
            name: self._mean_over_processes(total / count)
            for name, (total, count) in self._sums.items()
        }
        self._sums = {}
        self._refuse_non_finite(values, num_images_seen)
        values = {name: float(value) for name, value in values.items()}
        seconds = self.train_seconds
        line = {"num_images_seen": num_images_seen, "train_seconds": round(seconds, 3), **values}
        elapsed = seconds - self._seconds_before
        if elapsed > 0:
            line["images_per_second"] = (num_images_seen - self._start_count) / elapsed
        if self.accelerator.is_main_process:
            with (self.dir / "stats.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        for tracker in self.accelerator.trackers:
            tracker.log(
                {f"{self.stage}/{name}": value for name, value in line.items()},
                step=num_images_seen,
            )
        first = dict(list(values.items())[:4])
        self._bar.set_postfix(
            {name: f"{value:.3g}" for name, value in first.items()}, refresh=False
        )

    def _gather_sums(self) -> dict:
        """What each process has summed since the last log line: a resumed run goes on with its own, and logs the same line."""
        totals = torch.tensor(
            [float(total) for total, _ in self._sums.values()], dtype=torch.float64
        )
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.gather(totals.to(self.accelerator.device)).cpu()
        by_name = totals.view(self.accelerator.num_processes, -1).T.tolist()  # [names][processes]
        return {
            name: {"totals": row, "count": count, "is_tensor": isinstance(total, torch.Tensor)}
            for (name, (total, count)), row in zip(self._sums.items(), by_name, strict=True)
        }

    def _mean_over_processes(self, value):
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, reduction="mean")

    def _refuse_non_finite(self, values: dict, num_images_seen: int) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(float(value))]
        if bad:
            last = list_checkpoints(self.dir / "checkpoints")
            where = (
                f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
            )
            raise NonFiniteLossError(
                f"{self.stage}: {', '.join(bad)} is not finite at {num_images_seen:,} images; {where}. "
                "Lower the learning rate or set the precision to 'no' (float32) and start again."
            )

    def _must_stop(self, num_images_seen: int) -> bool:
        if (
            self.accelerator.num_processes > 1
            and (num_images_seen // self.batch_size) % AGREE_EVERY_STEPS
        ):
            return False
        return self._agree_to_stop()

    def _agree_to_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self._stop_signal is not None
        asked = torch.tensor([float(self._stop_signal is not None)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, reduction="sum") > 0)

    def _interruption(self, num_images_seen: int) -> TrainingInterrupted:
        return TrainingInterrupted(
            f"{self.stage} stopped and saved at {num_images_seen:,} of {self.num_images:,} images; run the same command to go on"
        )

    def _on_signal(self, number, frame) -> None:
        if self._stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop_signal = number
        self.say(
            f"\n{signal.Signals(number).name}: saving after this step, then stopping (Ctrl-C again to stop without saving)"
        )

    def _cut_stats(self, num_images_seen: int) -> None:
        """Drop the lines of stats.jsonl that lie after the checkpoint, and a line cut short by a kill."""
        path = self.dir / "stats.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["num_images_seen"] <= num_images_seen:
                    kept.append(line + "\n")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)


@contextlib.contextmanager
def lock_folder(folder, *, is_main_process: bool = True):
    """Keep other trainings out of `folder` until the end of the block, or of the process however it ends.

    Only the main process of several locks. Raises `ValueError` when another training holds the folder.
    """
    if not is_main_process:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is training in {folder}; wait for it or choose another folder with --out"
            ) from error
        yield


def read_stats(stage_dir) -> list[dict]:
    """Return the lines of a stage's stats.jsonl, each {"num_images_seen", "train_seconds", ...}; an empty list where there is none."""
    path = Path(stage_dir) / "stats.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the last line, cut short by a kill
            lines.append(json.loads(line))
    return lines
