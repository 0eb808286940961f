import pytest
import torch

from em_data import DataConfig
from em_generation import evaluate as evaluation
from em_generation.evaluate import (
    EvaluationConfig,
    evaluate_runs,
    find_data,
    generate_starts,
    name_models,
    parse_pairs,
    refuse_other_splits,
)
from em_generation.extractors import create_extractors, pair_weights
from em_generation.families import find_family
from em_generation.loading import Model


def info(name="run", kind="ldm", **changes):
    values = {"pipeline_folder": None, "folder": None, "data": {}, "config": {}} | changes
    return Model("source", name, find_family(kind), kind, **values)


@pytest.fixture
def runs(monkeypatch):
    infos = {
        "a/ldm": info(
            "ldm", config={"data": "here", "tiles": {"resolution": 64, "split": "specimen"}}
        ),
        "b/ldm": info("other", data={"name": "set", "split_hash": "1"}),
        "c/gan": info("gan", "stylegan2"),
    }
    monkeypatch.setattr(evaluation, "read_model", infos.__getitem__)
    return infos


def test_models_are_named_by_family_while_that_is_clear(runs):
    assert list(name_models(("a/ldm", "c/gan"))) == ["LDM", "StyleGAN2"]
    assert list(name_models(("a/ldm", "b/ldm", "c/gan"))) == ["ldm", "other", "StyleGAN2"]
    assert list(name_models(("mine=a/ldm", "c/gan"))) == ["mine", "StyleGAN2"]
    with pytest.raises(ValueError, match="two models are called x"):
        name_models(("x=a/ldm", "x=c/gan"))
    with pytest.raises(ValueError, match="no model was named"):
        name_models(())


def test_data_is_that_of_the_run_unless_flags_say_else(runs):
    models = name_models(("a/ldm", "c/gan"))
    config = EvaluationConfig(models=())
    assert find_data(config, models) == ("here", DataConfig(resolution=64, split="specimen"))
    config = EvaluationConfig(
        models=(), data="there", tiles=("resolution=32", "cache_dir=null", "intensity=full")
    )
    assert find_data(config, models) == (
        "there",
        DataConfig(resolution=32, split="specimen", intensity="full"),
    )
    with pytest.raises(ValueError, match="--data FOLDER"):
        find_data(EvaluationConfig(models=()), name_models(("c/gan",)))
    with pytest.raises(ValueError, match="Did you mean 'resolution'"):
        find_data(EvaluationConfig(models=(), tiles=("resolutoin=32",)), models)


def test_pairs_are_read_as_json_where_they_are_json():
    assert parse_pairs(("a=64", "b=true", "c=null", "d=paper", "e=[1, 2]")) == {
        "a": 64,
        "b": True,
        "c": None,
        "d": "paper",
        "e": [1, 2],
    }
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_pairs(("resolution",))


def test_a_model_of_another_split_is_refused(runs):
    models = name_models(("b/ldm",))
    refuse_other_splits(models, {"name": "set", "split_hash": "1"})
    with pytest.raises(ValueError, match="another split"):
        refuse_other_splits(models, {"name": "set", "split_hash": "2"})


def test_the_start_of_a_transferred_run_is_not_called_untrained(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "read_model", lambda source: source)
    monkeypatch.setattr(evaluation, "generate", lambda config, name, model: ((name, model), {}))
    models = {}
    for name, start in (("A", "untrained"), ("B", "start"), ("C", None)):
        (tmp_path / name).mkdir()
        models[name] = info(folder=tmp_path / name)
        if start:
            (tmp_path / name / start).mkdir()
            (tmp_path / name / start / "model_index.json").write_text("{}")
    models["D"] = info(folder=None)
    config = EvaluationConfig()
    assert generate_starts(config, models, "untrained") == {
        "A": ("A untrained", str(tmp_path / "A" / "untrained"))
    }
    assert generate_starts(config, models, "start") == {
        "B": ("B start", str(tmp_path / "B" / "start"))
    }


def test_weights_go_to_the_extractor_that_they_name():
    assert pair_weights(("w=1.pt",), ("inception",)) == {
        "inception": "w=1.pt"
    }  # a path may hold a sign of equality
    assert pair_weights(("dinov2=folder", "inception=w.pt"), ("inception", "dinov2")) == {
        "dinov2": "folder",
        "inception": "w.pt",
    }
    with pytest.raises(ValueError, match="EXTRACTOR=PATH with one of inception, dinov2"):
        pair_weights(("w.pt",), ("inception", "dinov2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"floors": ("ceiling",)}, "unknown floors ceiling"),
        ({"extractors": ()}, "one or more names"),
        ({"extractors": ("inception", "inception")}, "each once"),
        ({"feature_precision": "fp8"}, "no or bf16"),
        ({"resize_mode": "clean"}, "--resize-mode belongs to inception, which is not among"),
        ({"metrics": ("fid",)}, "unknown metrics fid; there are frechet_distance"),
        ({"metrics": ("cmmd",)}, "add the extractor clip"),
    ],
)
def test_mistakes_in_the_flags_show_before_anything_long(changes, message):
    state = type("State", (), {"device": "cpu"})()
    with pytest.raises(ValueError, match=message):
        create_extractors(EvaluationConfig(models=("a",), **changes), {"resolution": 64}, state)


def test_extractors_take_their_own_options():
    state = type("State", (), {"device": "cpu"})()
    config = EvaluationConfig(
        models=("a",), input_px=96, feature_precision="bf16", metrics=("kernel_distance",)
    )
    (extractor,) = create_extractors(config, {"resolution": 64}, state)
    assert "96 x 96" in extractor.identity
    assert extractor.dtype is torch.bfloat16


def test_comparing_reports_evaluates_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least two reports"):
        evaluate_runs(EvaluationConfig(compare=(str(tmp_path),)))
    with pytest.raises(ValueError, match="in a call of its own"):
        evaluate_runs(EvaluationConfig(models=("a",), compare=("b", "c")))
    with pytest.raises(ValueError, match=r"not a report\.json of evaluate\.py"):
        evaluate_runs(EvaluationConfig(compare=(str(tmp_path), str(tmp_path))))
