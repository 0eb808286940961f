"""Values of a yaml, each of the type it must have; `ValueError` that names the key where it is not."""

import math
import re


def resolve(value, root):
    """Replace OmegaConf's references to numbers at other places of the file, `${a.b}`."""
    if isinstance(value, dict):
        return {key: resolve(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, root) for item in value]
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if reference is None:
        return value
    place = root
    for key in reference[1].split("."):
        if not isinstance(place, dict) or key not in place:
            raise ValueError(f"{value} refers to nothing in it")
        place = place[key]
    if isinstance(place, str | dict | list):
        raise ValueError(f"{value} refers to no number")
    return place


def section(values, key):
    """The dictionary under this key."""
    value = values.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{key} is missing")
    return value


def number(values, key, default):
    """The positive number under this key."""
    value = values.get(key, default)
    try:
        result = math.nan if isinstance(value, bool) else float(value)  # yaml reads 1e-4 as a word
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result) or result <= 0:
        raise ValueError(f"{key} is {value!r}; expected a positive number")
    return result


def count(values, key, largest=2**20):
    """The positive whole number under this key."""
    value = values.get(key)
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{key} is {value!r}; expected a whole number from 1 to {largest}")
    return value


def optional_count(values, key):
    """As `count`; None for nothing and for the originals' -1."""
    return None if values.get(key) in (None, -1) else count(values, key)


def counts(values, key, default=None):
    """The list of positive whole numbers under this key; only where attention stands may it be empty."""
    items = values.get(key, default)
    if items is None:
        raise ValueError(f"{key} is missing")
    if (
        not isinstance(items, list | tuple)
        or not (items or key.startswith("att"))
        or len(items) > 16
    ):
        raise ValueError(f"{key} is {items!r}; expected a list of positive whole numbers")
    return tuple(count({key: item}, key) for item in items)


def flag(values, key, default):
    """The truth value under this key."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; expected true or false")
    return value
