"""Files that are there whole or not at all."""

import contextlib
import errno
import os

import pytest

from em_data import files


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: ... (os error 28)")]
)
def test_a_full_disk_is_told_with_the_path_and_leaves_the_old_file(tmp_path, monkeypatch, error):
    """Libraries have errors of their own for it."""

    def fail(descriptor):
        raise error

    path = tmp_path / "config.json"
    files.write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"config\.json cannot be written: No space left"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    for build in (files.build_folder, files.replace_folder):
        with (
            pytest.raises(OSError, match=r"model cannot be written: No space left"),
            build(tmp_path / "model"),
        ):
            raise error
    assert [item.name for item in tmp_path.iterdir()] == ["config.json"]


def start_and_fail(folder, *names):
    with files.leave_nothing_if_refused(folder, ["a"]):
        for name in names:
            files.write_atomically(folder / name, "")
        raise ValueError("refused")


def test_what_is_refused_leaves_nothing(tmp_path):
    folder = tmp_path / "runs" / "new"
    for names in ((), ("a", "stage/.lock")):
        with pytest.raises(ValueError, match="refused"):
            start_and_fail(folder, *names)
        assert not (tmp_path / "runs").exists()
    for names in (("a", "stage/result"), ("stage/a",)):  # a result; then a start beside it
        with pytest.raises(ValueError, match="refused"):
            start_and_fail(folder, *names)
        assert {path.name for path in folder.rglob("*")} == {"a", "stage", "result"}
        assert (folder / "a").exists()


def test_an_empty_folder_of_what_is_refused_goes(tmp_path):
    def make_and_fail(folder):
        with files.leave_nothing_if_refused(folder, ["a"]):
            files.make_folder(folder)
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        make_and_fail(tmp_path / "runs" / "new")
    assert not (tmp_path / "runs").exists()


def test_what_another_process_has_begun_stays(tmp_path):
    def fail_beside(held):
        with files.leave_nothing_if_refused(tmp_path / "run", ["a"]):
            held.enter_context(files.lock(tmp_path / "run" / ".lock"))
            files.write_atomically(tmp_path / "run" / "a", "")
            raise ValueError("refused")

    with contextlib.ExitStack() as held:
        with pytest.raises(ValueError, match="refused"):
            fail_beside(held)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"a", ".lock"}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_named_and_a_kill_leaves_nothing_that_blocks(
    tmp_path, monkeypatch, capsys, number
):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    for _ in range(2):  # the second as after a kill, which leaves the file
        with files.lock(tmp_path / "x.lock", "in use"):
            (tmp_path / "x.lock").touch()
    expected = (
        f"The disk of {tmp_path} has no file locks, so nothing keeps two processes from writing"
    )
    assert capsys.readouterr().err.count(expected) == 1
