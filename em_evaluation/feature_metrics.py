"""The metrics that rest on features: what each is, and how it is measured with its interval."""

from em_evaluation.distances import (
    Distance,
    bootstrap_interval,
    cmmd_influence,
    frechet_influence,
    kernel_influence,
)
from em_evaluation.extrapolation import (
    frechet_distance_infinite,
    frechet_distance_infinite_interval,
)
from em_evaluation.interval import Interval
from em_evaluation.metric import Metric
from em_evaluation.neighbours import (
    NeighbourMetrics,
    measure_neighbour_intervals,
    measure_neighbours,
)

METRICS = {
    "frechet_distance": Metric(
        "Frechet distance",
        "distance of the Gaussians fitted to the features of both sets; it grows as the number of "
        "images falls, so compare it only at one number of images",
        "Heusel et al. 2017",
    ),
    "frechet_distance_infinite": Metric(
        "Frechet distance at infinity",
        "Frechet distance extrapolated to infinitely many images; still too high if there are "
        "fewer images than features",
        "after Chong & Forsyth 2020",
        least=4,
    ),
    "kernel_distance": Metric(
        "Kernel distance",
        "squared maximum mean discrepancy of the features; unbiased at any number of images",
        "Binkowski et al. 2018",
    ),
    "cmmd": Metric(
        "CMMD",
        "1000 times the squared maximum mean discrepancy of CLIP embeddings",
        "Jayasumana et al. 2024",
        needs_unit_norm=True,
    ),
    "precision": Metric(
        "Precision",
        "fidelity: share of generated images that lie as near to a real image as its 3rd real "
        "neighbour",
        "Kynkäänniemi et al. 2019",
        higher_is_better=True,
        least=12,
    ),
    "recall": Metric(
        "Recall",
        "variety: share of real images that lie as near to a generated image as its 3rd generated "
        "neighbour",
        "Kynkäänniemi et al. 2019",
        higher_is_better=True,
        least=12,
    ),
    "density": Metric(
        "Density",
        "fidelity: how many real images, of 5, have a generated image nearer than their 5th real "
        "neighbour; robust to outliers, about 1 for real images",
        "Naeem et al. 2020",
        higher_is_better=True,
        least=12,
    ),
    "coverage": Metric(
        "Coverage",
        "variety: share of real images that have a generated image nearer than their 5th real "
        "neighbour",
        "Naeem et al. 2020",
        higher_is_better=True,
        least=12,
    ),
}
INFLUENCES = {
    "frechet_distance": frechet_influence,
    "kernel_distance": kernel_influence,
    "cmmd": cmmd_influence,
}


def check_metrics(names, extractors=(), *, in_training=False) -> None:
    """Raise `ValueError` for metrics that do not exist or that none of the extractors can give.

    in_training: Metrics are measured while a model trains, on efficientnet-lite0.
    """
    usable = [
        name for name, metric in METRICS.items() if not (in_training and metric.needs_unit_norm)
    ]
    unknown = sorted(set(names) - set(usable))
    if unknown:
        where = " during training" if in_training else ""
        raise ValueError(
            f"Unknown metrics{where}: {', '.join(unknown)}. Choose from {', '.join(usable)}."
        )
    for name in names:
        if METRICS[name].needs_unit_norm and not any(each.unit_norm for each in extractors):
            raise ValueError(
                f"{name} needs embeddings of length 1. Add the extractor clip (--extractors clip)."
            )


def choose_metrics(names, extractor, num_images) -> tuple[tuple[str, ...], list[str]]:
    """Return the metrics to measure with an extractor, in the table's order, and notes.

    The Frechet distance is always measured, since the conclusions rest on it.

    Args:
        names: Metrics that `check_metrics` accepts; empty for all that apply.
        extractor: Gives the features.
        num_images: Images of each set; metrics that need more are left out, with a note.
    """
    wanted = [name for name in METRICS if not names or name in names or name == "frechet_distance"]
    wanted = [name for name in wanted if extractor.unit_norm or not METRICS[name].needs_unit_norm]
    few = [name for name in wanted if METRICS[name].least > num_images]
    notes = []
    if few:
        labels = ", ".join(METRICS[name].label for name in few)
        least = max(METRICS[name].least for name in few)
        notes = [
            f"Not measured: {labels}. They need {least} images of each set; there are {num_images}."
        ]
    return tuple(name for name in wanted if name not in few), notes


def measure(
    names, a, b, *, groups_a=None, groups_b=None, seed=0
) -> tuple[dict[str, Interval], dict[str, Distance]]:
    """Measure features a [N, D] (generated) against b [M, D] (real).

    Args:
        names: Metrics, from `choose_metrics`.
        a, b: Features.
        groups_a, groups_b: What was drawn independently, such as the micrograph of each tile.
            Intervals resample whole groups.
        seed: Seed of the intervals.

    Returns:
        The metrics with 95 % intervals, and the distances with their influences.
    """
    distances = {name: INFLUENCES[name](a, b) for name in names if name in INFLUENCES}
    groups = {"groups_a": groups_a, "groups_b": groups_b}
    found = {
        name: bootstrap_interval(distance, **groups, seed=seed)
        for name, distance in distances.items()
    }
    if "frechet_distance" in found:
        found["frechet_distance"] = found["frechet_distance"].limited(lowest=0.0)
    if "frechet_distance_infinite" in names:
        found["frechet_distance_infinite"] = frechet_distance_infinite_interval(
            a, b, seed=seed, finite=found.get("frechet_distance"), **groups
        )
    if any(name in names for name in NeighbourMetrics._fields):
        four = measure_neighbour_intervals(
            a, b, groups_generated=groups_a, groups_real=groups_b, seed=seed
        )
        found |= four._asdict()
    return {name: found[name] for name in names}, distances


def measure_values(names, a, b, *, seed=0) -> dict[str, float]:
    """Measure features a [N, D] (generated) against b [M, D] (real) without intervals."""
    found = {name: INFLUENCES[name](a, b).value for name in names if name in INFLUENCES}
    if "frechet_distance_infinite" in names:
        found["frechet_distance_infinite"] = frechet_distance_infinite(a, b, seed=seed)
    if any(name in names for name in NeighbourMetrics._fields):
        found |= measure_neighbours(a, b)._asdict()
    return {name: found[name] for name in names}
