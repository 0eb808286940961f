"""The benchmark of shards at small size: killed workers lose and double nothing.

EM_SHARD_IMAGES=20000 runs it with as many images: 20 shards by 4 workers, of which 10 are killed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["arrow", "webdataset"])
def test_killed_workers_lose_nothing(tmp_path, format):
    num = int(os.environ.get("EM_SHARD_IMAGES", 0))
    words = ["--num-images", 400, "--images-per-file", 50, "--num-shards", 8, "--num-workers", 2]
    words += ["--num-kills", 3]
    if num:
        words = ["--num-images", num, "--images-per-file", num // 20]
    words += ["--format", format, "--parts", "killed", "features"]
    words += ["--out", tmp_path / "results.json"]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "shards.py", *map(str, words)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        check=True,
    )
    found = json.loads((tmp_path / "results.json").read_text())
    killed = found["killed"]
    assert killed["with_kills"]["num_killed"] >= 2
    assert killed["after_kills"]["missing"] >= killed["with_kills"]["num_killed"] - 1
    assert killed["after_the_rest"]["is_whole"]
    assert killed["files_that_differ_from_one_process"] == 0
    deviations = found["features"]["largest_relative_deviation_from_one_evaluation"]
    assert max(deviations.values()) < 1e-9
