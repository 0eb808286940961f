"""A number with its 95 % interval, and values of any kind as plain JSON types."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch


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


def to_json(value):
    """Return `value` in plain JSON types.

    Dataclasses become dicts, numpy and torch scalars numbers, NaN and infinity None.
    """
    if isinstance(value, Interval):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return {each.name: to_json(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set) or np.ndim(value) > 0:
        return [to_json(item) for item in value]
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
