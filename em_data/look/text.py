"""The words of a look at micrographs, for the terminal and for its page."""

from collections import Counter

from em_data.data import merge_notices
from em_data.look.recommendation import Advice, format_size, list_pixel_sizes
from em_data.look.survey import Survey
from em_data.series import find_series
from em_data.split import name_some


def describe_survey(survey: Survey, advice: Advice) -> list[str]:
    """Return one line of text per aspect."""
    micrographs = survey.micrographs
    facts = Counter((each["bits"], each["shape"]) for each in micrographs)
    shapes = name_some([f"{h} x {w} px ({b} bits): {n}" for (b, (h, w)), n in facts.most_common()])
    lines = [
        f"{survey.name}: {count(len(micrographs), 'micrograph')} in "
        f"{count(survey.num_files, 'file')}; {shapes}"
    ]
    lines += describe_frames(survey)
    if survey.problems:
        lines.append(f"{count(len(survey.problems), 'image')} cannot be used:")
        lines += [f"  {each}" for each in survey.problems[:10]]
        if len(survey.problems) > 10:
            lines.append(f"  and {len(survey.problems) - 10} more, listed on the page")
    lines += [f"not used: {each}" for each in survey.ignored]
    lines.append(f"pixel size: {describe_pixel_sizes(survey)}")
    lines.append(f"grey levels: {describe_levels(survey)}")
    lines += merge_notices(micrographs)
    lines += survey.found or ["labels: none found"]
    lines.append(f"copies: {describe_copies(survey)}")
    lines.append(f"structures: {describe_structures(survey, advice)}")
    return lines


def describe_advice(survey: Survey, advice: Advice) -> list[str]:
    """Return the recommended flags with their reasons, and the warnings."""
    lines = ["Recommended:"]
    for name, reason in advice.reasons:
        value = f"--tiles.{name.replace('_', '-')} {advice.flags[name]}: " if name else ""
        lines.append(f"  {value}{reason}")
    return lines + [f"  Warning: {each}" for each in advice.warnings]


def count(num: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural."""
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def describe_frames(survey: Survey) -> list[str]:
    """Return a line on stacks and a line per series of files, if there are any."""
    framed = [each["name"] for each in survey.micrographs if each["frame"] is not None]
    stacks = Counter(each.rpartition("#")[0] for each in framed)  # of one channel each
    files = {each.partition("#")[0] for each in framed}
    lines = []
    if stacks:
        most = max(stacks.values())
        frames = f"{min(stacks.values())} to {most}" if min(stacks.values()) < most else f"{most}"
        lines.append(
            f"stacks: {count(len(files), 'file')} of {frames} frames. Frames of one file are kept "
            "on one side of the split."
        )
    return lines + [f"series: {each.describe()}" for each in find_series(survey.micrographs)]


def describe_pixel_sizes(survey: Survey) -> str:
    """Return the pixel sizes and how many micrographs have each."""
    sizes = list_pixel_sizes(survey.micrographs)
    if sizes[0][0] is None:
        return "unknown"
    if len(sizes) == 1:
        return f"{sizes[0][0]:.4g} nm"
    texts = [f"{size:.4g} nm ({num})" if size else f"unknown ({num})" for size, num in sizes]
    return name_some(texts, 6)


def describe_levels(survey: Survey) -> str:
    """Return the bits and the shares of pixels at the ends of the range."""
    micrographs = survey.micrographs
    bits = " and ".join(f"{bits}" for bits in sorted({each["bits"] for each in micrographs}))
    dark, bright, clipped = (
        sum(each[f"share_{key}"] for each in micrographs) / len(micrographs)
        for key in ("darkest", "brightest", "clipped")
    )
    saturated = [each["name"] for each in micrographs if each["share_brightest"] > 0.01]
    text = f"{bits} bits; {format_share(dark)} of the pixels are 0, "
    text += f"{format_share(bright)} have the largest value"
    if clipped:
        text += f"; {format_share(clipped)} are clipped"
    if saturated:
        num = count(len(saturated), "micrograph")
        text += f"; over 1 % saturated in {num} ({name_some(saturated, 3)})"
    return text


def format_share(share: float) -> str:
    """Return a share in percent."""
    if 0 < share < 1e-5:
        return "less than 0.001 %"
    return f"{100 * share:.2g} %"


def describe_copies(survey: Survey) -> str:
    """Return the micrographs that are copies of each other."""
    if not survey.copies:
        return "none found"
    groups = [" ~ ".join(names[:6]) + (" ..." if len(names) > 6 else "") for names in survey.copies]
    num = count(len(groups), "group")
    return f"{num} of exact or near copies, each kept on one side: {name_some(groups, 5)}"


def describe_structures(survey: Survey, advice: Advice) -> str:
    """Return the size of typical structures in pixels and, with one pixel size, in nm."""
    measured = f"measured on {len(survey.samples)} of {len(survey.micrographs)} micrographs"
    if advice.size_px is None:
        return f"no typical size stands out ({measured})"
    sizes = list_pixel_sizes(survey.micrographs)
    text = format_range(advice.size_px, "px")
    if len(sizes) == 1 and sizes[0][0]:
        text += f", {format_range([each * sizes[0][0] for each in advice.size_px], 'nm')}"
    num_none = sum(each.size is None for each in survey.samples)
    none = f"; none stands out in {num_none}" if num_none else ""
    return f"typically {text} across ({measured}{none})"


def format_range(values, unit: str) -> str:
    """Return a median with the least and the largest value, such as "43 px (38 to 79)"."""
    median, low, high = map(format_size, values)
    return f"{median} {unit} ({low} to {high})" if low != high else f"{median} {unit}"


def as_sentence(text: str) -> str:
    """Return a text with a capital at the start and a full stop at the end."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
