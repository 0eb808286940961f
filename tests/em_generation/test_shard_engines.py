"""Shards on engines: SLURM arrays by a stand-in, and datatrove's executors."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from em_generation.generate import GenerationConfig
from em_generation.shards.check import check_shards
from em_generation.shards.plan import ShardOptions
from em_generation.shards.runner_config import RunnerConfig, read_command
from em_generation.shards.work import generate_shard
from support.models import make_stylegan
from support.slurm import Slurm

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "docs" / "slurm"
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stylegan")
    make_stylegan().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def list_words(model, out, num_images=600):
    words = ["--model", model, "--out", str(out), "--num-images", str(num_images)]
    words += ["--images-per-file", "100", "--format", "arrow", "--precision", "no"]
    return [*words, "--batch-size", "20"]


def write_whole(model, out, num_images=600):
    """Write what the words above ask for in this process."""
    shards = ShardOptions("1/1", images_per_file=100)
    values = {"num_images": num_images, "batch_size": 20, "precision": "no", "format": "arrow"}
    generate_shard(GenerationConfig(model, str(out), shards=shards, **values))


def read_files(out):
    return {path.name: path.read_bytes() for path in sorted((Path(out) / "data").iterdir())}


@pytest.mark.slow
def test_slurm_arrays_generate_and_judge(model, tmp_path):
    slurm, out = Slurm(tmp_path / "slurm"), tmp_path / "out"
    env = {"NUM_SHARDS": "3"}
    job = slurm.sbatch(
        TEMPLATES / "generate.sbatch",
        *list_words(model, out),
        options=["--array=1-3%2"],
        cwd=ROOT,
        env=env,
    )
    # the node of one task fails: SLURM starts the task again, and it goes on
    task = job.tasks[1]
    limit = time.monotonic() + 120
    while not (out / "data").is_dir() and time.monotonic() < limit:
        time.sleep(0.02)
    task.fail_node()
    assert set(job.wait().values()) == {0}
    assert task.num_restarts == 1
    assert check_shards(out).is_whole
    write_whole(model, tmp_path / "whole")
    assert read_files(out) == read_files(tmp_path / "whole")

    judge = slurm.sbatch(
        TEMPLATES / "judge.sbatch",
        *["--features-of", str(out), "--input-px", "64"],
        options=["--array=1-3%2"],
        cwd=ROOT,
        env=env,
    )
    assert set(judge.wait().values()) == {0}
    (folder,) = (out / "features").iterdir()
    assert len(list(folder.iterdir())) == 6


def run_module(*words, env=None):
    return subprocess.run(
        [sys.executable, "-m", "em_generation.shards", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
    )


@pytest.mark.slow
def test_datatrove_runs_shards_on_this_machine(model, tmp_path):
    pytest.importorskip("datatrove")
    out, logs = tmp_path / "out", tmp_path / "logs"
    runner = ("--logs", logs, "--tasks", 3, "--workers", 2)
    words = list_words(model, out)
    done = run_module(*runner, "--", "generate.py", *words)
    assert done.returncode == 0, done.stderr
    write_whole(model, tmp_path / "whole")
    assert read_files(out) == read_files(tmp_path / "whole")
    assert len(list((logs / "completions").iterdir())) == 3
    # the same logs again: what is missing now is written
    next((out / "data").iterdir()).unlink()
    assert not check_shards(out).is_whole
    done = run_module(*runner, "--", "generate.py", *words)
    assert done.returncode == 0, done.stderr
    assert read_files(out) == read_files(tmp_path / "whole")
    # a shard that fails is not marked as completed
    failed = run_module(
        "--logs", tmp_path / "other", "--tasks", 1, "--", "generate.py", *words, "--seed", "1"
    )
    assert failed.returncode != 0
    assert "seed differs" in failed.stdout + failed.stderr
    assert not (tmp_path / "other" / "completions").exists()


@pytest.mark.slow
def test_datatrove_writes_a_script_for_slurm(model, tmp_path):
    pytest.importorskip("datatrove")
    slurm, out, logs = Slurm(tmp_path / "slurm"), tmp_path / "out", tmp_path / "logs"
    stand_in = tmp_path / "slurm" / "bin" / "sbatch"
    stand_in.write_text("#!/bin/sh\necho Submitted batch job 7\n")
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}{os.pathsep}{ENVIRONMENT['PATH']}"
    started = run_module(
        *("--logs", logs, "--tasks", 3, "--workers", 2, "--executor", "slurm"),
        *("--partition", "gpu", "--gpus", 1, "--", "generate.py", *list_words(model, out)),
        env={"PATH": path},
    )
    assert started.returncode == 0, started.stderr
    script = (logs / "launch_script.slurm").read_text()
    for line in ("--array=0-2%2", "--partition=gpu", "--gpus=1", "--requeue", "--time=12:00:00"):
        assert f"#SBATCH {line}\n" in script
    # the stand-in takes neither of these
    kept = [line for line in script.splitlines() if "--error" not in line and "--gpus" not in line]
    (tmp_path / "script.sh").write_text("\n".join(kept) + "\n")
    job = slurm.sbatch(tmp_path / "script.sh", cwd=ROOT, env={"SLURM_NODELIST": "node0"})
    assert set(job.wait().values()) == {0}
    assert check_shards(out).is_whole


def test_wrong_command_lines_are_refused():
    assert read_command(["python", "generate.py", "--out", "x"]) == ("generate", ["--out", "x"])
    assert read_command(["em-evaluate", "--merge"]) == ("evaluate", ["--merge"])
    for words in ([], ["train_ldm.py"], ["generate.py", "--shard", "1/2"]):
        with pytest.raises(ValueError, match=r"generate\.py or evaluate\.py with its flags"):
            read_command(words)
    with pytest.raises(ValueError, match="needs --partition"):
        RunnerConfig("logs", executor="slurm")
