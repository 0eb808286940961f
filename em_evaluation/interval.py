"""A number with its 95 % interval."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def from_json(cls, content: dict | None) -> "Interval | None":
        """Return the interval of what `to_json` wrote."""
        return None if content is None else cls(content["value"], content["low"], content["high"])

    def to_json(self) -> dict | None:
        """Return {"value", "low", "high"} as plain numbers, or None if the value is undefined."""
        if not np.isfinite(self.value):
            return None
        return {key: float(getattr(self, key)) for key in ("value", "low", "high")}

    def limited(self, lowest: float = -np.inf, highest: float = np.inf) -> "Interval":
        """Return the interval with both ends inside the possible range of the value."""
        low, high = (float(np.clip(end, lowest, highest)) for end in (self.low, self.high))
        return Interval(self.value, low, high)

    def __sub__(self, other: "Interval") -> "Interval":
        """Return the difference of two independent values: half-widths add in squares."""
        return Interval(
            self.value - other.value,
            self.value - other.value - np.hypot(self.value - self.low, other.high - other.value),
            self.value - other.value + np.hypot(self.high - self.value, other.value - other.low),
        )
