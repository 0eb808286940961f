"""The conclusions of a report as values: comparisons, autoencoders' shares, verdicts.

`em_evaluation.wording` puts them into words.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Literal

from em_evaluation.distances import Distance, difference_interval
from em_evaluation.feature_metrics import METRICS
from em_evaluation.interval import Interval
from em_evaluation.levels import Sets

Aspect = Literal["fidelity", "variety", "defects"]
Outcome = Literal["as_real", "differs", "undecided", "not_measured"]
Blindness = Literal["nothing_found", "passed_by_noise", "narrow"]
Order = Literal["closer", "farther", "undecided"]
Side = Literal["above", "below", "undecided"]
METRICS_OF_ASPECT: dict[Aspect, tuple[str, ...]] = {
    "fidelity": ("precision", "density"),
    "variety": ("recall", "coverage"),
}
DEFECT_METRICS = ("loop_density", "loop_size", "dot_density", "line_density")
TOLERANCE = 0.1  # a share that is at most this far below that of real images counts as real
NARROW = 0.5  # a model with less than this share of real images' recall is narrow


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
    autoencoder_is: Side


@dataclass(frozen=True)
class Measure:
    """One number of a verdict, beside that of real images.

    metric: its key. reference: the same of real images: of the level "real", or of the held-out
    images for defects. blind: why "as real" would show nothing, None if it would.
    """

    metric: str
    label: str
    unit: str
    value: Interval | None
    reference: Interval | None
    outcome: Outcome
    blind: Blindness | None = None


@dataclass(frozen=True)
class Verdict:
    """What the measures of one aspect of a model say together."""

    model: str
    aspect: Aspect
    outcome: Outcome
    measures: tuple[Measure, ...]


def conclude(
    measurement: dict,
    distances: Mapping[str, Distance],
    sets: Sets,
    microscopy: dict | None,
    seed: int,
) -> dict[str, list]:
    """Return the differences between sets, the autoencoders' shares, and the verdicts.

    Args:
        measurement: What `measure_features` returns for the first extractor.
        distances: Set -> Frechet distance to the held-out images.
        sets: The images.
        microscopy: The report's section, or None.
        seed: Seed of the intervals.
    """
    models = list(sets.generated)

    def subtract(first: str, second: str, share: float = 1) -> Interval:
        return difference_interval(
            distances[first],
            distances[second].scaled(share),
            groups_first=sets.judged[first].groups,
            groups_second=sets.judged[second].groups,
            groups_reference=sets.held_out.groups,
            seed=seed,
        )

    pairs = [*combinations(models, 2), *product(models, (level.key for level in sets.levels))]
    comparisons = [
        Comparison(*pair, difference, order_of(difference))
        for pair in pairs
        for difference in (subtract(*pair),)
    ]
    autoencoders = [
        weigh_autoencoder(
            level.key, level.model, distances, sets.real, subtract(level.key, level.model, 0.5)
        )
        for level in sets.levels
        if level.kind == "reconstruction" and level.model and distances[level.model].value > 0
    ]
    against_real = {each.first: each for each in comparisons if each.second == sets.real}
    held_out = {key: row["held_out"] for key, row in measurement["rows"].items()}
    spots = microscopy["blind_spots"] if microscopy else {}
    blind = {
        metric
        for level in sets.levels
        if level.kind in ("surrogates", "noise", "untrained")
        for metric in spots.get(level.key, ())
    }
    verdicts = [
        verdict
        for model in models
        for verdict in judge_model(
            model, held_out, sets.real, against_real.get(model), microscopy, blind
        )
    ]
    return {"comparisons": comparisons, "autoencoders": autoencoders, "verdicts": verdicts}


def order_of(difference: Interval) -> Order:
    """Return where the first of a pair lies, from its distance less that of the second."""
    return "closer" if difference.high < 0 else "farther" if difference.low > 0 else "undecided"


def weigh_autoencoder(
    level: str, model: str, distances: Mapping[str, Distance], real: str | None, to_half: Interval
) -> AutoencoderShare:
    """Compare the distance of an autoencoder, the key of its level, with that of its model."""
    own, score = distances[level].value, distances[model].value
    where: Side = "above" if to_half.low > 0 else "below" if to_half.high < 0 else "undecided"
    excess = None
    if real is not None and score > distances[real].value:
        best = distances[real].value
        excess = (own - best) / (score - best)
        excess = excess if 0 <= excess <= 1 else None
    return AutoencoderShare(model, level, own / score, excess, to_half, where)


def judge_model(
    model: str,
    rows: Mapping[str, Mapping[str, Interval]],
    real: str | None,
    comparison: Comparison | None,
    microscopy: dict | None,
    blind: Collection[str] = (),
) -> list[Verdict]:
    """Return the verdicts on a model: fidelity, variety, defects.

    Args:
        model: Its key.
        rows: Set -> metric -> interval.
        real: The key of the level "real".
        comparison: The model against real images, by the Frechet distance.
        microscopy: What `compare_microscopy` returns.
        blind: Measures of defects that noise, texture only or an untrained model pass.
    """
    own, best = rows[model], {} if real is None else rows.get(real, {})
    aspects: dict[Aspect, list[Measure]] = {
        aspect: [
            make_measure(metric, own[metric], best[metric], judge_loss(best[metric] - own[metric]))
            for metric in metrics
            if metric in own and metric in best
        ]
        for aspect, metrics in METRICS_OF_ASPECT.items()
    }
    if is_narrow(own, best):
        aspects["fidelity"] = [doubt_narrow(each) for each in aspects["fidelity"]]
    if comparison is not None and not aspects["fidelity"]:  # the distance is all there is
        distance = "frechet_distance"
        outcome = judge_excess(comparison.difference, best[distance])
        aspects["fidelity"] = [make_measure(distance, own[distance], best[distance], outcome)]
    aspects["defects"] = judge_defects(model, real, microscopy, blind)
    return [
        Verdict(model, aspect, combine(measures), tuple(measures))
        for aspect, measures in aspects.items()
    ]


def make_measure(metric: str, value, reference, outcome: Outcome) -> Measure:
    return Measure(metric, METRICS[metric].label, METRICS[metric].unit, value, reference, outcome)


def is_narrow(own: Mapping[str, Interval], real: Mapping[str, Interval]) -> bool:
    """Return whether a model's recall is far below that of real images, intervals apart."""
    if "recall" not in own or "recall" not in real:
        return False
    recall, best = own["recall"], real["recall"]
    return recall.value < NARROW * best.value and recall.high < best.low


def doubt_narrow(measure: Measure) -> Measure:
    """Take back "as real": images that are all typical have a high precision and density."""
    if measure.outcome != "as_real":
        return measure
    return replace(measure, outcome="undecided", blind="narrow")


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


def judge_defects(
    model: str, real: str | None, section: dict | None, blind: Collection[str]
) -> list[Measure]:
    """Return the measures of defects from the report's section on microscopy.

    A measure that would pass noise cannot say "as real": it is undecided. It may say "differs".
    """
    if section is None or real is None:
        return []
    measures = []
    for metric in DEFECT_METRICS:
        own, held_out = (
            Interval.from_json(section["levels"][key].get(metric)) for key in (model, "held_out")
        )
        outcome: Outcome = section["outcomes"][model][metric]
        if own is not None and held_out is not None and outcome != "not_measured":
            about = section["metrics"][metric]
            why: Blindness | None = None
            if outcome == "as_real" and own.value == held_out.value == 0:
                why = "nothing_found"
            elif outcome == "as_real" and metric in blind:
                why = "passed_by_noise"
            outcome = "undecided" if why else outcome
            label, unit = about["label"], about["unit"]
            measures.append(Measure(metric, label, unit, own, held_out, outcome, why))
    return measures


def combine(measures: Sequence[Measure]) -> Outcome:
    """Return the outcome of an aspect: one measure that differs is enough to differ.

    Blind measures count only if there are no others.
    """
    outcomes = [each.outcome for each in measures if each.blind is None]
    outcomes = outcomes or [each.outcome for each in measures]
    for outcome in ("differs", "undecided", "as_real"):
        if outcome in outcomes:
            return outcome
    return "not_measured"
