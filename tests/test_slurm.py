"""The stand-in for SLURM does what its first lines say."""

import signal

from support.slurm import Slurm, read_array


def write(tmp_path, *lines):
    path = tmp_path / "job.sbatch"
    path.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    return path


def test_an_array_runs_its_tasks_some_at_once(tmp_path):
    script = write(
        tmp_path,
        "#SBATCH --array=0-4%2  # of twenty",
        'touch "$1/run-$SLURM_ARRAY_TASK_ID"; ls "$1" | grep -c run; sleep 0.2',
        'rm "$1/run-$SLURM_ARRAY_TASK_ID"; exit $SLURM_ARRAY_TASK_ID',
    )
    (tmp_path / "running").mkdir()
    job = Slurm(tmp_path / "slurm").sbatch(
        script, str(tmp_path / "running"), options=["--array=0-5%2"]
    )
    assert job.wait(30) == {number: number for number in range(6)}
    assert {int(task.text) for task in job.tasks.values()} <= {1, 2}
    assert read_array("1,3-5%2") == ([1, 3, 4, 5], 2)


def test_a_step_runs_on_every_node(tmp_path):
    script = write(
        tmp_path,
        "#SBATCH -N 2 --ntasks-per-node=2",
        "scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1",
        "srun bash -c 'echo task $SLURM_PROCID/$SLURM_NTASKS $SLURM_NODEID $SLURM_LOCALID'",
        "srun -N 1 -n 1 bash -c 'kill -KILL $$'",
    )
    job = Slurm(tmp_path / "slurm").sbatch(script)
    assert job.wait(30) == {None: 137}
    first, *tasks = job.tasks[None].text.splitlines()
    assert first == "127.0.0.1"
    assert sorted(tasks) == ["task 0/4 0 0", "task 1/4 0 1", "task 2/4 1 0", "task 3/4 1 1"]


def test_a_warning_reaches_the_steps_and_a_job_is_requeued(tmp_path):
    script = write(
        tmp_path,
        "#SBATCH --nodes=2 --signal=USR1@300",
        """srun bash -c 'trap "exit 130" USR1; echo started; [ $SLURM_RESTART_COUNT ] ||
        while true; do sleep 0.05; done'""",
        "code=$?; [ $code -eq 130 ] && scontrol requeue $SLURM_JOB_ID; exit $code",
    )
    job = Slurm(tmp_path / "slurm").sbatch(script)
    task = job.tasks[None]
    task.wait_for("started", 2)
    task.warn()
    assert job.wait(30) == {None: 0}
    assert task.num_restarts == 1
    assert task.text.count("started") == 4


def test_a_failed_node_requeues_and_a_cancelled_job_does_not(tmp_path):
    script = write(
        tmp_path,
        "#SBATCH --requeue --signal=B:USR1@300",
        "trap 'echo warned' USR1",
        "echo started; srun sleep 60; exit 5",
    )
    job = Slurm(tmp_path / "slurm").sbatch(script)
    task = job.tasks[None]
    task.wait_for("started")
    task.fail_node()
    task.wait_for("started", 2)
    task.warn()
    task.cancel()
    assert job.wait(30)[None] in (5, 128 + signal.SIGTERM)
    assert task.num_restarts == 1
