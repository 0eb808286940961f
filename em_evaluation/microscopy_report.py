"""The report's section on electron microscopy: a coloured table, sentences and charts."""

from em_evaluation.charts import colour_of, draw_panel
from em_evaluation.microscopy_curves import LEAST_LOOPS
from em_evaluation.wording import join_words, name_sets

DASHES = ("-", "--", ":", "-.")
OUTCOMES = {
    "as_real": "as real",
    "differs": "differs",
    "undecided": "cannot tell",
    "not_measured": "–",
}


def view_microscopy(report: dict) -> dict | None:
    """Return what the page shows of the section; None if the report has none."""
    section = report["microscopy"]
    if section is None:
        return None
    models = [model["name"] for model in report["models"]]
    levels = [level["key"] for level in report["levels"]]
    texture = [level["key"] for level in report["levels"] if level["kind"] == "surrogates"]
    names = name_sets(report)
    drawn = ["held_out", *models, *texture]
    return {
        "section": section,
        "names": names,
        "models": models,
        "shown": [*models, *levels],
        "outcomes": OUTCOMES,
        "real": next((e["key"] for e in report["levels"] if e["kind"] == "real"), None),
        "sentences": conclude_microscopy(section, names),
        "detector": say_detector(section),
        "charts": draw_microscopy(section, names, drawn),
        "not_drawn": say_not_drawn(section, names, drawn),
        "properties": name_properties(section),
    }


def conclude_microscopy(section: dict, names: dict[str, str]) -> list[str]:
    """Return what the numbers allow to say beyond the table.

    names: key -> title of the sets.
    """
    labels = {key: metric["label"] for key, metric in section["metrics"].items()}
    sentences, comparisons = [], section["comparisons"]
    for first, second in dict.fromkeys((row["first"], row["second"]) for row in comparisons):
        for order, near, far in (("closer", first, second), ("farther", second, first)):
            measures = [
                labels[row["metric"]]
                for row in comparisons
                if (row["first"], row["second"], row["first_is"]) == (first, second, order)
            ]
            if measures:
                sentences.append(f"{near} is closer than {far} in {join_words(measures)}.")
    for key, blind in section["blind_spots"].items():
        sentences.append(
            f"Not told apart from real images: {names.get(key, key)}, by "
            f"{join_words([labels[name] for name in blind])}. "
            "A good value of these measures alone shows nothing."
        )
    return sentences


def say_detector(section: dict) -> str:
    """Say how reliable the detector of defects is."""
    calibration = section["calibration"]
    parts = [
        f"{kind}s {100 * row['precision']['value']:.0f} % and {100 * row['recall']['value']:.0f} %"
        for kind, row in calibration["kinds"].items()
        if row["precision"] and row["recall"]
    ]
    sentence = (
        f"On {calibration['micrographs']} synthetic micrographs of "
        f"{calibration['pixel_size_nm']:g} nm per pixel with known defects, cut to "
        f"{calibration['resolution']} pixels, the detector has a precision and recall of "
        f"{'; '.join(parts)}."
    )
    if not calibration["as_in_the_data"]:
        sentence += (
            " The pixel size of these data is unknown or outside the range that can be tried, so "
            "this is only a guide."
        )
    return sentence + (
        " Its counts compare sets that look alike; they are not true numbers of defects."
    )


def name_properties(section: dict) -> dict[str, str]:
    """Return the label of each property that the page shows of every set."""
    area, metrics = section["area_unit"], section["metrics"]
    return {
        "loop_density": f"loops / {area}",
        "loop_size": f"mean long axis of loops, {section['unit']}",
        "dot_density": f"dots / {area}",
        "dot_size": f"mean long axis of dots, {section['unit']}",
        "line_density": f"length of lines, {metrics['line_density']['unit']}",
        "noise_level": "noise, grey levels",
        "signal_to_noise": "signal-to-noise ratio",
        "dark_share": "share of dark pixels",
    }


def draw_microscopy(section: dict, names: dict[str, str], keys: list[str]) -> list[str]:
    """Draw the mean curves of the sets `keys`, one SVG per metric."""
    charts = []
    for curve in section["curves"].values():
        lines, merge = [], curve["merge"]
        for i, key in enumerate(keys):
            if key not in curve["lines"]:
                continue
            x, y = merge_bins(curve["x"], curve["lines"][key], merge)
            style = {"color": colour_of(i), "linestyle": DASHES[i % len(DASHES)]}
            style |= {"drawstyle": "steps-mid"} if merge > 1 else {}
            lines.append((names.get(key, key), x, y, style))
        if lines:
            labels = {key: curve[key] for key in ("title", "x_label", "y_label")}
            label = f"{curve['title']} of each set"
            charts.append(draw_panel(lines, **labels, log_x=curve["log"], label=label))
    return charts


def say_not_drawn(section: dict, names: dict[str, str], keys: list[str]) -> list[str]:
    """Say which sets `keys` have too few loops for a line in a chart, a sentence per chart."""
    sentences = []
    for curve in section["curves"].values():
        few = [
            f"{names.get(key, key)} ({number})"
            for key, number in curve["few"].items()
            if key in keys
        ]
        if few:
            sentences.append(
                f"{curve['title']}: not drawn for sets with fewer than {LEAST_LOOPS} such loops: "
                f"{join_words(few)}."
            )
    return sentences


def merge_bins(x, y, factor):
    """Merge bins, `factor` at a time: the distances use the fine ones, the eye the coarse ones."""
    starts = range(0, len(x), factor)
    return (
        [sum(x[i : i + factor]) / factor for i in starts],
        [sum(y[i : i + factor]) for i in starts],
    )
