"""What a metric does not see: pairs of sets with a known order that it does not put in this order.

Real images are nearer to real images than an autoencoder's images of them; these are nearer than
what a model on its latents draws; then comes texture without structure, then noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from em_evaluation.feature_metrics import METRICS
from em_evaluation.interval import Interval
from em_evaluation.levels import ReferenceLevel


@dataclass(frozen=True)
class Misordered:
    """Two sets in the wrong order, or level: `nearer` should be nearer to the held-out images."""

    nearer: str
    farther: str
    nearer_value: float
    farther_value: float


@dataclass(frozen=True)
class BlindSpot:
    """The pairs that one metric does not put in their order, of `num_pairs` pairs."""

    metric: str
    num_pairs: int
    misordered: tuple[Misordered, ...]


def find_blind_spots(
    rows: Mapping[str, Mapping[str, Interval]],
    metrics: Sequence[str],
    models: Sequence[str],
    levels: Sequence[ReferenceLevel],
) -> tuple[BlindSpot, ...]:
    """Find what each metric does not tell apart.

    Args:
        rows: Set -> metric -> interval, against the held-out images.
        metrics: Names of metrics.
        models: Keys of the models. A pair with a model says less: the model may truly be no
            better.
        levels: The reference levels.
    """
    pairs = [pair for pair in expect_order(models, levels) if set(pair) <= set(rows)]
    found = []
    for metric in metrics:
        sign = -1 if METRICS[metric].higher_is_better else 1
        values = {key: row[metric].value for key, row in rows.items()}
        wrong = tuple(
            Misordered(near, far, values[near], values[far])
            for near, far in pairs
            if sign * values[near] >= sign * values[far]
        )
        found.append(BlindSpot(metric, len(pairs), wrong))
    return tuple(found)


def expect_order(models: Sequence[str], levels: Sequence[ReferenceLevel]) -> list[tuple[str, str]]:
    """Return the pairs (nearer, farther) that any metric should put in this order.

    An autoencoder is compared only with the model it belongs to.
    """

    def of_kind(kind):
        return [level.key for level in levels if level.kind == kind]

    owner = {level.key: level.model for level in levels if level.kind == "reconstruction"}
    chain = [of_kind("real"), list(owner), list(models), of_kind("surrogates"), of_kind("noise")]
    return [
        (near, far)
        for i, step in enumerate(chain)
        for later in chain[i + 1 :]
        for near in step
        for far in later
        if near not in owner or far not in models or owner[near] == far
    ]
