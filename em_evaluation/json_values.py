"""Values of any kind as plain JSON types."""

import dataclasses

import numpy as np
import torch

from em_evaluation.interval import Interval


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
