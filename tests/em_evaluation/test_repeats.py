"""Trainings that differ in the seed alone: median, range, and what holds for all seeds."""

import pytest

from em_evaluation.conclusions import Comparison
from em_evaluation.images import ModelImages
from em_evaluation.interval import Interval
from em_evaluation.repeats import (
    compare_repeats,
    count_outcomes,
    list_units,
    name_group,
    say_one_of,
    say_scatter,
    say_seeds,
    summarise_repeats,
)
from em_evaluation.report import view_for_detector


def group_of(distances, half_width=5.0, name="LDM"):
    """The only group of trainings with these distances, whose intervals are this wide."""
    models = [
        ModelImages(f"{name}-{i}", None, repeat_of=name, training_seed=str(i))
        for i in range(len(distances))
    ]
    rows = {
        model.name: {
            "held_out": {
                "frechet_distance": Interval(value, value - half_width, value + half_width),
                "recall": Interval(value / 1000, 0, 1),
            }
        }
        for model, value in zip(models, distances)
    }
    rows["other"] = {"held_out": {"frechet_distance": Interval(1, 0, 2)}}
    models.append(ModelImages("other", None, repeat_of="alone"))
    (group,) = summarise_repeats(models, [{"rows": rows}])
    return group


def test_median_and_range_of_every_metric():
    group = group_of([120, 100, 131])
    assert (group["name"], group["seeds"]) == ("LDM", ["0", "1", "2"])
    assert group["models"] == ["LDM-0", "LDM-1", "LDM-2"]
    assert group["measurements"][0]["held_out"] == {
        "frechet_distance": {"value": 120, "low": 100, "high": 131},
        "recall": {"value": 0.12, "low": 0.1, "high": 0.131},
    }
    middle = group_of([120, 100])["measurements"][0]["held_out"]["frechet_distance"]
    assert middle == {"value": 110, "low": 100, "high": 120}
    assert name_group(group) == "LDM, 3 trainings"


def test_the_scatter_is_compared_with_the_interval_of_one_training():
    wide, narrow = group_of([120, 100, 131], half_width=40), group_of([120, 100, 131])
    assert not wide["exceeds_intervals"]
    assert narrow["exceeds_intervals"]
    assert say_scatter(wide) == (
        "The 3 trainings of LDM differ in the seed alone: Frechet distance, median and range, "
        "120 (100 to 131). Each lies within the 95 % intervals of the others."
    )
    assert "outside the 95 % interval of another one" in say_scatter(narrow)
    assert say_one_of(narrow).startswith(
        "This model is one of 3 trainings that differ in the seed alone (seeds 0, 1, 2): Frechet"
    )


def compare(orders):
    """Compare LDM (a0, a1) with GAN (b0, b1) and with c; orders: first_is of each pair."""
    repeats = [
        {"name": "LDM", "models": ["a0", "a1"]},
        {"name": "GAN", "models": ["b0", "b1"]},
    ]
    comparisons = [
        Comparison(first, second, Interval(0, 0, 0), order)
        for (first, second), order in orders.items()
    ]
    models = ["a0", "b0", "a1", "b1", "c"]
    return {"repeats": repeats}, compare_repeats(comparisons, repeats, models)


PAIRS = [("a0", "b0"), ("a1", "b1"), ("b0", "a1"), ("a0", "b1")]
WITH_C = dict.fromkeys([("a0", "c"), ("a1", "c"), ("b0", "c"), ("b1", "c")], "undecided")


def test_an_order_holds_if_it_holds_for_all_pairs_of_seeds():
    orders = dict(zip(PAIRS, ["closer", "closer", "farther", "closer"])) | WITH_C
    report, found = compare(orders)
    first, second, third = found
    assert (first["first"], first["second"], first["first_is"]) == ("LDM", "GAN", "closer")
    assert first["counts"] == {"closer": 4}
    assert say_seeds(report, first, "held-out micrographs") == (
        "LDM is closer to the held-out micrographs than GAN in each of the 4 pairs of trainings: "
        "this holds over the training seeds that were tried."
    )
    assert [(each["first"], each["second"]) for each in (second, third)] == [
        ("LDM", "c"),
        ("GAN", "c"),
    ]
    assert "cannot be told apart in any of the 2 pairs" in say_seeds(report, second, "x")
    report, (first, *_) = compare(
        dict.fromkeys(PAIRS, "farther") | {("b0", "a1"): "closer"} | WITH_C
    )
    assert say_seeds(report, first, "x").startswith("GAN is closer to the x than LDM in each")


@pytest.mark.parametrize("last", ["farther", "undecided"])
def test_one_pair_of_seeds_that_says_otherwise_is_said(last):
    orders = dict(zip(PAIRS, ["closer", "closer", "farther", last])) | WITH_C
    report, (first, *_) = compare(orders)
    assert first["first_is"] == "depends"
    text = say_seeds(report, first, "held-out micrographs")
    other, open_ = (1, 0) if last == "farther" else (0, 1)
    assert text == (
        "Whether LDM or GAN is closer to the held-out micrographs depends on the training seed: of "
        f"4 pairs of trainings, LDM is significantly closer in 3, GAN is significantly closer in "
        f"{other}, and {open_} cannot be told apart. A conclusion from one training of each does "
        "not hold."
    )


def test_units_keep_the_order_of_the_models():
    repeats = [{"name": "LDM", "models": ["a0", "a1"]}]
    assert list_units(repeats, ["c", "a0", "d", "a1"]) == {
        "c": ["c"],
        "LDM": ["a0", "a1"],
        "d": ["d"],
    }


def test_verdicts_are_counted_over_seeds():
    verdicts = [
        {"model": model, "aspect": aspect, "outcome": outcome}
        for model, aspect, outcome in (
            ("a0", "fidelity", "as_real"),
            ("a0", "variety", "differs"),
            ("a1", "fidelity", "differs"),
            ("a1", "variety", "differs"),
            ("a2", "fidelity", "differs"),
            ("a2", "variety", "differs"),
            ("c", "fidelity", "undecided"),
        )
    ]
    group = {"models": ["a0", "a1", "a2"]}
    assert count_outcomes({"verdicts": verdicts}, group) == [
        {"aspect": "fidelity", "outcomes": [("differs", 2), ("as_real", 1)]},
        {"aspect": "variety", "outcomes": [("differs", 3)]},
    ]


def make_report(outcomes, shares):
    """A report of trainings of one model with these outcomes and precisions, and one alone."""
    models = [f"LDM-{i}" for i in range(len(shares))]
    return {
        "models": [{"name": name} for name in [*models, "alone"]],
        "repeats": [{"name": "LDM", "models": models}],
        "protocol": {},
        "verdicts": [
            {
                "model": name,
                "aspect": "fidelity",
                "outcome": outcome,
                "beside": "train",
                "measures": [
                    {
                        "metric": "precision",
                        "outcome": outcome,
                        "value": {"value": share},
                        "reference": {"value": 0.8},
                    }
                ],
            }
            for name, outcome, share in zip(
                [*models, "alone"], [*outcomes, "differs"], [*shares, 0.1]
            )
        ],
    }


def test_trainings_share_what_their_verdicts_mean_for_a_detector():
    text = dict(view_for_detector(make_report(["differs"] * 3, [0.6, 0.36, 0.5])))
    assert list(text) == ["LDM, 3 trainings", "alone"]
    assert " 40 to 64 % of the images resemble no real image" in text["LDM, 3 trainings"]
    assert " 90 % of the images" in text["alone"]
    text = dict(view_for_detector(make_report(["differs", "as_real", "differs"], [0.6, 0.8, 0.5])))
    assert list(text) == ["LDM-0 and LDM-2", "LDM-1", "alone"]
    assert " 40 to 50 % of the images" in text["LDM-0 and LDM-2"]
