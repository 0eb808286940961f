import json
from dataclasses import field, replace
from typing import Annotated, Literal

import pytest
from annotated_types import Gt
from pydantic.dataclasses import dataclass

from em_training import (
    MAY_CHANGE,
    changed_fields,
    config_from_json,
    config_to_json,
    load_config,
    parse_pairs,
    refuse_other_data,
    refuse_other_run,
    save_config,
    strict,
)
from support.config import refuses_config


@dataclass(frozen=True, config=strict("inner"))
class Inner:
    width: Annotated[int, Gt(0)] = 3
    betas: tuple[float, float] = (0.9, 0.99)
    kind: Literal["a", "b"] = "a"
    log_every: Annotated[int, MAY_CHANGE] = 1

    def __post_init__(self):
        if self.width == 7:
            raise ValueError("inner.width is 7, but 7 is taken. Use --inner.width 8.")


@dataclass(frozen=True, config=strict())
class Outer:
    name: str
    rate: float = 1.0
    limit: Annotated[int, Gt(0)] | None = None
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
            r"Unknown key 'inner\.widht'. Did you mean 'inner\.width'?",
        ),
        ('{"name": "a", "xyz": 3}', "Unknown key 'xyz'.$"),
        ('{"name": 3}', "name is 3, but must be a valid string. Use --name."),
        ('{"name": "a", "inner": {"betas": [1]}}', "'inner.betas' is missing or too short"),
        ('{"name": "a", "limit": "x"}', "limit is 'x', but must be a valid integer"),
        ("{}", "'name' is missing"),
        ('{"name": "a", "rate": true}', "rate is True, but must be a valid number"),
        (
            '{"name": "a", "inner": {"log_every": true, "width": 0}}',
            r"inner\.width is 0, but must be greater than 0\. Use --inner\.width\. "
            r"inner\.log_every is True, .* Use --inner\.log-every\.",
        ),
        ('{"name": "a", "inner": {"kind": "c"}}', r"inner.kind is 'c', but must be 'a' or 'b'"),
        ('{"name": "a", "inner": {"width": 7}}', "^inner.width is 7, but 7 is taken"),
        ('{"name": ', "not JSON"),
    ],
)
def test_mistakes_are_named(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config_from_json(Outer, text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json(: | is damaged)"):
        load_config(Outer, tmp_path / "config.json")


def test_pairs_are_read_as_json_where_they_are_json():
    pairs = ("a=64", "b=true", "c=null", "d-d=paper", "e=[1, 2]")
    assert parse_pairs(pairs, "--f", "a=1") == {
        "a": 64,
        "b": True,
        "c": None,
        "d_d": "paper",
        "e": [1, 2],
    }
    with pytest.raises(ValueError, match="--f takes KEY=VALUE, such as a=1, not 'resolution'"):
        parse_pairs(("resolution",), "--f", "a=1")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_with_the_flag(value):
    with refuses_config("rate is (nan|inf), but must be a finite number. Use --rate."):
        Outer("a", rate=value)
    with refuses_config("inner.betas is nan, but must be"):
        replace(Inner(), betas=(0.0, float("nan")))


def test_changed_fields_are_dotted():
    assert changed_fields(Outer("a"), Outer("a", limit=2, inner=Inner(4))) == {
        "limit": (None, 2),
        "inner.width": (3, 4),
    }


def test_only_marked_fields_may_change_in_a_run(tmp_path):
    old = Outer("a")
    refuse_other_run(tmp_path, old)  # nothing there yet
    save_config(old, tmp_path / "config.json")
    refuse_other_run(tmp_path, replace(old, inner=Inner(log_every=5)))
    wider = replace(old, inner=Inner(width=4))
    with pytest.raises(ValueError, match=r"inner\.width was 3, is now 4"):
        refuse_other_run(tmp_path, wider)
    refuse_other_run(
        tmp_path, wider, lambda name, old, new: (name, old, new) == ("inner.width", 3, 4)
    )


def test_a_folder_of_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"name": "a", "generator": {"depth": 2}}))
    with pytest.raises(ValueError, match="holds a run of another kind of model; choose another"):
        refuse_other_run(tmp_path, Outer("a"))
    stored = {"name": "a", "inner": {}, "removed": {}}  # another version of this kind
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="Unknown key 'removed'"):
        refuse_other_run(tmp_path, Outer("a"))


def test_other_data_is_refused_and_the_same_is_not(tmp_path):
    identity = {"fingerprint": "a", "split_hash": "b", "num_micrographs": 3}
    refuse_other_data(tmp_path, identity)
    refuse_other_data(tmp_path, identity)
    with pytest.raises(ValueError, match="num_micrographs was 3, is now 4"):
        refuse_other_data(tmp_path, identity | {"num_micrographs": 4, "split_hash": "c"})
    (tmp_path / "data.json").write_text("")  # as a power cut may leave it
    with pytest.raises(ValueError, match=r"data\.json is damaged"):
        refuse_other_data(tmp_path, identity)
