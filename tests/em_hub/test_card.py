"""The model card: no number of its own, and what the Hub reads off it."""

import json
import re
from pathlib import Path

import jinja2
import pytest
from huggingface_hub import ModelCard

import model_cards
from em_data.markdown import escape_markdown
from em_evaluation.evaluator import FORMAT
from em_evaluation.numbers import format_interval
from em_hub.card import create_environment, make_card, read_evaluation
from support.models import MAKERS

TEMPLATES = sorted(Path(model_cards.__file__).parent.glob("*.j2"))
RECORD = {
    "name": "my-run",
    "family": "ldm",
    "train_seconds": 61.5,
    "num_images_seen": 1234,
    "has_stages": True,
}
RECORD |= {
    "stages": {"autoencoder": 20.5, "denoiser": 41.0},
    "versions": {"torch": "9.8.7"},
    "config": {},
}
RECORD["data"] = {
    "name": "set",
    "num_micrographs": 4711,
    "num_held_out_micrographs": 31,
    "num_train_tiles": 12345,
}
RECORD["data"] |= {
    "num_held_out_tiles": 678,
    "split": "micrograph",
    "symmetries": "paper",
    "bits": 16,
    "intensity": "full",
}


def interval(value):
    return {"value": value, "low": value - 1, "high": value + 1}


def make_report(path):
    """A report of two models, in the form of evaluate.py."""
    settings = {
        "scheduler": "DDIMScheduler",
        "num_inference_steps": 7,
        "eta": 0.0,
        "seed": 0,
        "bits": 8,
    }
    levels = {
        "real": (5.5, None, "real against real"),
        "reconstruction": (9.75, "StyleGAN", "not of this one"),
        "untrained": (900.5, "StyleGAN2", "before training"),
    }
    values = {"StyleGAN": 50.25, "StyleGAN2": 36.125}
    values |= {kind: value for kind, (value, _, _) in levels.items()}
    rows = {
        key: {
            "held_out": {
                "frechet_distance": interval(value),
                "kernel_distance": interval(value / 100),
            }
        }
        for key, value in values.items()
    }
    measure = {"metric": "precision", "label": "Precision", "unit": "", "outcome": "as_real"}
    report = {
        "format": FORMAT,
        "dataset": {
            "name": "set",
            "split": "micrograph",
            "split_hash": "12ab",
            "source": "hidden",
            "held_out": ["hidden"],
        },
        "protocol": {
            "num_images": 2000,
            "extractor": "efficientnet-lite0, pooled",
            "intervals": "95 %, bootstrap",
            "notes": [],
            "reference_num_micrographs": 31,
        },
        "models": [
            {"name": "StyleGAN", "info": {"weights_sha256": "other"}, "curves": {}},
            {"name": "StyleGAN2", "info": settings | {"weights_sha256": "mine"}, "curves": {}},
        ],
        "levels": [
            {"key": kind, "kind": kind, "model": model, "part": None, "description": description,
             "title": f"{kind} {model or 'tiles'}"}
            for kind, (_, model, description) in levels.items()
        ],
        "measurements": [
            {
                "extractor": "efficientnet-lite0",
                "metrics": ["frechet_distance", "kernel_distance"],
                "rows": rows,
                "blind_spots": [],
            }
        ],
        "comparisons": [],
        "autoencoders": [],
        "verdicts": [
            {"model": model, "aspect": aspect, "outcome": outcome, "measures": [
                measure | {"value": interval(0.5), "reference": interval(0.5)}]}
            for model, outcome in (("StyleGAN", "differs"), ("StyleGAN2", "as_real"))
            for aspect in ("fidelity", "variety", "defects")
        ],
        "memorisation": None,
        "environment": {},
    }  # fmt: skip
    path.write_text(json.dumps(report))
    return path


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_has_no_number_of_its_own(path):
    environment = jinja2.Environment()
    for line, kind, text in environment.lex(path.read_text()):
        if kind not in ("comment", "whitespace"):
            assert not re.search(r"\d", text.replace(".j2", "")), (
                f"{path.name}:{line} says {text.strip()!r}"
            )
            assert kind not in ("integer", "float")


def test_there_are_templates():
    assert {"base.md.j2", "ldm.md.j2", "stylegan.md.j2"} <= {path.name for path in TEMPLATES}


@pytest.mark.parametrize("family", MAKERS)
def test_every_number_of_a_card_comes_from_its_sources(family, tmp_path):
    evaluation = read_evaluation(make_report(tmp_path / "report.json"), "mine")
    pipeline = MAKERS[family]()
    card = make_card(
        pipeline,
        repo_id="you/em",
        record=RECORD,
        evaluation=evaluation,
        license="cc-by-4.0",
        num_samples=5,
    )
    page = card.split("---\n", 2)[2]
    for number in (
        "4,711",
        "12,345",
        "678",
        "1,234",
        "61.5 s",
        "9.8.7",
        "2,000",
        "36.1 (35.1 to 37.1)",
        "0.500 nm",
    ):
        assert number in page
    assert "5.50 (4.50 to 6.50)" in page
    assert "900 (900 to 902)" in page
    for absent in (
        "50.2",
        "9.75",
        "hidden",
        "not of this one",
        "lower than real",
    ):
        assert absent not in page
    beside = "(precision 0.500 against 0.500 of other reference images)"
    assert f"StyleGAN2: fidelity as real {beside}, variety as real {beside}, defects" in page
    assert "num inference steps 7" in page
    assert ("VQModel.from_pretrained" in page) == (family != "stylegan")
    assert ("EMUNet2DModel.from_pretrained" in page) is False  # ours is no stock class
    assert "{{" not in page
    assert "{%" not in page
    bare = make_card(pipeline, repo_id="you/em", record={"name": "x", "versions": {}})
    for sentence in (
        "No evaluation was published",
        "not published from a training run",
        "has not stated one",
        "Not recorded.",
    ):
        assert sentence in bare
    assert "samples.png" not in bare
    assert not re.search(r"^\n\n\n", page, re.MULTILINE)


def test_a_card_says_that_a_model_is_one_of_several_trainings(tmp_path):
    path = make_report(tmp_path / "report.json")
    report = json.loads(path.read_text())
    group = {"seeds": ["0", "1", "2"], "exceeds_intervals": True}
    group["measurements"] = [{"held_out": {"frechet_distance": interval(37.5)}}]
    report["repeats"] = [
        group | {"name": "mine", "models": ["StyleGAN2", "private-1", "private-2"]},
        group | {"name": "theirs", "models": ["StyleGAN"], "seeds": ["8"]},
    ]
    path.write_text(json.dumps(report))
    evaluation = read_evaluation(path, "mine")
    card = make_card(MAKERS["stylegan"](), repo_id="you/em", record=RECORD, evaluation=evaluation)
    assert (
        "one of 3 trainings that differ in the seed alone (seeds 0, 1, 2): Frechet distance, "
        "median and range, 37.5 (36.5 to 38.5)."
    ) in card.replace("\\", "")
    assert "private" not in card + json.dumps(evaluation)
    assert "seeds 8" not in card


def test_a_card_says_of_grain_what_holds(tmp_path):
    path = make_report(tmp_path / "report.json")
    pipeline = MAKERS["ldm"]()
    for grain in (True, False):
        report = json.loads(path.read_text())
        for model in report["models"]:
            model["info"]["grain"] = grain
        path.write_text(json.dumps(report))
        card = make_card(
            pipeline, repo_id="you/em", record=RECORD, evaluation=read_evaluation(path, "mine")
        )
        assert f"grain {'added' if grain else 'left out'}" in card
        assert "adds it to each decoded image" in card
    pipeline.grain = None
    assert "grain" not in make_card(
        pipeline, repo_id="you/em", record={"name": "x", "versions": {}}
    )


def test_the_hub_reads_the_evaluation_off_the_card(tmp_path, hub):
    evaluation = read_evaluation(make_report(tmp_path / "report.json"), "mine")
    text = make_card(
        MAKERS["stylegan"](),
        repo_id="you/em",
        record=RECORD,
        evaluation=evaluation,
        license="cc-by-4.0",
    )
    card = ModelCard(text)
    card.validate()  # posts to the stand-in what the Hub itself would judge
    assert card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    results = {result.metric_type: result for result in card.data.eval_results}
    distance = results["frechet_distance"]
    assert distance.metric_value == 36.125
    assert distance.metric_args == {"low": 35.125, "high": 37.125, "interval": "95 %"}
    assert distance.dataset_args["num_images"] == 2000
    assert results["kernel_distance"].metric_value == pytest.approx(0.36125)
    (index,) = card.data.to_dict()["model-index"]
    assert index["name"] == "my-run"
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


NAN = float("nan")


@pytest.mark.parametrize(
    ("metrics", "levels", "shown"),
    [
        ({"precision": 0.625, "recall": 0.375}, ("precision", "recall"), ("precision", "recall")),
        ({"precision": 0.625, "recall": 0.375}, (), ("precision", "recall")),
        (
            {"coverage": 0.5, "cmmd": NAN, "kernel_distance": None},
            ("coverage", "cmmd"),
            ("coverage",),
        ),
        ({"a_metric_of_tomorrow": 1.5}, (), ()),
        ({}, ("precision",), ()),
    ],
)
def test_a_card_is_valid_whatever_was_measured(metrics, levels, shown, tmp_path, hub):
    path = make_report(tmp_path / "report.json")
    report = json.loads(path.read_text())
    bounds = {"low": 0.25, "high": None if NAN in metrics.values() else 0.75}
    rows = report["measurements"][0]["rows"]
    rows["StyleGAN2"]["held_out"] = {
        key: {"value": value, **bounds} for key, value in metrics.items()
    }
    for level in report["levels"]:
        rows[level["key"]]["held_out"] = {key: interval(0.875) for key in levels}
    path.write_text(json.dumps(report))
    evaluation = read_evaluation(path, "mine")
    text = make_card(
        MAKERS["ldm"](), repo_id="you/em", record=RECORD, evaluation=evaluation, num_samples=1
    )
    card = ModelCard(text)
    card.validate()
    results = {result.metric_type: result for result in card.data.eval_results or ()}
    assert set(results) == set(shown)
    for key in shown:
        assert results[key].metric_value == metrics[key]
        assert (results[key].metric_args or {}).get("high") == bounds["high"]
    assert ("model-index" in card.data.to_dict()) == bool(shown)
    assert "nan" not in text.lower().split()
    page = card.text
    first = format_interval({"value": metrics[shown[0]], **bounds}) if shown else ""
    assert (
        f"| **this model** | {first} |" if shown else "None of its metrics is a number."
    ) in page
    columns = {
        line.count("|")
        for line in page.splitlines()
        if line.startswith(("| **this", "| Real", "| real", "|---|-"))
    }
    assert ("| 0.88 (−0.12" in page) == bool(set(shown) & set(levels))
    if shown:
        assert columns >= {len(shown) + 2}
        assert ("| – |" in page) == (not levels)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_a_report_of_other_weights_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"does not judge this model: StyleGAN, StyleGAN2 had other weights"
    ):
        read_evaluation(make_report(tmp_path / "report.json"), "unknown")
    (tmp_path / "other.json").write_text("{}")
    for path in (tmp_path / "other.json", tmp_path / "nothing.json"):
        with pytest.raises(ValueError, match=r"is not a report\.json of evaluate\.py"):
            read_evaluation(path, "mine")


def test_a_report_of_an_older_version_is_refused(tmp_path):
    path = make_report(tmp_path / "report.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(ValueError, match=r"has format 1, .* Run evaluate\.py again"):
        read_evaluation(path, "mine")


def test_names_from_outside_are_escaped(tmp_path):
    hostile = "a|b `c` <script>x</script>\n# d $e$ [f](g)"
    path = make_report(tmp_path / "report.json")
    path.write_text(path.read_text().replace('"StyleGAN2"', json.dumps(hostile)))
    record = RECORD | {"name": hostile, "data": RECORD["data"] | {"name": hostile}}
    evaluation = read_evaluation(path, "mine")
    card = make_card(MAKERS["stylegan"](), repo_id="you/em", record=record, evaluation=evaluation)
    page = card.split("---\n", 2)[2]
    assert "<script>" not in page
    assert not re.search(r"^# d", page, re.MULTILINE)
    assert page.count(escape_markdown(hostile)) >= 4
    assert "a|b" not in page
    assert escape_markdown(hostile) == (
        r"a\|b \`c\` &lt;script&gt;x&lt;/script&gt; \# d \$e\$ \[f\](g)"
    )


def test_templates_are_found_wherever_the_package_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert set(create_environment().list_templates(extensions=["j2"])) >= {"base.md.j2"}
    monkeypatch.setitem(__import__("sys").modules, "model_cards", None)
    with pytest.raises(ValueError, match="Install the project again"):
        create_environment()


def test_a_card_says_what_the_run_started_from(tmp_path):
    started = {"autoencoder": {"model": "em-ldm-64", "use": "unchanged", "license": "apache-2.0"}}
    cards = [
        make_card(MAKERS["ldm"](), repo_id="you/em", record=record)
        for record in (RECORD, RECORD | {"started_from": started})
    ]
    said = "Started from em-ldm-64's autoencoder (unchanged) (licence: apache-2.0)."
    assert [said in card.replace("\\", "") for card in cards] == [False, True]
    card = make_card(MAKERS["ldm"](), repo_id="em-ldm-64", record=RECORD, is_in_package=True)
    assert 'load_pipeline("em-ldm-64")' in card
    assert "trust_remote_code" not in card
