import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from em_training import (
    NonFiniteLossError,
    TrainingInterrupted,
    TrainingRun,
    create_accelerator,
    list_checkpoints,
    load_checkpoint,
    lock_folder,
    read_stats,
    save_checkpoint,
)
from support.commands import TORCHRUN
from support.toy_loop import train

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def start(out_dir, num_images, seconds_per_step):
    command = [
        sys.executable,
        str(ROOT / "tests/support/toy_loop.py"),
        str(out_dir),
        str(num_images),
        str(seconds_per_step),
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": PATHS},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(folder):
    for _ in range(600):
        if list_checkpoints(folder):
            return
        time.sleep(0.1)
    raise AssertionError("no checkpoint came")


def test_resumed_equals_uninterrupted_and_logs_the_same(tmp_path):
    whole = train(tmp_path / "whole", 64)
    train(tmp_path / "parts", 28)
    parts = train(tmp_path / "parts", 64)
    assert_equal(whole, parts)
    losses = [
        [line["loss"] for line in read_stats(tmp_path / name / "toy")]
        for name in ("whole", "parts")
    ]
    assert len(losses[0]) == 8
    # a run that ends at 28 logs there too; from the next line on the two agree
    assert losses[0][4:] == losses[1][5:]
    assert list((tmp_path / "whole" / "tensorboard" / "toy").glob("events*"))


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, capfd):
    train(tmp_path / "a", 32)
    reference = train(tmp_path / "b", 64)
    (list_checkpoints(tmp_path / "a/toy/checkpoints")[-1] / "state.json").write_text("{")
    assert_equal(reference, train(tmp_path / "a", 64))
    assert "damaged" in capfd.readouterr().err


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(
        NonFiniteLossError, match=r"loss is not finite.*000000000032.*learning rate"
    ):
        train(tmp_path, 64, poison_at=36)
    newest = list_checkpoints(tmp_path / "toy/checkpoints")[-1]
    assert all(torch.isfinite(w).all() for w in load_checkpoint(newest)["state"]["model"].values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_so(tmp_path, number):
    process = start(tmp_path, 40_000, 0.005)
    wait_for_checkpoint(tmp_path / "toy/checkpoints")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert "TrainingInterrupted" in errors
    assert "run the same command to resume" in errors
    newest = list_checkpoints(tmp_path / "toy/checkpoints")[-1]
    assert f"saved at {int(newest.name):,} of" in errors


def test_kill_at_random_moments_leaves_a_loadable_checkpoint(tmp_path):
    """Saving back to back, so that most kills fall into a save."""
    folder = tmp_path / "checkpoints"
    code = (
        "import sys, torch; from em_training import save_checkpoint, list_checkpoints\n"
        "n = int(list_checkpoints(sys.argv[1])[-1].name) if list_checkpoints(sys.argv[1]) else 0\n"
        "while True:\n"
        "    n += 1; save_checkpoint(sys.argv[1], n, {'n': n, 'x': torch.full((200_000,), "
        "float(n))})\n"
    )
    save_checkpoint(folder, 0, {"n": 0, "x": torch.zeros(200_000)})
    rng = random.Random(0)
    newest = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": PATHS},
        )
        before = newest
        while newest == before and process.poll() is None:
            time.sleep(0.02)
            newest = int(list_checkpoints(folder)[-1].name)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.wait()
        last = list_checkpoints(folder)[-1]
        content = load_checkpoint(last)
        assert content["n"] == int(last.name) > before
        assert (content["x"] == content["n"]).all()
        newest = content["n"]


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    process = start(tmp_path, 40_000, 0.005)
    wait_for_checkpoint(tmp_path / "toy/checkpoints")
    try:
        with pytest.raises(ValueError, match="another process is training"):
            train(tmp_path, 64)
    finally:
        process.kill()
        process.communicate()


def test_a_folder_is_locked_once_and_freed(tmp_path):
    with lock_folder(tmp_path / "run"):
        with lock_folder(
            tmp_path / "run", is_main_process=False
        ):  # other processes of one training
            pass
        with (
            pytest.raises(ValueError, match="another process is training"),
            lock_folder(tmp_path / "run"),
        ):
            raise AssertionError
    with lock_folder(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    ("is_finished", "error"),
    [(False, TrainingInterrupted), (True, KeyboardInterrupt)],
    ids=["before", "after"],
)
@pytest.mark.parametrize(
    "handler", [signal.default_int_handler, signal.SIG_IGN], ids=["handled", "ignored"]
)
def test_a_signal_after_the_last_step_is_not_lost(tmp_path, is_finished, error, handler):
    """Between the last step's look and the end of the stage: the stage is whole, and what comes
    next does not begin.
    """
    before = signal.signal(
        signal.SIGINT, handler
    )  # ignored: as in what a shell has started in the background
    sizes = {
        "num_images": 4,
        "batch_size": 4,
        "log_every": 4,
        "sample_every": 0,
        "checkpoint_every": 4,
    }

    def train_one_step():
        accelerator = create_accelerator(tmp_path, "no")
        with TrainingRun(tmp_path, "toy", SimpleNamespace(**sizes), accelerator) as run:
            run.resume({})
            run.step(4)
            if is_finished:
                run.finish(4)
            os.kill(os.getpid(), signal.SIGINT)
            if not is_finished:
                run.finish(4)

    try:
        with pytest.raises(error):
            train_one_step()
    finally:
        signal.signal(signal.SIGINT, before)
    assert list_checkpoints(tmp_path / "toy/checkpoints")


def test_two_processes_resume_their_own_sums_and_stop_together(tmp_path, capsys):
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": PATHS,
    }
    program = Path(__file__).with_name("two_processes.py")
    done = subprocess.run(
        [*TORCHRUN, str(program), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stopped: toy stopped and saved at 20 of 20") == 2
    assert "both done" in done.stdout
    # one process goes on with the checkpoint of two
    train(tmp_path / "parts", 80)
    assert "is of 2 processes, this training has 1" in capsys.readouterr().err
    assert list_checkpoints(tmp_path / "parts/toy/checkpoints")[-1].name == "000000000080"


def test_intervals_are_crossed_once_whatever_the_batch():
    for batch_size in (3, 4, 7):
        run = TrainingRun.__new__(TrainingRun)
        run.batch_size, run.num_images = batch_size, 10**9
        counts = [n for n in range(batch_size, 700, batch_size) if run.is_due(50, n)]
        assert [n // 50 for n in counts] == list(range(1, len(counts) + 1))
        assert not run.is_due(0, batch_size)


def test_stats_survive_a_line_cut_short(tmp_path):
    (tmp_path / "stats.jsonl").write_text(
        json.dumps({"num_images_seen": 8, "loss": 1.0}) + '\n{"num_ima'
    )
    assert read_stats(tmp_path) == [{"num_images_seen": 8, "loss": 1.0}]
    assert TrainingInterrupted.__doc__


def test_a_long_stage_is_estimated_once_after_the_first_steps(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("em_training.run.SECONDS_TO_ESTIMATE", 0)
    monkeypatch.setattr("em_training.run.LONG_HOURS", 0)
    train(tmp_path, 32)
    said = r"about \d+ hours to go on this CPU at [\d.e+]+ images/s\n"
    assert len(re.findall(said, capfd.readouterr().err)) == 1
