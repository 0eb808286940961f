"""What a microscopist would measure on sets of images, as distances to held-out micrographs."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations

import numpy as np
from tqdm import tqdm

from em_evaluation.bootstrap import (
    absolute_difference,
    circular_wasserstein,
    compare_means,
    histogram_of_values,
    resample_means,
    root_mean_square_difference,
    wasserstein,
)
from em_evaluation.calibrate_detector import calibrate_detector
from em_evaluation.conclusions import judge_excess, order_of
from em_evaluation.defects import (
    KINDS,
    DetectorSettings,
    count_weights,
    detect_defects,
    histogram_by_image,
    sum_by_image,
)
from em_evaluation.environment import count_cores
from em_evaluation.interval import Interval, to_json
from em_evaluation.levels import Sets
from em_evaluation.metric import Metric
from em_evaluation.micrograph_statistics import (
    dark_phase_threshold,
    flatten_background,
    grey_level_histogram,
    noise_level,
    radial_power_spectrum,
    signal_to_noise,
    two_point_correlation,
)
from em_evaluation.microscopy_curves import NUM_ANGLE_BINS, draw_curves, list_curves

MAX_DEFECT_PIXELS = 20e6  # searched for defects in each set: about 20 s
MAX_PIXELS_AT_ONCE = 2**27  # of sets measured in parallel: 16 bytes each, 2 GB
LEAST_SIDE = 32  # pixels
ELONGATED = 0.8  # minor over major axis below which a loop has a direction
NUM_SIZE_BINS, NUM_VALUE_BINS = 120, 512


def make_metrics(unit: str, area_unit: str, bins: dict) -> dict[str, Metric]:
    """Return the metrics by key. bins: edges or largest values of the histograms."""
    distributions = "Wasserstein-1 (earth mover's) distance of the distributions of"
    length_unit = "µm / µm²" if unit == "nm" else "px / 1000 px²"
    rows = {
        "spectrum": (
            "power spectrum", "root mean square difference over frequencies, Hann window",
            "Harris 1978", "dB", root_mean_square_difference,
        ),
        "grey_levels": (
            "grey levels", f"{distributions} pixels", "Vallender 1974", "grey levels",
            wasserstein(1),
        ),
        "noise_level": (
            "noise level", f"{distributions} the images' noise", "Immerkær 1996", "grey levels",
            wasserstein(bins["noise"] / NUM_VALUE_BINS),
        ),
        "signal_to_noise": (
            "signal-to-noise ratio", f"{distributions} the images' ratios", "Immerkær 1996", "",
            wasserstein(bins["ratio"] / NUM_VALUE_BINS),
        ),
        "two_point": (
            "two-point correlation",
            "root mean square difference of S2(r) of the darkest tenth of the pixels, r up to a "
            "quarter of the side", "Torquato 2002", "", root_mean_square_difference,
        ),
        "loop_density": (
            "number of loops", "difference of number over area", "Miles 1974", f"/ {area_unit}",
            absolute_difference,
        ),
        "dot_density": (
            "number of dots", "difference of number over area", "Miles 1974", f"/ {area_unit}",
            absolute_difference,
        ),
        "line_density": (
            "length of lines", "difference of projected length over area", "Underwood 1970",
            length_unit, absolute_difference,
        ),
        "loop_size": (
            "size of loops", f"{distributions} long axes", "Vallender 1974", unit,
            wasserstein(bins["size"][1]),
        ),
        "dot_size": (
            "size of dots", f"{distributions} long axes", "Vallender 1974", unit,
            wasserstein(bins["dot_size"][1]),
        ),
        "loop_direction": (
            "direction of loops",
            f"Wasserstein-1 distance on the circle, loops with an axis ratio below {ELONGATED}",
            "Rabin, Delon & Gousseau 2011", "°", circular_wasserstein(180 / NUM_ANGLE_BINS),
        ),
    }  # fmt: skip
    return {key: Metric(*row[:4], function=row[4]) for key, row in rows.items()}


def measure_set(levels, threshold, bins, pixel_size_nm, settings=None):
    """Return {metric: rows [N, K]} of uint8 images [N, H, W]; defects of the searched ones only."""
    settings = settings or DetectorSettings()
    noise = noise_level(levels)
    rows = {
        "spectrum": radial_power_spectrum(levels),
        "grey_levels": grey_level_histogram(levels),
        "noise": noise[:, None],
        "ratio": signal_to_noise(levels, noise)[:, None],
    }
    rows["noise_level"], _ = histogram_of_values(noise, NUM_VALUE_BINS, 0, bins["noise"])
    rows["signal_to_noise"], _ = histogram_of_values(
        rows["ratio"][:, 0], NUM_VALUE_BINS, 0, bins["ratio"]
    )
    unit_px = 1.0 if pixel_size_nm is None else 1 / pixel_size_nm
    rows["two_point"] = two_point_correlation(
        flatten_background(levels, settings.background * unit_px), threshold
    )
    searched = levels[: count_searched(levels)]
    defects = detect_defects(searched, pixel_size_nm, settings)
    rows |= _measure_defects(defects, searched.shape, bins, pixel_size_nm)
    return rows


def count_searched(levels) -> int:
    """Return how many of the images [N, H, W], the first ones, are searched for defects."""
    return min(len(levels), max(2, int(MAX_DEFECT_PIXELS / (levels.shape[1] * levels.shape[2]))))


def _measure_defects(defects, shape, bins, pixel_size_nm):
    num, height, width = shape
    area = (
        height * width * (pixel_size_nm / 1000) ** 2 if pixel_size_nm else height * width / 1000
    )  # µm² or 1000 px²
    weights = count_weights(defects, (height, width), pixel_size_nm)
    is_loop, is_dot = (defects.kind == KINDS.index(kind) for kind in ("loop", "dot"))
    length = defects.length / 1000 if pixel_size_nm else defects.length
    has_direction = is_loop & (defects.minor < ELONGATED * defects.major)
    totals = {"loop": weights, "dot": weights, "line": length}
    histogram = partial(histogram_by_image, defects, weights=weights, num_images=num)
    angles, edges = np.degrees(defects.angle), np.linspace(0, 180, NUM_ANGLE_BINS + 1)
    return (
        {
            f"{kind}_density": sum_by_image(defects, kind, values, num)[:, None] / area
            for kind, values in totals.items()
        }
        | {
            name: np.bincount(defects.image[mine & (weights > 0)], minlength=num)[:, None]
            for name, mine in (("loops", is_loop), ("loops_with_direction", has_direction))
        }
        | {
            "loop_size": histogram(is_loop, defects.major, edges=bins["size"]),
            "dot_size": histogram(is_dot, defects.major, edges=bins["dot_size"]),
            "loop_direction": histogram(has_direction, angles, edges=edges),
        }
    )


def measure_microscopy(sets: Sets, pixel_size_nm, *, seed, log) -> dict | None:
    """Return the report's section, or None if the images are too small."""
    height, width = sets.held_out.resolution
    if min(height, width) < LEAST_SIDE:
        log(
            f"electron microscopy is left out: images of {height} x {width} pixels are too small "
            f"(at least {LEAST_SIDE})"
        )
        return None
    start = time.perf_counter()
    every = {"held_out": sets.held_out, **sets.judged}
    section = compare_microscopy(
        {key: images.levels[:, 0] for key, images in every.items()},
        {key: images.groups for key, images in every.items()},
        pixel_size_nm,
        models=tuple(sets.generated),
        kinds={level.key: level.kind for level in sets.levels},
        seed=seed,
    )
    log(f"electron microscopy: {len(every)} sets in {time.perf_counter() - start:.1f} s")
    return section


def compare_microscopy(
    sets, groups, pixel_size_nm=None, *, models=(), kinds=None, seed=0, num_calibration=12
) -> dict:
    """Measure sets of images and compare each with the set called "held_out".

    sets: key -> uint8 images [N, H, W]. groups: key -> what was drawn independently [N], or None.
    kinds: key -> kind of each reference level; that of kind "real" shows what is chance.

    Returns the report's section, JSON values. outcomes: set -> metric -> "as_real", "differs",
    "undecided" or "not_measured". blind_spots: reference level -> metrics that do not see it.
    """
    kinds = kinds or {}
    reference, settings = sets["held_out"], DetectorSettings()
    unit_px = 1.0 if pixel_size_nm is None else 1 / pixel_size_nm
    threshold = dark_phase_threshold(flatten_background(reference, settings.background * unit_px))
    bins = choose_bins(sets, max(reference.shape[1:]) / unit_px, settings)
    unit, area_unit = ("nm", "µm²") if pixel_size_nm else ("px", "1000 px²")
    metrics = make_metrics(unit, area_unit, bins)

    means = resample_sets(sets, groups, threshold, bins, pixel_size_nm, seed)
    distances = {
        key: {
            name: compare_means(metric.function, mean[name], means["held_out"][name])
            for name, metric in metrics.items()
        }
        for key, mean in means.items()
        if key != "held_out"
    }
    intervals = {
        key: {name: distance.interval(lowest=0.0) for name, distance in row.items()}
        for key, row in distances.items()
    }
    outcomes = judge_sets(distances, intervals, kinds)
    curves = list_curves(pixel_size_nm, bins, reference.shape[1:])
    num_searched = {key: count_searched(levels) for key, levels in sets.items()}
    return to_json({
        "pixel_size_nm": pixel_size_nm,
        "unit": unit,
        "area_unit": area_unit,
        "num_images": {key: len(levels) for key, levels in sets.items()},
        "num_images_searched": min(num_searched.values()),
        "dark_threshold": threshold,
        "metrics": {
            name: {each: getattr(m, each) for each in ("label", "unit", "definition", "source")}
            for name, m in metrics.items()
        },
        "distances": intervals,
        "levels": {key: describe_set(mean, bins) for key, mean in means.items()},
        "outcomes": outcomes,
        "comparisons": compare_models(distances, models),
        "blind_spots": find_passed_metrics(outcomes, kinds),
        "curves": draw_curves(curves, metrics, means, num_searched),
        "calibration": calibrate_detector(
            min(reference.shape[1:]), pixel_size_nm, num_micrographs=num_calibration
        ),
    })  # fmt: skip


def resample_sets(sets, groups, threshold, bins, pixel_size_nm, seed) -> dict[str, dict]:
    """Return {set: {metric: mean row and bootstrap replicates}}, several sets in parallel."""

    def measure(key):
        rows = measure_set(sets[key], threshold, bins, pixel_size_nm)
        own = groups.get(key)
        side = [seed, key == "held_out"]  # the reference is drawn alike for every set
        return {
            name: resample_means(values, None if own is None else own[: len(values)], side)
            for name, values in rows.items()
        }

    num_at_once = max(1, min(count_cores(), MAX_PIXELS_AT_ONCE // sets["held_out"].size))
    with ThreadPoolExecutor(num_at_once) as pool:
        bar = tqdm(
            pool.map(measure, sets), "electron microscopy", total=len(sets), unit="set", leave=False
        )
        return dict(zip(sets, bar, strict=True))


def choose_bins(sets, side: float, settings: DetectorSettings) -> dict:
    """Return the edges or largest values of the histograms, common to all sets."""
    largest = max(noise_level(levels).max() for levels in sets.values())
    ratio = max(signal_to_noise(levels).max() for levels in sets.values())
    return {
        "noise": largest + 1e-6,
        "ratio": ratio + 1e-6,
        "size": np.linspace(0, 1.2 * side, NUM_SIZE_BINS + 1),
        "dot_size": np.linspace(0, 1.5 * settings.dot, NUM_SIZE_BINS + 1),
    }


def describe_set(mean, bins) -> dict[str, Interval]:
    """Return what a set itself shows: noise, densities of defects, mean size of loops."""
    columns = {
        "noise_level": mean["noise"][:, 0],
        "signal_to_noise": mean["ratio"][:, 0],
        "dark_share": mean["two_point"][:, 0],
    }
    columns |= {name: mean[name][:, 0] for name in ("loop_density", "dot_density", "line_density")}
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, edges in (("loop_size", bins["size"]), ("dot_size", bins["dot_size"])):
            centres = edges[:-1] + edges[1] / 2
            columns[name] = mean[name] @ centres / mean[name].sum(1)

    def interval(values):
        if not np.isfinite(values).all():
            return Interval(*[float("nan")] * 3)
        low, high = np.quantile(values[1:], [0.025, 0.975])
        return Interval(float(values[0]), max(float(low), 0.0), float(high))

    return {name: interval(values) for name, values in columns.items()}


def judge_sets(distances, intervals, kinds) -> dict[str, dict[str, str]]:
    """Return for each set and metric whether it is as near to the held-out images as real ones."""
    real = next((key for key, kind in kinds.items() if kind == "real"), None)
    outcomes = {}
    for key, row in distances.items():
        outcomes[key] = {}
        for name, distance in row.items():
            outcome = "not_measured"
            if real is not None and key != real:
                difference = (distance - distances[real][name]).interval()
                if np.isfinite(difference.value):
                    outcome = judge_excess(difference, intervals[real][name])
            outcomes[key][name] = outcome
    return outcomes


def compare_models(distances, models) -> list[dict]:
    """Return the differences between the models' distances, metric by metric."""
    return [
        {
            "first": first,
            "second": second,
            "metric": name,
            "difference": difference,
            "first_is": order_of(difference) if np.isfinite(difference.value) else "undefined",
        }
        for first, second in combinations(models, 2)
        for name in distances[first]
        for difference in ((distances[first][name] - distances[second][name]).interval(),)
    ]


def find_passed_metrics(outcomes, kinds) -> dict[str, list[str]]:
    """Return {reference level: metrics that do not find it farther than real images are}."""
    wrong = ("as_real", "undecided")
    blind = {
        key: [name for name, outcome in outcomes[key].items() if outcome in wrong]
        for key, kind in kinds.items()
        if kind not in ("real", "reconstruction")
    }
    return {key: names for key, names in blind.items() if names}
