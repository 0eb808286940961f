"""A metric: what it is, its unit, and which way is better."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric of a set of images.

    label: its name for people. definition: what is measured, in one phrase. source: the paper.
    higher_is_better: the direction. least: the smallest number of images of each set.
    needs_unit_norm: whether it is defined only for features of length 1. function: two sets' mean
    rows -> distance, for metrics that are means over images.
    """

    label: str
    definition: str
    source: str = ""
    unit: str = ""
    higher_is_better: bool = False
    least: int = 2
    needs_unit_norm: bool = False
    function: Callable | None = None
