"""Damaged files are read right or refused by name: never a traceback, a hang, or all memory."""

import json
import subprocess
import sys
from pathlib import Path

from support.mutations import make_pictures, write_mutations

CHILD = Path(__file__).with_name("read_files.py")


def read_files(paths):
    """Return what `read_files.py` prints of each path; fail with the file that ends it."""
    child = subprocess.run(
        [sys.executable, str(CHILD)],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    outcomes = [json.loads(line) for line in child.stdout.splitlines()]
    if child.returncode:
        culprit = paths[len(outcomes)]
        raise AssertionError(f"{culprit} ends the reader ({child.returncode}):\n{child.stderr}")
    return outcomes


def check_mutations(samples, num, folder, seed):
    """Assert that damaged copies of the samples are read right or refused by name."""
    sound = [folder / name for name in sorted(samples)]
    for path in sound:
        path.write_bytes(samples[path.name])
    hashes = {}
    for outcome in read_files(sound):
        assert "refused" not in outcome, outcome
        hashes[Path(outcome["path"]).name] = outcome["hashes"]
    wrong = []
    for outcome in read_files(write_mutations(samples, num, folder, seed)):
        name = Path(outcome["path"]).name
        _, mutation, sample = name.split("-", 2)
        if "refused" in outcome:
            if not outcome["refused"].startswith(outcome["path"]):
                wrong.append(f"{name}: the message does not name it: {outcome['refused']}")
        elif mutation == "truncate":
            read, whole = outcome["hashes"], hashes[sample]
            if read != whole[: len(read)]:
                wrong.append(f"{name}: cut short, but read with other pixels")
            elif len(read) < len(whole) and "truncated" not in "".join(outcome["notices"]):
                wrong.append(f"{name}: frames are missing, and nothing says so")
        if outcome["seconds"] > 10:
            wrong.append(f"{name}: took {outcome['seconds']:.0f} s")
    assert not wrong, "\n".join(wrong)


def test_2000_damaged_pictures(tmp_path):
    check_mutations(make_pictures(), 2000, tmp_path, seed=0)
