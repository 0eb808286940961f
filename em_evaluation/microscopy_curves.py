"""The microscopy metrics that are curves, and what the report's charts show of them."""

from dataclasses import asdict, dataclass

import numpy as np

from em_evaluation.micrograph_statistics import frequency_bins

LEAST_LOOPS = 10  # for a histogram of one set
NUM_ANGLE_BINS = 36


@dataclass(frozen=True)
class Curve:
    """How a metric that is a curve is drawn.

    x: the axis. merge: bins that a chart shows as one, of a histogram. counted: the row with the
    number of defects in a histogram, which needs `LEAST_LOOPS`. log: a logarithmic axis.
    """

    x: np.ndarray
    x_label: str
    y_label: str
    merge: int = 1
    counted: str = ""
    log: bool = False


def list_curves(pixel_size_nm, bins, shape) -> dict[str, Curve]:
    """Return the curve of each metric that is one."""
    size = bins["size"][:-1] + bins["size"][1] / 2
    scale = pixel_size_nm or 1
    unit, pixel = ("nm", "nm") if pixel_size_nm else ("pixels", "pixel")
    angles = (np.arange(NUM_ANGLE_BINS) + 0.5) * 180 / NUM_ANGLE_BINS
    share, directed = "share of loops", "loops_with_direction"
    return {
        "spectrum": Curve(frequency_bins(shape) / scale, f"cycles per {pixel}", "dB", log=True),
        "grey_levels": Curve(np.arange(256), "grey level", "share of pixels"),
        "two_point": Curve(
            np.arange(min(shape) // 4 + 1) * scale, f"distance, {unit}", "S2, both pixels dark"
        ),
        "loop_size": Curve(size, f"long axis of loops, {unit}", share, 4, "loops"),
        "loop_direction": Curve(angles, "direction of loops, °", share, 3, directed),
    }


def draw_curves(curves: dict[str, Curve], metrics, means, num_searched) -> dict[str, dict]:
    """Return what the charts show: the mean of every set in each curve.

    few: set -> number of defects, for sets that have too few for a histogram.
    """
    drawn = {}
    for name, curve in curves.items():
        lines, few = {}, {}
        for key, mean in means.items():
            y = mean[name][0]
            if curve.counted:
                number = round(float(mean[curve.counted][0, 0]) * num_searched[key])
                if number < LEAST_LOOPS:
                    few[key] = number
                    continue
                y = y / y.sum()
            lines[key] = shorten(y)
        drawn[name] = asdict(curve) | {
            "title": metrics[name].label.capitalize(),
            "x": shorten(curve.x),
            "lines": lines,
            "few": few,
        }
    return drawn


def shorten(values) -> list[float]:
    """Return numbers with five significant digits."""
    return [float(f"{value:.5g}") for value in values]
