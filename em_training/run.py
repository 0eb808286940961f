"""One stage of training on disk and on screen: resume, log, progress bar, checkpoints, stop."""

import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import accelerate
import torch
from tqdm.auto import tqdm

from em_data.files import flush_to_disk, name_full_disk
from em_training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from em_training.nodes import ask_main_process, fail_together, lock_run, share_tensors
from em_training.optimizer import match_memory_format
from em_training.stats import cut_stats

# how often several processes tell each other that one of them was asked to stop
AGREE_EVERY_STEPS = 8
# SLURM's --signal can ask for one that launchers leave alone; Windows has none
STOP_SIGNALS = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGUSR1")]
SECONDS_TO_ESTIMATE, LONG_HOURS = 10, 3


class TrainingInterrupted(Exception):
    """The run was asked to stop (by one of `STOP_SIGNALS`) and has saved itself."""


class NonFiniteLossError(RuntimeError):
    """A logged value is infinite or nan; the last good checkpoint is kept."""


class TrainingRun:
    """Everything about one training stage that is not the method; a context manager.

    Args:
        out_dir, stage: The stage writes checkpoints/, samples/ and stats.jsonl to out_dir/stage.
        config: The stage's configuration, of which num_images, batch_size, log_every, sample_every
            and checkpoint_every are used: images, and global batch size.
        accelerator: Its main process writes; its trackers get the same numbers as stats.jsonl.
        num_checkpoints: How many are kept.

    Raises:
        ValueError: If another process is training in the same folder, or the processes of this
            training do not share it.
    """

    def __init__(
        self,
        out_dir: str | Path,
        stage: str,
        config: Any,
        accelerator: accelerate.Accelerator,
        *,
        num_checkpoints: int = 2,
    ):
        self.dir = Path(out_dir) / stage
        self.stage = stage
        self.accelerator = accelerator
        self.num_images = config.num_images
        self.batch_size = config.batch_size
        self.log_every = max(config.log_every, config.batch_size)
        self.sample_every = config.sample_every
        self.checkpoint_every = max(config.checkpoint_every, config.batch_size)
        self.num_checkpoints = num_checkpoints
        self._state: dict = {}
        self._sums: dict[str, list] = {}  # name -> [sum, count] since the last line of the log
        self._stop_signal: int | None = None
        self._seconds_before = 0.0
        self._last_saved: int | None = None
        self._bar = tqdm(disable=True)  # until `resume`
        self._has_estimate = False
        self._old_handlers: dict = {}
        self._lock = lock_run(self.dir, accelerator)

    def __enter__(self) -> Self:
        self._lock.__enter__()
        self.dir.mkdir(parents=True, exist_ok=True)
        if self.accelerator.log_with:
            self.accelerator.init_trackers(self.stage)
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        self._started = time.monotonic()
        return self

    def __exit__(self, kind: type | None, *raised: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []
        self._lock.__exit__(None, None, None)
        if kind is None and self._stop_signal is not None and self._old_handlers:
            # came after the last agreement: pass it to whoever handles it now
            signal.raise_signal(self._stop_signal)
            if signal.getsignal(self._stop_signal) is signal.SIG_IGN:
                raise KeyboardInterrupt  # shells start background jobs with signals ignored

    def resume(self, state: dict) -> int:
        """Load the newest sound checkpoint into `state` and return its number of images seen, or 0.

        A damaged checkpoint is named, and the one before it is used. Several processes load what
        the main one chooses, or get its first weights.

        Args:
            state: {name: object with state_dict and load_state_dict, or None for an absent part}.
                The same objects are saved from then on.
        """
        self._state = {name: part for name, part in state.items() if part is not None}
        num_images_seen = self._load_newest()
        self._last_saved = num_images_seen if num_images_seen else None
        if self.accelerator.is_main_process:
            cut_stats(self.dir, num_images_seen)
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

    def log(self, **scalars: torch.Tensor | float) -> None:
        """Add scalars to the averages of the next line of the log; tensors are not synchronised."""
        for name, value in scalars.items():
            value = value.detach().float() if isinstance(value, torch.Tensor) else float(value)
            if name in self._sums:
                self._sums[name][0] = self._sums[name][0] + value
                self._sums[name][1] += 1
            else:
                self._sums[name] = [value, 1]

    def is_due(self, every: int, num_images_seen: int) -> bool:
        """Say whether the last step crossed a multiple of `every` images, or ended the run.

        An interval of 0 is never due.
        """
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
        """Close an optimiser step: move the bar, log and save when due, stop when asked to.

        Raises:
            TrainingInterrupted: After saving, on one of `STOP_SIGNALS`.
            NonFiniteLossError: Without saving.
        """
        self._bar.update(num_images_seen - self._bar.n)
        self._say_estimate(num_images_seen)
        if self.is_due(self.log_every, num_images_seen):
            self._write_log(num_images_seen)
        if self.is_due(self.checkpoint_every, num_images_seen):
            self.save(num_images_seen)
        if self._must_stop(num_images_seen):
            self.save(num_images_seen)
            raise self._interruption(num_images_seen)

    def finish(self, num_images_seen: int) -> float:
        """Save the end of the stage and return its training time in seconds over all resumed parts.

        Raises:
            TrainingInterrupted: If a process was asked to stop since they last agreed.
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
        self._refuse_non_finite(self._mean_sums(), num_images_seen)
        pending = self._gather_sums()
        with fail_together(self.accelerator):
            if self.accelerator.is_main_process:
                self._write_checkpoint(num_images_seen, pending)
        self._last_saved = num_images_seen

    def say(self, text: str, *, from_any_process: bool = False) -> None:
        """Print a line above the progress bar, from the main process or from any process."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)
        elif from_any_process:
            tqdm.write(f"process {self.accelerator.process_index}: {text}", file=sys.stderr)

    def _write_checkpoint(self, num_images_seen: int, pending: dict) -> None:
        content = {
            "num_images_seen": num_images_seen,
            "num_processes": self.accelerator.num_processes,
            "train_seconds": self.train_seconds,
            "pending": pending,
            "state": {name: part.state_dict() for name, part in self._state.items()},
        }
        if (self.dir / "stats.jsonl").exists():
            flush_to_disk(self.dir / "stats.jsonl")
        folder = self.dir / "checkpoints"
        save_checkpoint(folder, num_images_seen, content, keep=self.num_checkpoints)

    def _say_estimate(self, num_images_seen: int) -> None:
        """Say once, after the first steps, that the stage will take long, as measured so far."""
        seconds = time.monotonic() - self._started
        if self._has_estimate or seconds < SECONDS_TO_ESTIMATE:
            return
        self._has_estimate = True
        rate = (num_images_seen - self._start_count) / seconds
        hours = (self.num_images - num_images_seen) / rate / 3600
        if hours > LONG_HOURS:
            device = "CPU" if self.accelerator.device.type == "cpu" else "device"
            self.say(
                f"{self.stage}: about {hours:,.0f} hours to go on this {device} at {rate:.2g} "
                "images/s"
            )

    def _load_newest(self) -> int:
        saved: dict = {}
        name = ask_main_process(self.accelerator, lambda: self._read_newest(saved))
        if name is None:
            share_tensors(self._state, self.accelerator)
            return 0
        with fail_together(self.accelerator):
            self._restore(saved or load_checkpoint(self.dir / "checkpoints" / name))
        return int(name)

    def _read_newest(self, saved: dict) -> str | None:
        """Fill `saved` from the newest sound checkpoint and return its name; None without one."""
        folder = self.dir / "checkpoints"
        paths = list_checkpoints(folder)
        for path in reversed(paths):
            try:
                saved.update(load_checkpoint(path))
            except ValueError as error:
                if path == paths[0]:
                    raise ValueError(
                        f"No checkpoint in {folder} can be read ({error}). Remove that folder to "
                        "start the stage again."
                    ) from error
                self.say(f"{error}; trying the one before it")
                continue
            self.say(
                f"{self.stage}: resuming at {saved['num_images_seen']:,} of {self.num_images:,} "
                f"images from {path}"
            )
            return path.name
        return None

    def _restore(self, saved: dict) -> None:
        different = set(self._state) ^ set(saved["state"])
        if different:
            raise ValueError(
                f"The checkpoint in {self.dir} has other parts ({', '.join(sorted(different))}), "
                "so another version wrote it. Finish the run with that version, or use another "
                "folder."
            )
        before, now = saved.get("num_processes"), self.accelerator.num_processes
        if before not in (None, now):
            self.say(
                f"{self.stage}: the checkpoint is of {before} processes, this training has {now}. "
                "It draws other random numbers than with as many as before, so the result differs."
            )
        for name, part in self._state.items():
            part.load_state_dict(saved["state"][name])
            if isinstance(part, torch.optim.Optimizer):
                match_memory_format(part)
        self._sums = {}
        for name, pending in saved["pending"].items():
            totals, rank = pending["totals"], self.accelerator.process_index
            is_same = len(totals) == self.accelerator.num_processes
            total = totals[rank] if is_same else sum(totals) / len(totals)
            if pending["is_tensor"]:
                total = torch.tensor(total, dtype=torch.float32, device=self.accelerator.device)
            self._sums[name] = [total, pending["count"]]
        self._seconds_before = saved["train_seconds"]

    def _write_log(self, num_images_seen: int) -> None:
        values = self._mean_sums()
        self._sums = {}
        self._refuse_non_finite(values, num_images_seen)
        values = {name: float(value) for name, value in values.items()}
        seconds = self.train_seconds
        line = {"num_images_seen": num_images_seen, "train_seconds": round(seconds, 3), **values}
        elapsed = seconds - self._seconds_before
        if elapsed > 0:
            line["images_per_second"] = (num_images_seen - self._start_count) / elapsed
        if self.accelerator.is_main_process:
            path = self.dir / "stats.jsonl"
            with name_full_disk(path), path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        for tracker in self.accelerator.trackers:
            named = {f"{self.stage}/{name}": value for name, value in line.items()}
            tracker.log(named, step=num_images_seen)
        first = {name: f"{value:.3g}" for name, value in list(values.items())[:4]}
        self._bar.set_postfix(first, refresh=False)

    def _mean_sums(self) -> dict:
        """Return the means since the last line of the log, over all processes."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        if self.accelerator.num_processes == 1:
            return means
        device = self.accelerator.device
        tensors = {
            name: torch.as_tensor(mean, dtype=torch.float32, device=device)
            for name, mean in means.items()
        }
        return {name: self.accelerator.reduce(mean, "mean") for name, mean in tensors.items()}

    def _gather_sums(self) -> dict:
        """Return the sums of each process, so that a resumed run logs the same next line."""
        sums = [float(total) for total, _ in self._sums.values()]
        totals = torch.tensor(sums, dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.gather(totals.to(self.accelerator.device)).cpu()
        by_name = totals.view(self.accelerator.num_processes, -1).T.tolist()  # [names][processes]
        return {
            name: {"totals": row, "count": count, "is_tensor": isinstance(total, torch.Tensor)}
            for (name, (total, count)), row in zip(self._sums.items(), by_name, strict=True)
        }

    def _refuse_non_finite(self, values: dict, num_images_seen: int) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(float(value))]
        if bad:
            last = list_checkpoints(self.dir / "checkpoints")
            where = (
                f"The last good checkpoint is {last[-1]}." if last else "There is no checkpoint."
            )
            raise NonFiniteLossError(
                f"{self.stage}: {', '.join(bad)} is not finite at {num_images_seen:,} images. "
                f"{where} Lower the learning rate or use precision 'no' (float32)."
            )

    def _must_stop(self, num_images_seen: int) -> bool:
        step = num_images_seen // self.batch_size
        if self.accelerator.num_processes > 1 and step % AGREE_EVERY_STEPS:
            return False
        return self._agree_to_stop()

    def _agree_to_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self._stop_signal is not None
        asked = torch.tensor([float(self._stop_signal is not None)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, reduction="sum") > 0)

    def _interruption(self, num_images_seen: int) -> TrainingInterrupted:
        return TrainingInterrupted(
            f"{self.stage} stopped and saved at {num_images_seen:,} of {self.num_images:,} images; "
            "run the same command to resume"
        )

    def _on_signal(self, number, frame) -> None:
        # torchrun sends a signal of its own after the terminal's
        is_relayed = "TORCHELASTIC_RUN_ID" in os.environ
        if self._stop_signal is not None and number == signal.SIGINT and not is_relayed:
            raise KeyboardInterrupt
        if self._stop_signal is not None:
            return
        self._stop_signal = number
        how = "press Ctrl-C again to stop without saving"
        if "ACCELERATE_MIXED_PRECISION" in os.environ:
            how = "the launcher may end first; wait for 'stopped and saved'"
        self.say(f"\n{signal.Signals(number).name}: saving after this step, then stopping ({how})")
