"""Electron-microscopy metrics of sets of images: each a distance to held-out micrographs that has a unit and an interval."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from em_evaluation.defects import (
    KINDS,
    DetectorSettings,
    count_weights,
    detect_defects,
    histogram_by_image,
    sum_by_image,
)
from em_evaluation.micrograph_statistics import (
    dark_phase_threshold,
    flatten_background,
    frequency_bins,
    grey_level_histogram,
    noise_level,
    radial_power_spectrum,
    signal_to_noise,
    two_point_correlation,
)
from em_evaluation.profiles import (
    absolute_difference,
    circular_wasserstein,
    compare_means,
    histogram_of_values,
    resample_means,
    root_mean_square_difference,
    wasserstein,
)

MAX_DEFECT_PIXELS = (
    20e6  # of each set that the detector searches: about 20 s; 305 images of 256 x 256
)
MAX_PIXELS_AT_ONCE = 2**27  # of sets that are measured beside each other: 16 bytes each, 2 GB
LEAST_SIDE = 32  # pixels; a defect does not fit into less
ELONGATED = 0.8  # minor over major axis below which a loop has a direction
NUM_SIZE_BINS, NUM_ANGLE_BINS, NUM_VALUE_BINS = 120, 36, 512


@dataclass(frozen=True)
class Metric:
    """One distance: what it is, its unit, where it comes from, and the function of two sets' mean rows that computes it."""

    name: str
    unit: str
    definition: str
    source: str
    function: object


def make_metrics(unit, area_unit, bins):
    """Return the metrics by key; `unit` is nm or px, and `bins` has the histograms' edges or the largest value."""
    distributions = "Wasserstein-1 (earth mover's) distance of the distributions of"
    length_unit = "µm / µm²" if unit == "nm" else "px / 1000 px²"
    rows = {
        "spectrum": (
            "radial power spectrum", "dB", "root mean square difference over frequencies of the spectra in dB, Hann window",
            "Harris 1978", root_mean_square_difference,
        ),
        "grey_levels": (
            "grey-level histogram", "grey levels", f"{distributions} pixels", "Vallender 1974", wasserstein(1)
        ),
        "noise_level": (
            "noise level", "grey levels", f"{distributions} the images' noise", "Immerkær 1996",
            wasserstein(bins["noise"] / NUM_VALUE_BINS),
        ),
        "signal_to_noise": (
            "signal-to-noise", "", f"{distributions} the images' deviation beyond noise over that of noise", "Immerkær 1996",
            wasserstein(bins["ratio"] / NUM_VALUE_BINS),
        ),
        "two_point": (
            "two-point correlation", "", "root mean square difference of S2(r) of the dark phase, r up to a quarter of the side",
            "Torquato 2002", root_mean_square_difference,
        ),
        "loop_density": (
            "number of loops", f"/ {area_unit}", "difference of number over area", "Miles 1974", absolute_difference
        ),
        "dot_density": (
            "number of dots", f"/ {area_unit}", "difference of number over area", "Miles 1974", absolute_difference
        ),
        "line_density": (
            "length of lines", length_unit, "difference of projected length over area", "Underwood 1970", absolute_difference
        ),
        "loop_size": (
            "size of loops", unit, f"{distributions} loops' long axes", "Vallender 1974", wasserstein(bins["size"][1])
        ),
        "dot_size": (
            "size of dots", unit, f"{distributions} dots' long axes", "Vallender 1974", wasserstein(bins["dot_size"][1])
        ),
        "loop_direction": (
            "direction of loops", "°", f"Wasserstein-1 distance on the circle, loops with an axis ratio below {ELONGATED}",
            "Rabin, Delon & Gousseau 2011", circular_wasserstein(180 / NUM_ANGLE_BINS),
        ),
    }  # fmt: skip
    return {key: Metric(*row) for key, row in rows.items()}


def measure_set(levels, threshold, bins, pixel_size_nm, settings=None):
    """Return {metric: rows [N, K]} of uint8 images [N, H, W]; those of defects have a row for each image that is searched."""
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
    edges = np.linspace(0, 180, NUM_ANGLE_BINS + 1)
    return {
        "loop_density": sum_by_image(defects, "loop", weights, num)[:, None] / area,
        "dot_density": sum_by_image(defects, "dot", weights, num)[:, None] / area,
        "line_density": sum_by_image(defects, "line", length, num)[:, None] / area,
        "loop_size": histogram_by_image(
            defects, is_loop, defects.major, weights, bins["size"], num
        ),
        "dot_size": histogram_by_image(
            defects, is_dot, defects.major, weights, bins["dot_size"], num
        ),
        "loop_direction": histogram_by_image(
            defects, has_direction, np.degrees(defects.angle), weights, edges, num
        ),
    }


def measure_microscopy(held_out, judged, models, floors, pixel_size_nm, seed, log) -> dict | None:
    """Return the report's section of ImageSets: `held_out`, and key -> set of the models and floors; None if too small."""
    if min(held_out.resolution) < LEAST_SIDE:
        log(
            f"electron microscopy left out: images of {held_out.resolution[0]} x {held_out.resolution[1]} pixels are too small"
        )
        return None
    start = time.perf_counter()
    sets = {"held_out": held_out, **judged}
    section = compare_microscopy(
        {key: images.levels[:, 0] for key, images in sets.items()},
        {key: images.groups for key, images in sets.items()},
        pixel_size_nm,
        models=models,
        floors=floors,
        seed=seed,
    )
    log(f"electron microscopy: {len(sets)} sets in {time.perf_counter() - start:.1f} s")
    return section


def compare_microscopy(
    sets,
    groups,
    pixel_size_nm=None,
    *,
    models=(),
    floors=(),
    seed=0,
    num_calibration=12,
    progress=None,
):
    """Measure sets of images as a microscopist would, and compare them with the one called "held_out"; JSON values.

    sets: key -> uint8 [N, H, W], with "held_out" and, for what is beyond chance, "real". groups: key -> what was drawn
    independently [N], or None. models, floors: the keys to compare with each other and with "real". Returns the report's
    section "microscopy".
    """
    from em_evaluation.calibrate_detector import (
        calibrate_detector,
    )  # not at the top: it is a command, too

    reference = sets["held_out"]
    settings = DetectorSettings()
    unit_px = 1.0 if pixel_size_nm is None else 1 / pixel_size_nm
    threshold = dark_phase_threshold(flatten_background(reference, settings.background * unit_px))
    largest = max(noise_level(levels).max() for levels in sets.values())
    ratio = max(signal_to_noise(levels).max() for levels in sets.values())
    side = max(reference.shape[1:]) / unit_px
    bins = {
        "noise": largest + 1e-6,
        "ratio": ratio + 1e-6,
        "size": np.linspace(0, 1.2 * side, NUM_SIZE_BINS + 1),
        "dot_size": np.linspace(0, 1.5 * settings.dot, NUM_SIZE_BINS + 1),
    }
    unit, area_unit = ("nm", "µm²") if pixel_size_nm else ("px", "1000 px²")
    metrics = make_metrics(unit, area_unit, bins)

    def measure(key):
        rows = measure_set(sets[key], threshold, bins, pixel_size_nm, settings)
        side_seed = [
            seed,
            key == "held_out",
        ]  # the reference is drawn alike for every set, and not as they are
        own = groups.get(key)
        return {
            name: resample_means(values, None if own is None else own[: len(values)], side_seed)
            for name, values in rows.items()
        }

    num_at_once = max(1, min(os.cpu_count() or 1, MAX_PIXELS_AT_ONCE // reference.size))
    with ThreadPoolExecutor(num_at_once) as pool:
        bar = tqdm(
            pool.map(measure, sets), "electron microscopy", total=len(sets), unit="set", leave=False
        )
        means = dict(zip(sets, bar, strict=True))
    distances = {
        key: {name: compare_means(metric.function, mean[name], means["held_out"][name]) for name, metric in metrics.items()}
        for key, mean in means.items() if key != "held_out"
    }  # fmt: skip
    section = {
        "pixel_size_nm": pixel_size_nm,
        "unit": unit,
        "area_unit": area_unit,
        "num_images": {key: len(levels) for key, levels in sets.items()},
        "num_images_searched": min(count_searched(levels) for levels in sets.values()),
        "dark_threshold": threshold,
        "metrics": {
            name: {"name": m.name, "unit": m.unit, "definition": m.definition, "source": m.source}
            for name, m in metrics.items()
        },
        "distances": {
            key: {name: _to_json(distance.interval(lowest=0.0)) for name, distance in row.items()}
            for key, row in distances.items()
        },
        "levels": {key: _describe_levels(mean) for key, mean in means.items()},
        "comparisons": _compare(distances, models, floors),
        "curves": _make_curves(means, metrics, pixel_size_nm, bins, reference.shape[1:]),
        "calibration": calibrate_detector(
            min(reference.shape[1:]), pixel_size_nm, num_micrographs=num_calibration
        ),
    }
    section["blind_to"] = _find_blindness(section["comparisons"], metrics, floors)
    return section


def _to_json(interval):
    if not np.isfinite(interval.value):
        return None
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _describe_levels(mean):
    """Return what a set itself is, with intervals: noise, signal-to-noise, dark share, densities, mean size of loops."""

    def interval(values):
        low, high = (
            np.quantile(values[1:], [0.025, 0.975])
            if np.isfinite(values).all()
            else (np.nan, np.nan)
        )
        return (
            {"value": float(values[0]), "low": max(float(low), 0.0), "high": float(high)}
            if np.isfinite(low)
            else None
        )

    levels = {
        "noise_level": interval(mean["noise"][:, 0]),
        "signal_to_noise": interval(mean["ratio"][:, 0]),
    }
    levels["dark_share"] = interval(mean["two_point"][:, 0])
    return levels | {
        name: interval(mean[name][:, 0]) for name in ("loop_density", "dot_density", "line_density")
    }


def _compare(distances, models, floors):
    """Return the differences between models, and between each of models and floors and "real", metric by metric."""
    pairs = [(a, b) for i, a in enumerate(models) for b in models[i + 1 :]]
    if "real" in distances:
        pairs += [(key, "real") for key in (*models, *floors) if key != "real"]
    rows = []
    for first, second in pairs:
        for name in distances[first]:
            interval = (distances[first][name] - distances[second][name]).interval()
            verdict = (
                "closer" if interval.high < 0 else "farther" if interval.low > 0 else "undecided"
            )
            verdict = (
                verdict if np.isfinite(interval.value) else "undefined"
            )  # such as sizes where nothing was found
            rows.append(
                {
                    "first": first,
                    "second": second,
                    "metric": name,
                    "difference": _to_json(interval),
                    "first_is": verdict,
                }
            )
    return rows


def _find_blindness(comparisons, metrics, floors):
    """Return {floor: metrics that do not find it farther from held-out micrographs than real tiles are}."""
    kept = [floor for floor in floors if floor != "real" and not floor.startswith("reconstruction")]
    found = {
        (row["first"], row["metric"]): row["first_is"]
        for row in comparisons
        if row["second"] == "real"
    }
    blind = {
        floor: [name for name in metrics if found.get((floor, name)) in ("closer", "undecided")]
        for floor in kept
    }
    return {floor: names for floor, names in blind.items() if names}


def _make_curves(means, metrics, pixel_size_nm, bins, shape):
    """Return what the charts draw: axis and mean of every set, for the metrics that are curves."""
    frequencies, angle = frequency_bins(shape), 180 / NUM_ANGLE_BINS
    size = bins["size"][:-1] + bins["size"][1] / 2
    axes = {
        "spectrum": (frequencies / (pixel_size_nm or 1), "cycles per nm" if pixel_size_nm else "cycles per pixel"),
        "grey_levels": (np.arange(256), "grey level"),
        "two_point": (np.arange(min(shape) // 4 + 1) * (pixel_size_nm or 1), "distance, nm" if pixel_size_nm else "distance, pixels"),
        "loop_size": (size, "long axis of loops, nm" if pixel_size_nm else "long axis of loops, pixels"),
        "loop_direction": ((np.arange(NUM_ANGLE_BINS) + 0.5) * angle, "direction of loops, °"),
    }  # fmt: skip
    curves = {}
    for name, (x, label) in axes.items():
        lines = {}
        for key, mean in means.items():
            y = mean[name][0]
            total = y.sum() if name in ("loop_size", "loop_direction") else 1
            lines[key] = [float(f"{value:.5g}") for value in y / total] if total > 0 else None
        curves[name] = {"x": [float(f"{value:.5g}") for value in x], "label": label, "lines": lines}
    return curves
