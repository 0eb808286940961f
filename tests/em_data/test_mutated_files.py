"""Damaged files are read right or refused by name: never a traceback, a hang, or all memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.mutations import make_microscope_files, make_pictures, write_mutations

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


def check_mutations(samples, num, folder, seed, pixels=None):
    """Assert that damaged copies of the samples are read right or refused by name.

    pixels: {name: stretches of a sample that are pixels}. If they are given, a damaged copy must be
    refused, or give the pixels that lie there, or say something that the sound file does not.
    """
    sound = [folder / name for name in sorted(samples)]
    for path in sound:
        path.write_bytes(samples[path.name])
    hashes, notices = {}, {}
    for outcome in read_files(sound):
        assert "refused" not in outcome, outcome
        hashes[Path(outcome["path"]).name] = outcome["hashes"]
        notices[Path(outcome["path"]).name] = outcome["notices"]
    wrong, others = [], {}
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
        elif (
            pixels
            and outcome["hashes"] != hashes[sample]
            and set(outcome["notices"]) <= set(notices[sample])
        ):
            others[name] = outcome["hashes"]
        if outcome["seconds"] > 10:
            wrong.append(f"{name}: took {outcome['seconds']:.0f} s")
    repaired = [repair(folder / name, samples, pixels) for name in others]
    for name, outcome in zip(others, read_files(repaired) if repaired else []):
        if outcome.get("hashes") != others[name]:
            wrong.append(f"{name}: other pixels, and nothing says so")
    assert not wrong, "\n".join(wrong)


def repair(path, samples, pixels):
    """Write a sound copy of a damaged file but for the damage of its pixels, which no format tells.

    A file of another length is restored whole: its pixels do not lie where they should.
    """
    _, _, sample = path.name.split("-", 2)
    damaged, copy = path.read_bytes(), bytearray(samples[sample])
    if len(damaged) == len(copy):
        for stretch in pixels[sample]:
            start = samples[sample].index(stretch)
            copy[start : start + len(stretch)] = damaged[start : start + len(stretch)]
    repaired = path.with_name(f"repaired-{path.name}")
    repaired.write_bytes(copy)
    return repaired


def test_2000_damaged_pictures(tmp_path):
    check_mutations(make_pictures(), 2000, tmp_path, seed=0)


def check_microscopes(num, folder, seed):
    reason = 'RosettaSciIO is not installed: pip install "em-synthesis[microscopes]"'
    pytest.importorskip("rsciio", reason=reason)
    pytest.importorskip("h5py", reason=reason)
    files = make_microscope_files(folder)
    samples = {name: data for name, (data, _) in files.items()}
    check_mutations(
        samples, num, folder, seed, {name: stretches for name, (_, stretches) in files.items()}
    )


def test_80_damaged_files_of_microscopes(tmp_path):
    check_microscopes(80, tmp_path, seed=0)


@pytest.mark.slow
def test_2000_damaged_files_of_microscopes(tmp_path):
    check_microscopes(2000, tmp_path, seed=1)
