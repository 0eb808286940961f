"""The conclusions of a report as values: comparisons, autoencoders' shares, verdicts.

`em_evaluation.wording` puts them into words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from em_evaluation.distances import Distance, difference_interval
from em_evaluation.feature_metrics import METRICS
from em_evaluation.images import ImageSet
from em_evaluation.interval import Interval
from em_evaluation.levels import ReferenceLevel

Aspect = Literal["fidelity", "variety", "defects"]
Outcome = Literal["as_real", "differs", "undecided", "not_measured"]
Order = Literal["closer", "farther", "undecided"]
METRICS_OF_ASPECT = {"fidelity": ("precision", "density"), "variety": ("recall", "coverage")}
DEFECT_METRICS = ("loop_density", "loop_size", "dot_density", "line_density")
TOLERANCE = 0.1  # a share that is at most this far below that of real images counts as real


@dataclass(frozen=True)
class Comparison:
    """The Frechet distance of `first` less that of `second`; the common reference cancels."""

    first: str
    second: str
    difference: Interval
    first_is: Order


@dataclass(frozen=True)
class AutoencoderShare:
    """How much of a model's distance its autoencoder has alone.

    share: the autoencoder's distance over the model's. excess: the same of what both have above
    real images, or None if that means nothing. difference_to_half: the autoencoder's distance
    less half of the model's. autoencoder_is: where this difference lies.
    """

    model: str
    level: str
    share: float
    excess: float | None
    difference_to_half: Interval
    autoencoder_is: Literal["above", "below", "undecided"]

    @property
    def is_limit(self) -> bool:
        return self.share > 0.5


@dataclass(frozen=True)
class Measure:
    """One number of a verdict, beside that of real images.

    metric: its key. reference: the same of real images: of the level "real", or of the held-out
    images for defects.
    """

    metric: str
    label: str
    unit: str
    value: Interval | None
    reference: Interval | None
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """What the measures of one aspect of a model say together."""

    model: str
    aspect: Aspect
    outcome: Outcome
    measures: tuple[Measure, ...]


def compare(
    first: str,
    second: str,
    distances: Mapping[str, Distance],
    sets: Mapping[str, ImageSet],
    reference: ImageSet,
    seed: int,
) -> Comparison:
    """Compare the distances of two sets to the common reference."""
    interval = difference_interval(
        distances[first],
        distances[second],
        groups_first=sets[first].groups,
        groups_second=sets[second].groups,
        groups_reference=reference.groups,
        seed=seed,
    )
    return Comparison(first, second, interval, order_of(interval))


def order_of(difference: Interval) -> Order:
    """Return where the first of a pair lies, from its distance less that of the second."""
    return "closer" if difference.high < 0 else "farther" if difference.low > 0 else "undecided"


def weigh_autoencoder(
    level: ReferenceLevel,
    real: ReferenceLevel | None,
    distances: Mapping[str, Distance],
    sets: Mapping[str, ImageSet],
    reference: ImageSet,
    seed: int,
) -> AutoencoderShare | None:
    """Compare an autoencoder's distance with half of its model's; None for a distance of 0."""
    score, own = distances[level.model], distances[level.key]
    if score.value <= 0:
        return None
    half = Distance(score.value / 2, score.influence_a / 2, score.influence_b / 2)
    interval = difference_interval(
        own,
        half,
        groups_first=sets[level.key].groups,
        groups_second=sets[level.model].groups,
        groups_reference=reference.groups,
        seed=seed,
    )
    where = "above" if interval.low > 0 else "below" if interval.high < 0 else "undecided"
    excess = None
    if real is not None and score.value > distances[real.key].value:
        best = distances[real.key].value
        excess = (own.value - best) / (score.value - best)
        excess = excess if 0 <= excess <= 1 else None
    return AutoencoderShare(
        level.model, level.key, own.value / score.value, excess, interval, where
    )


def judge_model(
    model: str,
    rows: Mapping[str, Mapping[str, Interval]],
    real: str | None,
    comparison: Comparison | None,
    microscopy: dict | None,
) -> list[Verdict]:
    """Return the verdicts on a model: fidelity, variety, defects.

    Args:
        model: Its key.
        rows: Set -> metric -> interval.
        real: The key of the level "real".
        comparison: The model against real images, by the Frechet distance.
        microscopy: What `compare_microscopy` returns.
    """
    own, best = rows[model], rows.get(real, {})
    aspects = {
        aspect: [
            make_measure(metric, own[metric], best[metric], judge_loss(best[metric] - own[metric]))
            for metric in metrics
            if metric in own and metric in best
        ]
        for aspect, metrics in METRICS_OF_ASPECT.items()
    }
    if comparison is not None and not aspects["fidelity"]:  # the distance is all there is
        distance = "frechet_distance"
        outcome = judge_excess(comparison.difference, best[distance])
        aspects["fidelity"] = [make_measure(distance, own[distance], best[distance], outcome)]
    aspects["defects"] = judge_defects(model, real, microscopy)
    return [
        Verdict(model, aspect, combine([each.outcome for each in measures]), tuple(measures))
        for aspect, measures in aspects.items()
    ]


def make_measure(metric: str, value, reference, outcome: Outcome) -> Measure:
    return Measure(metric, METRICS[metric].label, METRICS[metric].unit, value, reference, outcome)


def judge_excess(difference: Interval | None, real: Interval | None) -> Outcome:
    """Judge a distance less that of real images.

    It differs if the interval lies above 0. It is as real if the interval excludes an excess
    larger than the distance that real images may have.
    """
    if difference is None or real is None:
        return "not_measured"
    if difference.low > 0:
        return "differs"
    return "as_real" if difference.high <= real.high else "undecided"


def judge_loss(loss: Interval) -> Outcome:
    """Judge a share of real images less that of a model."""
    if loss.low > 0:
        return "differs"
    return "as_real" if loss.high <= TOLERANCE else "undecided"


def judge_defects(model: str, real: str | None, section: dict | None) -> list[Measure]:
    """Return the measures of defects from the report's section on microscopy."""
    if section is None or real is None:
        return []
    measures = []
    for metric in DEFECT_METRICS:
        own, held_out = (
            Interval.from_json(section["levels"][key].get(metric)) for key in (model, "held_out")
        )
        outcome = section["outcomes"][model][metric]
        if own is not None and held_out is not None and outcome != "not_measured":
            about = section["metrics"][metric]
            measures.append(Measure(metric, about["label"], about["unit"], own, held_out, outcome))
    return measures


def combine(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome of an aspect: one measure that differs is enough to differ."""
    for outcome in ("differs", "undecided", "as_real"):
        if outcome in outcomes:
            return outcome
    return "not_measured"
