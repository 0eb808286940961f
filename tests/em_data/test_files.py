"""Files that are there whole or not at all."""

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
