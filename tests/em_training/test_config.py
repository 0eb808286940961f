from dataclasses import dataclass, field

import pytest

from em_training import (
    changed_fields,
    config_from_json,
    config_to_json,
    load_config,
    refuse_other_data,
    save_config,
)


@dataclass(frozen=True)
class Inner:
    width: int = 3
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 1.0
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)


def test_json_and_back_is_the_identity(tmp_path):
    config = Outer("a", rate=1e-4, limit=7, inner=Inner(5, (0.0, 0.5)))
    assert config_from_json(Outer, config_to_json(config)) == config
    save_config(config, tmp_path / "deep" / "config.json")
    assert load_config(Outer, tmp_path / "deep" / "config.json") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"name": "a", "inner": {"widht": 3}}',
            r"unknown key 'inner\.widht'; did you mean 'width'",
        ),
        ('{"name": 3}', "'name' must be str"),
        ('{"name": "a", "inner": {"betas": [1]}}', "must hold 2 values"),
        ('{"name": "a", "limit": "x"}', "'limit' must be"),
        ("{}", "missing"),
        ('{"name": "a", "rate": true}', "'rate' must be float"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(Outer, text)


def test_changed_fields_are_dotted():
    assert changed_fields(Outer("a"), Outer("a", limit=2, inner=Inner(4))) == {
        "limit": (None, 2),
        "inner.width": (3, 4),
    }


def test_other_data_is_refused_and_the_same_is_not(tmp_path):
    summary = {"fingerprint": "a", "split_hash": "b", "num_micrographs": 3, "name": "x"}
    refuse_other_data(tmp_path, summary)
    refuse_other_data(tmp_path, summary | {"name": "moved"})
    with pytest.raises(ValueError, match="3 then, 4 now"):
        refuse_other_data(tmp_path, summary | {"num_micrographs": 4, "split_hash": "c"})
