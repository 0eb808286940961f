"""What a run records of the models that it starts from."""

import json

import pytest

from em_training.sources import describe_origin, read_starts, say_starts, write_starts


def test_a_run_says_what_each_part_started_from(tmp_path):
    source = tmp_path / "first" / "pipeline"
    source.mkdir(parents=True)
    (source / "README.md").write_text("---\nlicense: mit\ntags:\n- x\n---\nlicense: none\n")
    out = tmp_path / "out"
    out.mkdir()
    assert read_starts(out) == {}
    assert say_starts(read_starts(out)) == say_starts(None) == ""
    write_starts(out, str(source), {"autoencoder": {"use": "unchanged"}})
    write_starts(out, str(tmp_path / "first"), {"denoiser": {"use": "trained further"}})
    expected = {"model": "first", "license": "mit"}
    assert read_starts(out) == {
        "autoencoder": expected | {"use": "unchanged"},
        "denoiser": expected | {"use": "trained further"},
    }
    assert say_starts(read_starts(out)) == "first's autoencoder (unchanged) and denoiser"


def test_two_models_are_named_one_after_the_other():
    started = {"autoencoder": {"model": "a", "use": "unchanged"}, "denoiser": {"model": "b"}}
    assert say_starts(started) == "a's autoencoder (unchanged); b's denoiser"
    assert say_starts({"autoencoder": "damaged"}) == ""


@pytest.mark.parametrize("name", ["run", "renamed"])
def test_a_run_is_called_by_its_record(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"name": name}))
    assert describe_origin(str(folder)) == {"model": name}


def test_a_checkpoint_file_has_no_licence(tmp_path):
    path = tmp_path / "vqgan.ckpt"
    path.touch()
    assert describe_origin(str(path)) == {"model": "vqgan.ckpt"}
