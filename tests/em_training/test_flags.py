"""Presets and flags, by a command of three fields."""

import dataclasses
import io
import sys
from dataclasses import field
from typing import Annotated, Literal

import pytest
from annotated_types import Gt
from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from em_training import strict
from em_training.flags import (
    UsageError,
    _refuse_missing,
    find_nearest_flags,
    list_flags,
    parse_flags,
    parse_preset,
)


@dataclass(frozen=True, config=strict("tiles"))
class Tiles:
    """Tiles."""

    resolution: Annotated[int, Gt(0)] = 64
    """Side of a tile. In pixels."""
    kind: Literal["a", "b"] = "a"
    is_fast: bool = False


@dataclass(frozen=True, config=strict())
class Config:
    """All."""

    out: str = "here"
    tiles: Tiles = field(default_factory=Tiles)


def big() -> Config:
    """A big one.

    Hardware: one GPU of 12 GB.
    """
    return Config(tiles=Tiles(resolution=512))


PRESETS = {"demo": Config, "big": big}


def parse(*argv):
    return parse_preset(
        PRESETS,
        argv,
        command="do.py",
        default="demo",
        description="Do it.",
        main_flags=("out", "tiles.resolution", "tiles.not_there_yet"),
        epilog="The end.",
    )


def test_flags_override_a_preset():
    assert parse("big", "--out", "there") == (Config("there", Tiles(512)), "big")
    assert parse("--tiles.is-fast", "--tiles.kind=b") == (
        Config("here", Tiles(64, "b", True)),
        "demo",
    )
    assert parse("big", "--tiles.no-is-fast", "--tiles.is_fast") == (
        Config("here", Tiles(512, "a", True)),
        "big",
    )


def test_help_shows_the_main_flags_with_the_values_of_the_preset(capsys):
    for words, expected, absent in (
        (["--help"], ["Do it.", "demo", "big", "A big one."], ["Hardware", "--out"]),
        (
            ["big", "--help"],
            ["Hardware: one GPU", "--tiles.resolution 512", "Side of a tile.", "The end."],
            ["In pixels", "--tiles.kind"],
        ),
        (["big", "--help-all"], ["--tiles.kind {a,b}", "(default: 512)"], []),
    ):
        with pytest.raises(SystemExit) as stop:
            parse(*words)
        assert stop.value.code in (0, None)
        text = capsys.readouterr().out
        assert all(word in text for word in expected), text
        assert not any(word in text for word in absent), text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small"], "no preset 'small'. Presets: demo, big"),
        (["bgi"], "Did you mean big"),
        (["--preset=big"], "--preset is not a flag"),
        (["demo", "--otu", "x"], r"no flag --otu. Did you mean:\n  --out here"),
        (["demo", "--tiles.size", "3"], r"Did you mean:\n  --tiles.resolution 64 +Side of a tile"),
        (["demo", "--xyz"], r"no flag --xyz\.\n`python do.py demo --help`"),
        (["demo", "--tiles.kind", "c"], "--tiles.kind is c; choose one of a, b."),
        (["demo", "--tiles.resolution", "x"], "tiles.resolution"),
        (["demo", "--tiles.resolution"], "--tiles.resolution needs a value."),
        (["demo", "--out", "x", "y"], "y belongs to no flag."),
        (["demo", "big"], "big"),
    ],
)
def test_mistakes_are_plain_sentences(words, message):
    with pytest.raises(UsageError, match=message) as refused:
        parse(*words)
    assert not set("│╭╰") & set(str(refused.value))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro draws its boxes with hyphens
def test_missing_words_and_values_are_named(encoding, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Flags:
        """Flags."""

        run: str
        """A run."""
        note: str | None = None
        """A note. Default: no note."""
        mode: Literal["a", "b"] | None = None
        """A mode."""

    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    for words, message in (
        ([], r"^Give RUN\. See `python do.py --help`\.$"),
        (["x", "--mode", "c"], r"^--mode is c; choose one of a, b"),
        (["x", "--note"], r"^--note needs a value\."),
    ):
        with pytest.raises(UsageError, match=message):
            parse_flags([Flags], words, command="do.py", positional=["run"])
    with pytest.raises(SystemExit):
        parse_flags([Flags], ["--help"], command="do.py", positional=["run"])
    sys.stdout.flush()
    text = sys.stdout.buffer.getvalue().decode(encoding)
    assert "--note STR" in text
    assert "--mode {a,b}" in text
    assert "None" not in text


def test_an_impossible_value_is_the_configurations_own_error():
    with pytest.raises(ValidationError, match="resolution"):
        parse("big", "--tiles.resolution", "0")


def test_the_nearest_flags_come_first():
    flags = list(list_flags(Config()))
    assert [flag.name for flag in flags] == [
        "out",
        "tiles.resolution",
        "tiles.kind",
        "tiles.is-fast",
    ]
    for word, name in (("resolutoin", "tiles.resolution"), ("tiles.sise", "tiles.resolution")):
        assert find_nearest_flags(word, flags)[0].name == name
    assert find_nearest_flags("qqqq", flags) == []


def test_a_missing_flag_is_asked_for():
    with pytest.raises(UsageError, match="Give --out FOLDER"):
        _refuse_missing([("out", str, field())], [], (), "x.py")
    _refuse_missing([("out", str, field())], ["--out=a"], (), "x.py")
