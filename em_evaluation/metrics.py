"""Every metric by its name: what it is, which way is better, and how it is measured with its interval."""

from dataclasses import dataclass

import numpy as np

from em_evaluation.clip_distance import cmmd_influence
from em_evaluation.distances import (
    Distance,
    Interval,
    bootstrap_interval,
    frechet_influence,
    kernel_influence,
)
from em_evaluation.extrapolation import (
    frechet_distance_infinite,
    frechet_distance_infinite_interval,
)
from em_evaluation.neighbours import measure_neighbour_intervals, measure_neighbours

NEIGHBOURS = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Metric:
    label: str
    definition: str
    higher_is_better: bool = False
    least: int = 2  # images of each set
    needs_unit_norm: bool = False


METRICS = {
    "frechet_distance": Metric(
        "Frechet distance",
        "Frechet distance of Gaussians fitted to the features, biased upwards at a finite number of images: comparable only "
        "at this number",
    ),
    "frechet_distance_infinite": Metric(
        "Frechet distance at infinity",
        "Frechet distance extrapolated linearly in 1 / N to infinitely many images of both sets (after Chong and Forsyth "
        "2020); still too high where the features outnumber the images",
        least=4,
    ),
    "kernel_distance": Metric(
        "Kernel distance",
        "unbiased squared maximum mean discrepancy, kernel (x.y / D + 1)^3 (Binkowski et al. 2018)",
    ),
    "cmmd": Metric(
        "CMMD",
        "1000 times the unbiased squared maximum mean discrepancy of CLIP embeddings, Gaussian kernel of width 10 "
        "(Jayasumana et al. 2024)",
        needs_unit_norm=True,
    ),
    "precision": Metric(
        "Precision",
        "share of generated images within reach (3rd neighbour) of a real one: fidelity (Kynkäänniemi et al. 2019)",
        higher_is_better=True,
        least=12,
    ),
    "recall": Metric(
        "Recall",
        "share of real images within reach (3rd neighbour) of a generated one: variety (Kynkäänniemi et al. 2019)",
        higher_is_better=True,
        least=12,
    ),
    "density": Metric(
        "Density",
        "how many real balls (5th neighbour) hold a generated image, over 5: fidelity, robust to outliers (Naeem et al. 2020)",
        higher_is_better=True,
        least=12,
    ),
    "coverage": Metric(
        "Coverage",
        "share of real balls (5th neighbour) that hold a generated image: variety (Naeem et al. 2020)",
        higher_is_better=True,
        least=12,
    ),
}
INFLUENCES = {
    "frechet_distance": frechet_influence,
    "kernel_distance": kernel_influence,
    "cmmd": cmmd_influence,
}


def choose_metrics(names, extractor, num_images) -> tuple[tuple[str, ...], list[str]]:
    """Return the metrics to measure with an extractor's features, in the table's order, and what to say of those left out.

    The Frechet distance is always one of them: conclusions rest on it. An empty `names` means all that apply. CMMD applies to
    embeddings of length 1 alone. `ValueError` for an unknown name.
    """
    unknown = sorted(set(names) - set(METRICS))
    if unknown:
        raise ValueError(f"unknown metrics {', '.join(unknown)}; there are {', '.join(METRICS)}")
    wanted = [name for name in METRICS if not names or name in names or name == "frechet_distance"]
    wanted = [name for name in wanted if extractor.unit_norm or not METRICS[name].needs_unit_norm]
    few = [name for name in wanted if METRICS[name].least > num_images]
    notes = []
    if few:
        labels = ", ".join(METRICS[name].label for name in few)
        least = max(METRICS[name].least for name in few)
        notes = [
            f"{labels}: {least} images of each set are needed, there are {num_images}: left out."
        ]
    return tuple(name for name in wanted if name not in few), notes


def refuse_unmeasurable(names, extractors) -> None:
    """Refuse a metric that none of the extractors can give: said before anything long begins."""
    for name in names:
        if (
            name in METRICS
            and METRICS[name].needs_unit_norm
            and not any(each.unit_norm for each in extractors)
        ):
            raise ValueError(
                f"{name} needs embeddings of length 1; add the extractor clip (--extractors ... clip)"
            )


def measure(
    names, a, b, *, groups_a=None, groups_b=None, seed=0
) -> tuple[dict[str, Interval], dict[str, Distance]]:
    """Return metrics of features a [N, D] (generated) against b [M, D] with 95 % intervals, and the distances with influences.

    `groups_*` name what was drawn independently, such as the micrograph of each tile; intervals resample whole groups.
    """
    distances = {name: INFLUENCES[name](a, b) for name in names if name in INFLUENCES}
    groups = {"groups_a": groups_a, "groups_b": groups_b}
    found = {
        name: bootstrap_interval(distance, **groups, seed=seed)
        for name, distance in distances.items()
    }
    if "frechet_distance" in found:
        interval = found["frechet_distance"]
        found["frechet_distance"] = Interval(interval.value, max(interval.low, 0.0), interval.high)
    if "frechet_distance_infinite" in names:
        found["frechet_distance_infinite"] = frechet_distance_infinite_interval(
            a, b, seed=seed, finite=found.get("frechet_distance"), **groups
        )
    if any(name in names for name in NEIGHBOURS):
        four = measure_neighbour_intervals(
            a, b, groups_generated=groups_a, groups_real=groups_b, seed=seed
        )
        found |= {name: getattr(four, name) for name in NEIGHBOURS}
    return {name: found[name] for name in names}, distances


def measure_values(names, a, b, *, seed=0) -> dict[str, float]:
    """Return metrics of features a [N, D] (generated) against b [M, D] without intervals, for a point of a training curve."""
    found = {name: INFLUENCES[name](a, b).value for name in names if name in INFLUENCES}
    if "frechet_distance_infinite" in names:
        found["frechet_distance_infinite"] = frechet_distance_infinite(a, b, seed=seed)
    if any(name in names for name in NEIGHBOURS):
        four = measure_neighbours(a, b)
        found |= {name: getattr(four, name) for name in NEIGHBOURS}
    return {name: found[name] for name in names}


def interval_to_json(interval: Interval) -> dict:
    """Return value, low and high as plain numbers."""
    return {key: float(np.float64(getattr(interval, key))) for key in ("value", "low", "high")}
