"""Numbers for people: two or three significant digits, units, intervals."""

import math

MINUS = "−"
DASH = "–"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_number(value, digits: int = 3) -> str:
    """Return a number with three significant digits, at least all of its integer part."""
    if value is None:
        return DASH
    return _format(value, _count_decimals(value, digits))


def format_interval(interval: dict | None) -> str:
    """Return a value with its interval, such as "223 (191 to 265)"; all to the same digit."""
    if interval is None or interval["value"] is None:
        return DASH
    ends = [interval[key] for key in ("value", "low", "high")]
    if None in ends:
        return format_number(ends[0])
    decimals = _count_decimals(max(ends, key=abs), 3)
    value, low, high = (_format(end, decimals) for end in ends)
    return f"{value} ({low} to {high})"


def format_percent(interval: dict) -> str:
    """Return a share with its interval in percent, such as "5.3 % (1.2 to 9.8 %)"."""
    ends = (interval[key] for key in ("value", "low", "high"))
    value, low, high = (format_number(round(100 * end, 2), 2) for end in ends)
    return f"{value} % ({low} to {high} %)"


def format_share(interval: dict) -> str:
    """Return a share that may be 0, such as "at most 1.8 %" or "5.0 %, 1.2 to 9.8 %"."""
    if interval["value"] == 0:
        return f"at most {format_number(100 * interval['high'], 2)} %"
    return format_percent(interval).replace(" (", ", ").replace(")", "")


def format_duration(seconds) -> str:
    """Return seconds as a person would say them: 42 s, 3.5 min, 6 h, 2.1 days."""
    if seconds is None:
        return DASH
    for limit, unit, name in (
        (90, 1, "s"),
        (5400, 60, "min"),
        (172_800, 3600, "h"),
        (math.inf, 86_400, "days"),
    ):
        if seconds < limit:
            return f"{float(f'{seconds / unit:.3g}'):g} {name}"
    raise ValueError(f"not a duration: {seconds}")


def format_count(number) -> str:
    return DASH if number is None else f"{number:,}"


def _count_decimals(value: float, digits: int) -> int:
    if value == 0:
        return digits - 1
    return max(0, digits - 1 - int(f"{value:.{digits - 1}e}".split("e")[1]))


def _format(value: float, decimals: int) -> str:
    if decimals > 6 and value:
        mantissa, exponent = f"{value:.2e}".split("e")
        power = str(int(exponent)).translate(SUPERSCRIPTS)
        return f"{mantissa} × 10{power}".replace("-", MINUS)
    text = f"{value:,.{min(decimals, 2) if not value else decimals}f}".replace("-", MINUS)
    return text.removeprefix(MINUS) if not any(c in "123456789" for c in text) else text
