"""The simulation of an array of shards: nothing is lost or doubled, because of the locks."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cluster_plan

WORDS = ["--num-images", "1200", "--gpus", "12", "--straggling", "0.25"]


def simulate(folder, *words):
    args = cluster_plan.parse([*WORDS, *words])
    return cluster_plan.simulate(args, 10, 24, hours=12.0, start_hours=0.01, folder=folder)


@pytest.mark.parametrize("seed", [0, 1])
def test_failures_and_stragglers_lose_and_double_nothing(tmp_path, seed):
    found = simulate(tmp_path / "a", "--hours-between-failures", "1", "--seed", str(seed))
    assert found["failures"] > 3
    assert found["shards_begun_twice"] > 0
    assert found["files"] == 120
    assert found["files_lost"] == found["files_doubled"] == found["files_left_over"] == 0
    assert found["hours"] > found["hours_without_stragglers_and_failures"]
    assert found["gpu_hours_in_vain"] > 0
    again = simulate(tmp_path / "b", "--hours-between-failures", "1", "--seed", str(seed))
    assert found == again


def test_without_failures_the_time_is_that_of_the_work(tmp_path):
    words = ["--hours-between-failures", "1e9", "--straggling", "0"]
    found = simulate(tmp_path, *words)
    assert found["failures"] == 0
    # 10 of 120 files a worker, a tenth of an hour each with a deviation of 10 %, and two starts
    np.testing.assert_allclose(found["hours"], 1.02, rtol=0.1)


def test_without_locks_files_are_doubled(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_plan, "lock", lambda path, message: contextlib.nullcontext())
    assert simulate(tmp_path, "--hours-between-failures", "1")["files_doubled"] > 0
