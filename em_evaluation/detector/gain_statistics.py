"""What pairs add: means over splits and seeds, paired differences and label equivalents.

The intervals are those of a hierarchical bootstrap: test specimens, splits and, in each split,
seeds are drawn with replacement. All arms are drawn alike, so that what they share cancels in a
difference. With few splits the spread of a bootstrap is too small; replicates are moved away from
the value by sqrt(S / (S - 1)), the factor of the mean of S splits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from em_evaluation.detector import scores as score_functions
from em_evaluation.detector.arms import STRONG
from em_evaluation.detector.scores import Scores
from em_evaluation.interval import Interval

NUM_REPLICATES = 1000
METRICS = {  # name: (label, unit, whether more is better)
    "f1": ("F1 at IoU 0.5", "", True),
    "ap50": ("AP50", "", True),
    "density_error": ("Error of density", "%", False),
    "size_error": ("Error of mean size", "%", False),
}
FROM_SUMS = {
    "f1": score_functions.f1_score,
    "density_error": score_functions.density_error,
    "size_error": score_functions.size_error,
}
Cell = Mapping[tuple[int, int], Scores]  # (split, seed) -> scores, of one arm at one number


@dataclass(frozen=True)
class Draws:
    """Which specimens, splits and seeds each replicate has; the first rows are the plain mean.

    specimens: How often each specimen is drawn, [1 + R, G].
    trainings: Weight of each training, [1 + R, splits, seeds], of sum 1.
    """

    specimens: np.ndarray
    trainings: np.ndarray


def make_draws(num_groups, num_splits, num_seeds, seed=0, num_replicates=NUM_REPLICATES) -> Draws:
    """Draw the replicates."""
    rng = np.random.default_rng(seed)
    specimens = np.ones((1 + num_replicates, num_groups))
    specimens[1:] = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), num_replicates)
    splits = rng.multinomial(num_splits, np.full(num_splits, 1 / num_splits), num_replicates)
    # a split that is drawn twice has its seeds drawn twice
    seeds = rng.multinomial(splits * num_seeds, np.full(num_seeds, 1 / num_seeds))
    trainings = np.ones((1 + num_replicates, num_splits, num_seeds))
    trainings[1:] = seeds
    return Draws(specimens, trainings / (num_splits * num_seeds))


def resample(cell: Cell, draws: Draws) -> dict[str, np.ndarray]:
    """Return each metric of an arm at one number of micrographs: the value and replicates [1 + R].

    A cell of one split stands for all splits.
    """
    _, num_splits, num_seeds = draws.trainings.shape
    totals = {name: np.zeros(len(draws.trainings)) for name in METRICS}
    for split in range(num_splits):
        for seed in range(num_seeds):
            scores = cell[(split, seed) if (split, seed) in cell else (0, seed)]
            sums = np.einsum("rg,gkc->rkc", draws.specimens, scores.sums)
            values = {name: function(sums) for name, function in FROM_SUMS.items()}
            values["ap50"] = score_functions.average_precision(scores, draws.specimens)
            for name, value in values.items():
                totals[name] = totals[name] + draws.trainings[:, split, seed] * value
    return {name: widen(total, num_splits) for name, total in totals.items()}


def widen(values: np.ndarray, num_splits: int) -> np.ndarray:
    """Return a value and its replicates [1 + R] with the small-sample factor of the splits."""
    factor = np.sqrt(num_splits / (num_splits - 1)) if num_splits > 1 else 1.0
    return np.concatenate([values[:1], values[0] + factor * (values[1:] - values[0])])


def make_interval(values: np.ndarray) -> Interval:
    """Return the 95 % interval of a value and its replicates [1 + R]."""
    known = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(known):
        return Interval(float("nan"), float("nan"), float("nan"))  # None in JSON
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))


def find_equivalent(values: np.ndarray, num: int, curve: Mapping[int, np.ndarray]) -> dict:
    """Return how many more labelled micrographs reach the same F1 with classical augmentation.

    The curve over numbers of micrographs is made rising and interpolated over their logarithm. Its
    ends limit what can be read off it.

    Args:
        values: F1 of an arm at `num` micrographs and replicates, [1 + R].
        num: Number of labelled micrographs of the arm.
        curve: {number of micrographs: F1 of STRONG and replicates [1 + R]}, of two numbers or more.

    Returns:
        JSON values: "value", "low", "high", and for each whether it lies at an end of the curve
        ("at_least": the true one may be larger; "at_most": smaller).
    """
    nums = sorted(curve)
    heights = np.maximum.accumulate(np.stack([curve[each] for each in nums], -1), -1)
    tiny = 1e-9 * np.arange(len(nums))  # flat stretches: the least number that reaches the height
    logs = np.log(nums)
    reached = np.array([np.interp(f, h + tiny, logs) for f, h in zip(values, heights)])
    equivalent = np.exp(reached) - num
    low, high = np.quantile(equivalent[1:], [0.025, 0.975])
    ends = {"value": float(equivalent[0]), "low": float(low), "high": float(high)}
    most, least = nums[-1] - num - 0.01, nums[0] - num + 0.01
    return ends | {
        "at_least": [key for key, each in ends.items() if each >= most],
        "at_most": [key for key, each in ends.items() if each <= least],
    }


def analyse(cells: Mapping[tuple[str, int], Cell], num_splits, num_seeds, seed=0) -> dict:
    """Return what results.json says of all arms, as JSON values.

    Args:
        cells: {(key of the arm, number of micrographs): cell}; complete cells only.
        num_splits, num_seeds: Of the protocol.
        seed: Of the bootstrap.

    Returns:
        "cells", "differences" (arm less STRONG at the same number) and "equivalents".
    """
    first = next(iter(next(iter(cells.values())).values()))
    draws = make_draws(len(first.groups), num_splits, num_seeds, seed)
    values = {key: resample(cell, draws) for key, cell in cells.items()}
    curve = {num: each["f1"] for (arm, num), each in values.items() if arm in (STRONG, "all")}
    rows, differences, equivalents = [], [], []
    for (arm, num), each in values.items():
        rows.append({"arm": arm, "num": num, "by_kind": describe_kinds(cells[arm, num])})
        rows[-1] |= {name: make_interval(value).to_json() for name, value in each.items()}
        base = values.get((STRONG, num))
        if base is None or arm == STRONG:
            continue
        differences.append({"arm": arm, "num": num})
        differences[-1] |= {
            name: make_interval(value - base[name]).to_json() for name, value in each.items()
        }
        if len(curve) > 1:
            equivalents.append({"arm": arm, "num": num} | find_equivalent(each["f1"], num, curve))
    return {"cells": rows, "differences": differences, "equivalents": equivalents}


def describe_kinds(cell: Cell) -> dict[str, dict]:
    """Return F1, recall and precision of each kind, means over trainings."""
    first = next(iter(cell.values()))
    sums = np.stack([each.sums.sum(0) for each in cell.values()])  # [trainings, K, 5]
    described: dict[str, dict] = {}
    for k, kind in enumerate(first.kinds):
        mine = sums[:, k : k + 1]
        row: dict = {"num_true": int(mine[0, 0, 2])}
        for name in ("f1_score", "recall", "precision"):
            values = getattr(score_functions, name)(mine)
            known = values[np.isfinite(values)]
            row[name.removesuffix("_score")] = float(known.mean()) if len(known) else None
        described[kind] = row
    return described
