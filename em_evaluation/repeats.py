"""Trainings that differ in the seed alone: how far they scatter, and what holds for all of them.

The interval of a number contains the scatter of one training's images and of the micrographs. Only
several trainings show how much the seed of a training matters.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np

from em_evaluation.images import ModelImages
from em_evaluation.numbers import format_interval

DISTANCE = "frechet_distance"


def summarise_repeats(models: Sequence[ModelImages], measurements: Sequence[dict]) -> list[dict]:
    """Return the groups of trainings that differ in the seed alone.

    Args:
        models: Those of one `repeat_of` are a group if there are two or more.
        measurements: The report's.

    Returns:
        For each group its "name", its "models" and "seeds", its "measurements" (one an extractor,
        as side -> metric -> the median as "value" with the smallest and the largest as "low" and
        "high"), and "exceeds_intervals": whether a training's Frechet distance lies outside the
        interval of another one.
    """
    groups: dict[str, list[ModelImages]] = {}
    for model in models:
        if model.repeat_of:
            groups.setdefault(model.repeat_of, []).append(model)
    return [
        {
            "name": name,
            "models": [member.name for member in members],
            "seeds": [member.training_seed for member in members],
            "measurements": [
                find_range([entry["rows"][member.name] for member in members])
                for entry in measurements
            ],
            "exceeds_intervals": exceed_intervals(
                [measurements[0]["rows"][member.name]["held_out"][DISTANCE] for member in members]
            ),
        }
        for name, members in groups.items()
        if len(members) > 1
    ]


def find_range(rows: Sequence[Mapping]) -> dict:
    """Return side -> metric -> median and range of the rows of several trainings."""
    return {
        side: {
            metric: {
                "value": float(np.median(values)),
                "low": float(np.min(values)),
                "high": float(np.max(values)),
            }
            for metric in metrics
            for values in ([row[side][metric].value for row in rows],)
            if np.isfinite(values).all()
        }
        for side, metrics in rows[0].items()
    }


def exceed_intervals(distances: Sequence) -> bool:
    """Return whether one of several intervals does not hold the value of another one."""
    return any(
        not other.low <= each.value <= other.high for each, other in product(distances, repeat=2)
    )


def compare_repeats(
    comparisons: Iterable, repeats: Sequence[Mapping], models: Sequence[str]
) -> list[dict]:
    """Compare groups of trainings with each other and with single models.

    Args:
        comparisons: `em_evaluation.conclusions.Comparison` of each pair of models.
        repeats: What `summarise_repeats` returns.
        models: The names of all models.

    Returns:
        For each pair with a group, "first" and "second", "counts" (pairs of trainings in which the
        first is "closer", "farther" or "undecided"), and "first_is": the same word if it holds for
        all pairs of trainings, else "depends".
    """
    orders = {(each.first, each.second): each.first_is for each in comparisons}
    opposite = {"closer": "farther", "farther": "closer", "undecided": "undecided"}
    orders |= {(second, first): opposite[order] for (first, second), order in orders.items()}
    found = []
    for (first, firsts), (second, seconds) in combinations(list_units(repeats, models).items(), 2):
        if len(firsts) == len(seconds) == 1:
            continue
        counts = Counter(orders[pair] for pair in product(firsts, seconds))
        first_is = next(iter(counts)) if len(counts) == 1 else "depends"
        found.append(
            {"first": first, "second": second, "first_is": first_is, "counts": dict(counts)}
        )
    return found


def list_units(repeats: Sequence[Mapping], models: Sequence[str]) -> dict[str, list[str]]:
    """Return groups and single models, in the order of the models: {name: names of its models}."""
    group_of = {name: group for group in repeats for name in group["models"]}
    units: dict[str, list[str]] = {}
    for name in models:
        group = group_of.get(name)
        units[group["name"] if group else name] = group["models"] if group else [name]
    return units


def name_group(group: Mapping) -> str:
    """Return what a group is called in a table, such as "LDM, 3 trainings"."""
    return f"{group['name']}, {len(group['models'])} trainings"


def say_scatter(group: Mapping) -> str:
    """Say how far the distances of a group scatter, beside the interval of one training."""
    return (
        f"The {len(group['models'])} trainings of {group['name']} differ in the seed alone: "
        f"{say_range(group)}"
    )


def say_one_of(group: Mapping) -> str:
    """Say that a model is one of several trainings, for its card."""
    seeds = ", ".join(group["seeds"])
    return (
        f"This model is one of {len(group['seeds'])} trainings that differ in the seed alone "
        f"(seeds {seeds}): {say_range(group)}"
    )


def say_range(group: Mapping) -> str:
    """Return the median and range of a group's distances, and what they say about an interval."""
    distances = format_interval(group["measurements"][0]["held_out"][DISTANCE])
    text = f"Frechet distance, median and range, {distances}."
    if group["exceeds_intervals"]:
        return (
            f"{text} At least one lies outside the 95 % interval of another one: the interval of "
            "one training is too narrow for what the next training would score."
        )
    return f"{text} Each lies within the 95 % intervals of the others."


def say_seeds(report: Mapping, comparison: Mapping, beside: str) -> str:
    """Say whether the order of two groups, or of a group and a model, holds for all seeds.

    beside: what they are compared with.
    """
    first, second, counts = comparison["first"], comparison["second"], comparison["counts"]
    groups = {group["name"]: group for group in report["repeats"]}
    sizes = [len(groups[name]["models"]) if name in groups else 1 for name in (first, second)]
    number = sizes[0] * sizes[1]
    if comparison["first_is"] == "undecided":
        return (
            f"{first} and {second} cannot be told apart in any of the {number} pairs of trainings."
        )
    if comparison["first_is"] != "depends":
        if comparison["first_is"] == "farther":
            first, second = second, first
        return (
            f"{first} is closer to the {beside} than {second} in each of the {number} pairs of "
            "trainings: this holds over the training seeds that were tried."
        )
    told = [
        f"{name} is significantly closer in {counts.get(order, 0)}"
        for name, order in ((first, "closer"), (second, "farther"))
    ]
    return (
        f"Whether {first} or {second} is closer to the {beside} depends on the training seed: of "
        f"{number} pairs of trainings, {told[0]}, {told[1]}, and {counts.get('undecided', 0)} "
        "cannot be told apart. A conclusion from one training of each does not hold."
    )


def count_outcomes(report: Mapping, group: Mapping) -> list[dict[str, Any]]:
    """Return for each aspect how many trainings of a group have which outcome, commonest first."""
    verdicts = [each for each in report["verdicts"] if each["model"] in group["models"]]
    aspects = dict.fromkeys(each["aspect"] for each in verdicts)
    return [
        {
            "aspect": aspect,
            "outcomes": Counter(
                each["outcome"] for each in verdicts if each["aspect"] == aspect
            ).most_common(),
        }
        for aspect in aspects
    ]
