"""Which metrics are measured, what each is blind to, which reports may be compared, and the
quiz.
"""

import base64
import io
import json

import numpy as np
import PIL.Image
import pytest

from em_evaluation.blindness import expect_order, find_blind_spots
from em_evaluation.compare import compare_reports, find_differences
from em_evaluation.conclusions import DEFECT_METRICS, Comparison, judge_model, order_of
from em_evaluation.distances import frechet_distance, kernel_distance
from em_evaluation.evaluator import FORMAT
from em_evaluation.extractor import Extractor
from em_evaluation.feature_metrics import (
    METRICS,
    check_metrics,
    choose_metrics,
    measure,
    measure_values,
)
from em_evaluation.images import ImageSet
from em_evaluation.interval import Interval, to_json
from em_evaluation.levels import ReferenceLevel, Sets
from em_evaluation.pictures import choose_pictures, choose_unseen
from em_evaluation.quiz import make_quiz
from em_evaluation.wording import say_blind_spot, summarise_model, warn


class Plain(Extractor):
    name, identity, num_features = "plain", "plain", 8


class Unit(Plain):
    unit_norm = True


def test_metrics_that_apply_are_chosen_and_the_rest_is_said():
    every = tuple(METRICS)
    assert choose_metrics((), Unit(), 100) == (every, [])
    assert choose_metrics((), Plain(), 100) == (tuple(name for name in every if name != "cmmd"), [])
    assert choose_metrics(("recall",), Plain(), 100) == (("frechet_distance", "recall"), [])
    names, notes = choose_metrics((), Plain(), 8)
    assert names == ("frechet_distance", "frechet_distance_infinite", "kernel_distance")
    assert notes == [
        "Not measured: Precision, Recall, Density, Coverage. They need 12 images of each set; "
        "there are 8."
    ]
    with pytest.raises(ValueError, match=r"Unknown metrics: fid\. Choose from frechet_distance"):
        check_metrics(("fid",), [Plain()])
    with pytest.raises(ValueError, match=r"cmmd needs embeddings of length 1\. Add the extractor"):
        check_metrics(("cmmd",), [Plain()])
    check_metrics(("cmmd",), [Plain(), Unit()])
    with pytest.raises(ValueError, match="Unknown metrics during training: cmmd"):
        check_metrics(("cmmd",), in_training=True)


def test_all_metrics_are_measured_with_intervals_that_hold_them():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(shift, 1, (60, 8)) for shift in (0.5, 0.2))
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    found, distances = measure(tuple(METRICS), a, b)
    assert list(found) == list(METRICS)
    assert all(interval.low <= interval.value <= interval.high for interval in found.values())
    assert all(interval.low < interval.high for interval in found.values())
    assert found["frechet_distance"].value == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert found["kernel_distance"].value == pytest.approx(kernel_distance(a, b), rel=1e-9)
    assert set(distances) == {"frechet_distance", "kernel_distance", "cmmd"}
    values = measure_values(tuple(METRICS), a, b)
    assert values == pytest.approx(
        {name: interval.value for name, interval in found.items()}, rel=1e-9
    )
    turned, _ = measure(("recall", "frechet_distance"), a[::-1], b[::-1])
    assert turned["recall"].value == found["recall"].value


# ---------------------------------------------------------------- blindness


def level(kind, model=None, title=""):
    return ReferenceLevel(f"{kind} {model or ''}".strip(), kind, title, "", None, model)


LEVELS = [
    level("real"),
    level("reconstruction", "LDM"),
    level("surrogates", title="texture only"),
    level("noise", title="noise only"),
]
REPORT = {
    "models": [{"name": "LDM"}, {"name": "GAN"}],
    "levels": [each.to_json() for each in LEVELS],
}
# a GAN has no autoencoder
GOOD = {"real": 1, "reconstruction LDM": 2, "LDM": 3, "GAN": 1.5, "surrogates": 5, "noise": 9}


def find_blindness(metric, values, sign=1):
    rows = {
        key: {metric: Interval(sign * value, sign * value, sign * value)}
        for key, value in values.items()
    }
    (found,) = find_blind_spots(rows, [metric], ["LDM", "GAN"], LEVELS)
    pairs = [(each.nearer, each.farther) for each in found.misordered]
    return found.num_pairs, pairs, say_blind_spot(REPORT, to_json(found))


@pytest.mark.parametrize(("metric", "sign"), [("frechet_distance", 1), ("recall", -1)])
def test_a_metric_that_orders_everything_is_blind_to_nothing(metric, sign):
    num_pairs, wrong, sentence = find_blindness(metric, GOOD, sign)
    assert wrong == []
    assert num_pairs == 13
    assert sentence.endswith("puts all sets in the expected order.")
    assert len(find_blindness(metric, GOOD, -sign)[1]) == 13


def test_a_metric_is_blind_to_each_pair_that_it_turns_or_levels():
    _, wrong, sentence = find_blindness("recall", GOOD | {"noise": 5}, -1)
    assert wrong == [("surrogates", "noise")]
    assert "texture only (−5.00) is not nearer than noise only (−5.00)" in sentence
    assert "truly" not in sentence
    _, wrong, sentence = find_blindness("frechet_distance", GOOD | {"LDM": 6})
    assert wrong == [("LDM", "surrogates")]
    assert sentence.endswith("Where one of a pair is a model, that model may truly be no better.")
    _, wrong, _ = find_blindness("frechet_distance", GOOD | {"reconstruction LDM": 4})
    assert wrong == [("reconstruction LDM", "LDM")]


def test_autoencoders_are_set_against_their_own_model_alone():
    levels = [level("reconstruction", name) for name in "ab"]
    pairs = expect_order(["a", "b", "c"], levels)
    assert pairs == [("reconstruction a", "a"), ("reconstruction b", "b")]


# ---------------------------------------------------------------- verdicts


def judge(own, real, microscopy=None):
    """The outcomes of the verdicts on a model with these metrics beside those of real images."""
    rows = {"M": own, "real": real}
    difference = own["frechet_distance"] - real["frechet_distance"]
    comparison = Comparison("M", "real", difference, order_of(difference))
    verdicts = judge_model("M", rows, "real", comparison, microscopy)
    return {each.aspect: each.outcome for each in verdicts}, verdicts


def near(value, half=0.03):
    return Interval(value, value - half, value + half)


REAL = {"frechet_distance": near(50, 10), "precision": near(0.8), "recall": near(0.77)}


def test_lost_variety_is_not_hidden_by_a_good_distance():
    own = {"frechet_distance": near(52, 10), "precision": near(0.82), "recall": near(0.5)}
    outcomes, verdicts = judge(own, REAL)
    assert outcomes == {"fidelity": "as_real", "variety": "differs", "defects": "not_measured"}
    report = {"models": [{"name": "M"}], "verdicts": to_json(verdicts)}
    said = summarise_model(report, "M")
    assert "fidelity as real (precision 0.820 against 0.800 of" in said
    assert "variety lower than real (recall 0.500 against 0.770 of" in said
    assert "A detector trained on these images alone would miss part of what real" in said


@pytest.mark.parametrize(
    ("recall", "precision", "fidelity"),
    [
        (near(0.06), near(0.85), "undecided"),
        (near(0.06), near(0.6), "differs"),
        (near(0.37), near(0.85), "undecided"),
        (near(0.40), near(0.85), "as_real"),  # more than half of 0.77
        (near(0.30, 0.45), near(0.85), "as_real"),  # the intervals overlap
    ],
)
def test_precision_of_a_narrow_model_is_not_fidelity(recall, precision, fidelity):
    own = REAL | {"precision": precision, "recall": recall}
    outcomes, verdicts = judge(own, REAL)
    assert outcomes["fidelity"] == fidelity
    said = summarise_model({"verdicts": to_json(verdicts)}, "M")
    assert ("draws only typical images has a high precision" in said) == (fidelity == "undecided")
    assert f"precision {precision.value:.3f} against 0.800" in said


def test_a_verdict_needs_an_interval_that_excludes_the_alternative():
    own = {"frechet_distance": near(52, 10), "precision": near(0.78, 0.3), "recall": near(0.75)}
    assert judge(own, REAL)[0]["fidelity"] == "undecided"
    assert judge(own, REAL)[0]["variety"] == "as_real"
    bare = {"frechet_distance": REAL["frechet_distance"]}
    for value, half, outcome in ((51, 3, "as_real"), (90, 3, "differs"), (80, 60, "undecided")):
        found, _ = judge({"frechet_distance": near(value, half)}, bare)
        assert found["fidelity"] == outcome
        assert found["variety"] == "not_measured"


def test_defects_are_judged_beside_the_held_out_images():
    metrics = dict.fromkeys(("loop_density", "loop_size", "dot_density", "line_density"))
    section = {
        "metrics": {name: {"label": name, "unit": "/ µm²"} for name in metrics},
        "levels": {key: metrics | {"loop_density": near(value).to_json()}
                   for key, value in (("M", 4.0), ("held_out", 23.0))},
        "blind_spots": {},
        "outcomes": {"M": dict.fromkeys(metrics, "not_measured") | {"loop_density": "differs"}},
    }  # fmt: skip
    outcomes, verdicts = judge(REAL, REAL, section)
    assert outcomes == {"fidelity": "as_real", "variety": "as_real", "defects": "differs"}
    (measure_,) = verdicts[2].measures
    assert (measure_.value.value, measure_.reference.value) == (4.0, 23.0)
    report = {"models": [{"name": "M"}], "verdicts": to_json(verdicts)}
    assert "wrong number or size of defects" in summarise_model(report, "M")


@pytest.mark.parametrize(
    ("found", "blind", "outcome", "why"),
    [
        (0.0, (), "undecided", "nothing_found"),
        (4.0, ("loop_density",), "undecided", "passed_by_noise"),
        (4.0, (), "as_real", None),
    ],
)
def test_defects_are_not_as_real_by_a_measure_that_noise_passes(found, blind, outcome, why):
    name, value = "loop_density", Interval(found, found, found).to_json()
    section = {
        "metrics": {name: {"label": "Number of loops", "unit": "/ µm²"}},
        "levels": {key: {name: value} for key in ("M", "held_out")},
        "outcomes": {"M": dict.fromkeys(DEFECT_METRICS, "not_measured") | {name: "as_real"}},
    }
    (*_, verdict) = judge_model("M", {"M": {}}, "real", None, section, blind)
    assert (verdict.outcome, verdict.measures[0].blind) == (outcome, why)
    said = summarise_model({"verdicts": to_json([verdict])}, "M")
    assert ("does not distinguish noise from real images here" in said) == (why is not None)


def test_lost_fidelity_is_told_as_a_share_and_one_micrograph_as_a_caveat():
    own = REAL | {"precision": near(0.61)}
    verdicts = to_json(judge(own, REAL | {"precision": near(0.94)})[1])
    protocol = {"reference_num_micrographs": 1, "train_digest": "t"}
    said = summarise_model({"verdicts": verdicts, "protocol": protocol}, "M")
    assert "39 % of the images resemble no real image (training tiles: 6 %)" in said
    assert "rests on one real micrograph" in said


def test_the_note_of_a_run_is_a_warning():
    models = [{"name": "M", "info": {"preset": "test", "note": "Means nothing."}}, {"name": "N"}]
    report = {"models": models, "autoencoders": []}
    assert warn(report) == warn(report, "M") == ["M: Means nothing."]
    assert warn(report, "N") == []


# ---------------------------------------------------------------- comparison


def report(**changes):
    def interval(value):
        return {"value": value, "low": value - 1, "high": value + 1}

    protocol = {"num_images": 10, "resolution": 64, "grey_levels": "8 bit", "seed": 0}
    protocol |= {"reference_digest": "r", "train_digest": "t"}
    rows = {"A": {"held_out": {"frechet_distance": interval(changes.pop("distance", 5.0))}}}
    measurement = {"extractor": "plain", "identity": "plain 1", "metrics": ["frechet_distance"]}
    return {
        "format": FORMAT,
        "protocol": protocol | changes,
        "dataset": {"split_hash": "s", "fingerprint": "f"},
        "models": [{"name": "A"}],
        "measurements": [measurement | {"rows": rows}],
    }


def write(folder, name, content):
    (folder / name).mkdir()
    (folder / name / "report.json").write_text(json.dumps(content))
    return folder / name


def test_reports_of_one_protocol_are_put_beside_each_other(tmp_path):
    near, far = write(tmp_path, "near", report()), write(tmp_path, "far", report(distance=9.0))
    text = compare_reports([far / "report.json", near])
    assert text.index(f"A ({near})") < text.index(f"A ({far / 'report.json'})")
    assert "9.0 (8.0 to 10.0)" in text
    assert f"A ({near}) is closer to the reference than" in text
    close = write(tmp_path, "close", report(distance=6.0))
    assert "cannot be told apart" in compare_reports([near, close])


def test_trainings_that_differ_in_the_seed_alone_are_compared_together(tmp_path):
    def interval(value):
        return {"frechet_distance": {"value": value, "low": value - 1, "high": value + 1}}

    several = report(distance=9.0)
    several["models"].append({"name": "B"})
    several["measurements"][0]["rows"]["B"] = {"held_out": interval(12.0)}
    middle = {"held_out": {"frechet_distance": {"value": 10.5, "low": 9.0, "high": 12.0}}}
    several["repeats"] = [{"name": "LDM", "models": ["A", "B"], "measurements": [middle]}]
    paths = [write(tmp_path, "several", several), write(tmp_path, "one", report(distance=5.0))]
    text = compare_reports(paths)
    assert f"LDM, 2 trainings, median and range ({paths[0]})" in text
    assert "10.5 (9.0 to 12.0)" in text
    assert f"A ({paths[1]}) is closer to the reference than LDM, all 2 trainings" in text
    # between the two trainings of the group: the order depends on the seed
    between = write(tmp_path, "between", report(distance=11.0))
    assert "cannot be told apart" in compare_reports([paths[0], between])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["protocol"].update(num_images=20), "number of images: 10 and 20"),
        (
            lambda r: r["protocol"].update(reference_digest="x"),
            "content of the reference images: r and x",
        ),
        (lambda r: r["dataset"].update(split_hash="x"), "split of the micrographs: s and x"),
        (
            lambda r: r["measurements"][0].update(identity="plain 2"),
            "features: plain 1 and plain 2",
        ),
    ],
)
def test_reports_of_unequal_protocol_are_refused_with_the_reason(change, reason, tmp_path):
    first, second = report(), report()
    assert find_differences(first, second) == []
    change(second)
    assert find_differences(first, second) == [reason]
    paths = [write(tmp_path, "a", first), write(tmp_path, "b", second)]
    with pytest.raises(
        ValueError, match=f"cannot be compared, they were measured differently:\n  {reason}"
    ):
        compare_reports(paths)


def test_what_is_no_report_is_refused(tmp_path):
    old = report() | {"format": 1}
    paths = [write(tmp_path, "old", old), write(tmp_path, "new", report())]
    with pytest.raises(ValueError, match=r"has format 1, .* Run evaluate\.py again"):
        compare_reports(paths)
    (tmp_path / "new" / "report.json").write_text("[1")
    with pytest.raises(ValueError, match=r"not a report\.json of evaluate\.py"):
        compare_reports(paths[::-1])


# ---------------------------------------------------------------- quiz


def picture(key, level, num, role="level"):
    return {
        "key": key,
        "title": key,
        "unseen": np.full((num, 4, 6), level, np.uint8),
        "role": role,
    }


def test_the_quiz_holds_as_many_real_images_as_generated_ones_and_knows_each():
    pictures = [
        picture("held_out", 10, 30, "real"),
        picture("A", 20, 30, "model"),
        picture("B", 30, 5, "model"),
        picture("train", 40, 9),
    ]
    quiz = make_quiz(pictures)
    strip = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(quiz["uri"].split(",")[1]))))
    assert (quiz["height"], quiz["width"]) == (4, 6)
    levels = strip.reshape(4, -1, 6).transpose(1, 0, 2)  # [N, H, W]
    assert levels.std((1, 2)).max() == 0
    assert [{10: "", 20: "A", 30: "B"}[int(level[0, 0])] for level in levels] == quiz["origins"]
    assert [quiz["origins"].count(origin) for origin in ("", "A", "B")] == [10, 5, 5]
    assert (
        make_quiz(pictures)["origins"] == quiz["origins"] != make_quiz(pictures, seed=1)["origins"]
    )


def test_the_quiz_asks_for_nothing_that_the_page_shows_elsewhere():
    """Neither in a grid nor among the closest pairs, however turned, nor twice."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (60, 5, 5), dtype=np.uint8)
    levels[30:40] = levels[:10].swapaxes(1, 2)[..., ::-1]  # views of tiles that the grid shows
    levels[50] = levels[51][::-1]
    held_out = ImageSet(levels[:, None])
    generated = {"A": ImageSet(rng.integers(0, 256, (60, 1, 5, 5), dtype=np.uint8))}
    sets = Sets(held_out, ImageSet(levels[:1, None]), generated, ())
    closest = {
        "key": "closest_A",
        "role": "pairs",
        "levels": generated["A"].levels[20:26, 0],
    }
    pictures = choose_pictures(sets, 16, [closest], seed=3)
    real, model = pictures[0]["unseen"], pictures[1]["unseen"]
    places = [[int(np.flatnonzero((images.levels[:, 0] == each).all((1, 2)))[0]) for each in unseen]
              for images, unseen in ((held_out, real), (generated["A"], model))]  # fmt: skip
    assert not set(places[0]) & {*range(16), *range(30, 40)}
    assert not set(places[1]) & {*range(16), *range(20, 26)}
    assert {len(each) for each in places} == {24}
    assert len(choose_unseen(levels, levels[:16], most=60)) == 60 - 16 - 10 - 1
    assert places[0] != sorted(places[0])
    again, other = (choose_pictures(sets, 16, [closest], seed)[0]["unseen"] for seed in (3, 4))
    assert (again == real).all()
    assert (other != real).any()


def test_too_few_images_make_no_quiz():
    assert make_quiz([picture("held_out", 10, 30, "real"), picture("A", 20, 3, "model")]) is None
    assert make_quiz([picture("held_out", 10, 3, "real"), picture("A", 20, 30, "model")]) is None
    assert make_quiz([picture("A", 20, 30, "model")]) is None
    assert make_quiz([]) is None
