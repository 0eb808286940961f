"""The batch script for training, run by the stand-in for SLURM."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from em_training import list_checkpoints
from support.slurm import Slurm

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "docs" / "slurm" / "train.sbatch"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
TOY = """import sys
from em_training.cli import run_command
from support.toy_loop import train
run_command(lambda: train(sys.argv[1], 40_000, seconds_per_step=0.01))
"""
HERE = ["--ntasks-per-node=1", "--cpus-per-task=1"]


def start(tmp_path, *words):
    """Start the template on two nodes with one process each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_PORT": str(port),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    slurm = Slurm(tmp_path / "slurm")
    return slurm.sbatch(TEMPLATE, *words, options=HERE, env=environment, cwd=ROOT)


def test_a_training_saves_itself_before_the_time_limit_and_is_queued_again(tmp_path):
    """A toy training: warned, it saves and is queued again; `scancel --signal` ends it for good."""
    (tmp_path / "train.py").write_text(TOY)
    job = start(tmp_path, str(tmp_path / "train.py"), str(tmp_path / "run"))
    task = job.tasks[None]
    task.wait_for_path(tmp_path / "run/toy/checkpoints/000000000016")
    task.warn()
    task.wait_for("toy: resuming at")
    task.signal_steps(signal.SIGUSR1)
    # the first that ends may end the other one, which has saved as well
    assert job.wait(120)[None] in (130, 128 + signal.SIGTERM, 128 + signal.SIGKILL), task.text
    assert task.num_restarts == 1
    assert task.text.count("SIGUSR1: saving after this step") == 2
    assert task.text.count("toy stopped and saved at") >= 2
    assert list_checkpoints(tmp_path / "run/toy/checkpoints")


def test_a_mistake_of_the_user_is_not_queued_again(tmp_path):
    job = start(tmp_path, "train_gan.py", "test", "--out", str(tmp_path), "--no-such-flag")
    assert job.wait(60)[None] not in (0, None)
    assert job.tasks[None].num_restarts == 0
