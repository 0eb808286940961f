"""The page on the gain: curves, paired differences, label equivalents and adherence."""

from em_evaluation.charts import ACCENTS, INK, draw_panel
from em_evaluation.detector.adherence_measure import list_colours
from em_evaluation.detector.arms import ALL, ONLY, STRONG
from em_evaluation.detector.gain_statistics import METRICS
from em_evaluation.numbers import (
    DASH,
    MINUS,
)
from em_evaluation.pages import render_template

COLOURS = (*ACCENTS, "#56b4e9", "#e69f00")
PUBLISHED = (
    "Earlier work with mask-conditioned diffusion reports at most +0.02 F1 from 10,000 pairs on "
    "10, 50 and 100 labelled micrographs (arXiv:2606.02532)."
)


def render_gain(results: dict, figures: list[dict]) -> str:
    """Return the page as HTML that refers to nothing outside itself.

    Args:
        results: The content of results.json.
        figures: Pictures as of `draw_adherence`.
    """
    return render_template(
        "gain.html.j2",
        {"change": format_change},
        results=results,
        metrics=METRICS,
        sentences=conclude(results),
        published=PUBLISHED,
        curves=[
            (results["arms"][key], "currentColor" if colour == INK else colour)
            for key, colour in list_curves(results).items()
        ],
        charts=[draw_curves(results, metric) for metric in METRICS],
        say_equivalent=say_equivalent,
        judge=judge,
        adherence=results["adherence"],
        figures=figures,
        colours=list_colours(),
    )


def draw_curves(results: dict, metric: str) -> str:
    """Draw a metric against the number of labelled micrographs, a line an arm, as SVG."""
    label, unit, _ = METRICS[metric]
    lines, bands = [], []
    arms = list_curves(results)
    for i, (key, colour) in enumerate(arms.items()):
        cells = [each for each in results["cells"] if each["arm"] == key and each[metric]]
        if key == STRONG:  # all labels are its last point
            cells += [each for each in results["cells"] if each["arm"] == ALL and each[metric]]
        cells.sort(key=lambda each: each["num"])
        x = [each["num"] * 1.025 ** (i - len(arms) / 2) for each in cells]
        value, low, high = (
            [each[metric][end] for each in cells] for end in ("value", "low", "high")
        )
        style = {"color": colour, "marker": "o", "markersize": 3.5}
        lines.append(("", x, value, style))
        bands += [([at, at], [a, b], colour) for at, a, b in zip(x, low, high)]
    return draw_panel(
        lines, bands=bands, title=label, y_label=unit, x_label="labelled micrographs", log_x=True,
        label=f"{label} against the number of labelled micrographs, a line per arm",
    )  # fmt: skip


def list_curves(results: dict) -> dict[str, str]:
    """Return {key of each arm that depends on N: colour of its line}."""
    keys = [key for key in results["arms"] if key != ALL and not key.startswith(ONLY)]
    others = [key for key in keys if key != STRONG]
    colours = {key: COLOURS[i % len(COLOURS)] for i, key in enumerate(others)}
    return {key: INK if key == STRONG else colours[key] for key in keys}


def judge(metric: str, difference: dict | None) -> str:
    """Return the class of a paired difference: "as_real" (better), "differs" (worse), or ""."""
    if difference is None or difference["low"] <= 0 <= difference["high"]:
        return ""
    return "as_real" if (difference["low"] > 0) == METRICS[metric][2] else "differs"


def format_change(interval: dict | None, metric: str = "f1") -> str:
    """Return a difference with its sign, such as "+0.012 (−0.003 to 0.027)"."""
    if interval is None:
        return DASH
    decimals = 1 if METRICS[metric][1] else 3
    value, low, high = (f"{interval[key]:.{decimals}f}" for key in ("value", "low", "high"))
    sign = "+" if interval["value"] > 0 else ""
    return f"{sign}{value} ({low} to {high})".replace("-", MINUS)


def say_equivalent(row: dict) -> str:
    """Return a label equivalent, such as "12 (3 to at least 90)"."""

    def say(key):
        word = "at least " if key in row["at_least"] else ""
        word = "at most " if key in row["at_most"] else word
        return word + str(round(row[key])).replace("-", MINUS)

    return f"{say('value')} ({say('low')} to {say('high')})"


def conclude(results: dict) -> list[str]:
    """Return what the differences in F1 allow to say, a sentence per arm."""
    sentences = []
    rows = [row for row in results["differences"] if row["arm"] != "weak" and row["f1"]]
    for key in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == key]
        parts = {"as_real": [], "differs": [], "": []}
        for row in mine:
            parts[judge("f1", row["f1"])].append(f"{format_change(row['f1'])} at N = {row['num']}")
        title = capitalise(results["arms"][key])
        if parts["as_real"]:
            sentences.append(f"{title} improves F1: {'; '.join(parts['as_real'])}.")
        if parts["differs"]:
            sentences.append(f"{title} worsens F1: {'; '.join(parts['differs'])}.")
        if parts[""]:
            sentences.append(f"{title}: no significant change of F1: {'; '.join(parts[''])}.")
    return sentences


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def describe_gain(results: dict) -> list[str]:
    """Return the differences and label equivalents as lines of text."""
    equivalents = {(row["arm"], row["num"]): row for row in results["equivalents"]}
    lines = ["", f"{'compared with strong classical':40} {'N':>4}  change of F1 (95 %)"]
    for row in results["differences"]:
        worth = equivalents.get((row["arm"], row["num"]))
        lines.append(
            f"{results['arms'][row['arm']]:40} {row['num']:4}  {format_change(row['f1']):28}"
            + (f"  worth {say_equivalent(worth)} more labelled micrographs" if worth else "")
        )
    return lines + ["", *conclude(results)]
