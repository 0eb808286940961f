"""Trainings of two processes: run by test_run.py as `torchrun two_processes.py OUT`."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import accelerate
import torch

from em_training import TrainingInterrupted, leave_processes, list_checkpoints, read_stats
from support.toy_loop import Killed, train

torch.set_num_threads(1)
out = Path(sys.argv[1])
TIMES = {"train_seconds", "images_per_second"}


def read_log(name):
    return [
        {k: v for k, v in line.items() if k not in TIMES} for line in read_stats(out / name / "toy")
    ]


def kill(num_images_seen):
    if num_images_seen == 20:
        raise Killed


def stop_one(num_images_seen):
    if num_images_seen == 16 and accelerate.PartialState().process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)


# each process has seen other losses by the checkpoint at 16, and the line at 24 is the mean of all:
# to the bit the same
whole = train(out / "whole", 64, log_every=24)
with contextlib.suppress(Killed):
    train(out / "parts", 64, log_every=24, before_step=kill)
assert list_checkpoints(out / "parts/toy/checkpoints")[-1].name == "000000000016"
parts = train(out / "parts", 64, log_every=24)
assert torch.equal(whole["model"]["weight"], parts["model"]["weight"])
assert read_log("whole") == read_log("parts"), (read_log("whole"), read_log("parts"))
assert [line["num_images_seen"] for line in read_log("whole")] == [24, 48, 64]
assert abs(read_log("whole")[0]["rank"] - 1 / 6) < 1e-6

# one process is asked to stop in the last step, which is none of those at which they agree: both
# stop
try:
    train(out / "stopped", 20, before_step=stop_one)
except TrainingInterrupted as stop:
    print("stopped:", stop)
print("both done" if accelerate.PartialState().is_main_process else "other done")
leave_processes()
