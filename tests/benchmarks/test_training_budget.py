"""The benchmark of a budget of training time: what both sides share."""

import json

import pytest
from training_budget import parse_arguments, prepare


def test_the_autoencoder_is_trained_as_long_as_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ["--preset", "test", "--out", str(tmp_path)]
    shared = prepare(parse_arguments([*command, "--autoencoder-images", "16"]))
    assert shared.config.autoencoder.num_images == 16
    assert (
        json.loads((tmp_path / "shared/autoencoder/result.json").read_text())["num_images_seen"]
        == 16
    )
    with pytest.raises(ValueError, match="Use another --out"):
        prepare(parse_arguments(command))


def test_a_trained_autoencoder_is_not_trained_longer():
    with pytest.raises(SystemExit):
        parse_arguments(["--autoencoder", "run", "--autoencoder-images", "16"])
    assert parse_arguments([]).autoencoder_images is None
