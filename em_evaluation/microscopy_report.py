"""The report's section "Electron microscopy": sentences and charts from the numbers of `compare_microscopy`."""

from em_evaluation.charts import ACCENTS, INK, _new_figure, _style, _to_svg

DASHES = ("-", "--", ":", "-.")
MERGED = {"loop_size": 4, "loop_direction": 3}  # bins that a chart shows as one
TITLES = {
    "spectrum": "Power spectrum, dB",
    "grey_levels": "Grey levels, share of pixels",
    "two_point": "Two-point correlation S2 of the dark phase",
    "loop_size": "Size of loops, share",
    "loop_direction": "Direction of loops, share",
}


def view_microscopy(report) -> dict | None:
    """Return what the page's section shows of a report, None where it has none."""
    section = report.get("microscopy")
    if section is None:
        return None
    floors = {key: floor["name"] for key, floor in report["floors"].items()}
    models = [model["name"] for model in report["models"]]
    names = {"held_out": "held-out micrographs", **{name: name for name in models}, **floors}
    keys = [*models, *floors]
    drawn = ["held_out", *models, *(key for key in ("surrogates",) if key in floors)]
    return {
        "section": section,
        "names": names,
        "shown": keys,
        "all_keys": ["held_out", *keys],
        "sentences": conclude_microscopy(section, {"models": models, "floors": floors}),
        "svg": draw_microscopy(section, names, drawn),
        "rows": tabulate_microscopy(section, keys),
        "levels": tabulate_levels(section),
    }


def conclude_microscopy(section, names) -> list[str]:
    """Return what the numbers allow to say, in plain sentences. names: key -> name of the set in the report."""
    metrics, sentences = section["metrics"], []
    by_pair = {}
    for row in section["comparisons"]:
        by_pair.setdefault((row["first"], row["second"]), {}).setdefault(
            row["first_is"], []
        ).append(metrics[row["metric"]]["name"])
    models = [first for first, second in by_pair if second == "real" and first in names["models"]]
    for model in models:
        farther = by_pair[model, "real"].get("farther", [])
        undefined = by_pair[model, "real"].get("undefined", [])
        rest = [m["name"] for m in metrics.values() if m["name"] not in (*farther, *undefined)]
        if farther:
            sentences.append(
                f"{model} differs from held-out micrographs by more than real training tiles do, beyond chance, in: "
                f"{', '.join(farther)}; "
                + (
                    f"not shown for: {', '.join(rest)}."
                    if rest
                    else "that is all that was measured."
                )
                + (f" It has too few defects for: {', '.join(undefined)}." if undefined else "")
            )
        else:
            sentences.append(
                f"By none of these measures is {model} farther from held-out micrographs than real tiles, beyond chance."
            )
    for (first, second), verdicts in by_pair.items():
        if first in names["models"] and second in names["models"]:
            parts = [
                f"{what} in {', '.join(verdicts[key])}"
                for key, what in (
                    ("closer", f"{first} is closer than {second}"),
                    ("farther", f"{second} is closer than {first}"),
                )
                if key in verdicts
            ]
            if "undecided" in verdicts:
                parts.append(f"undecided are {', '.join(verdicts['undecided'])}")
            sentences.append(_capitalise("; ".join(parts)) + ".")
    for floor, blind in section["blind_to"].items():
        measures = ", ".join(metrics[name]["name"] for name in blind)
        sentences.append(
            f"Blind to {names['floors'].get(floor, floor)} are: {measures}. They do not find these farther than real tiles, "
            "so that a good value of theirs alone shows nothing."
        )
    return sentences + [_say_detector(section)]


def _say_detector(section):
    calibration = section["calibration"]
    parts = [
        f"{kind}s {100 * row['precision']['value']:.0f} % and {100 * row['recall']['value']:.0f} %"
        for kind, row in calibration["kinds"].items()
        if row["precision"] and row["recall"]
    ]
    where = (
        f"{calibration['micrographs']} embedded micrographs of {calibration['pixel_size_nm']:g} nm per pixel, "
        f"cut to {calibration['resolution']} pixels"
    )
    sentence = f"On {where}, where the truth is known, the detector has precision and recall of {'; '.join(parts)}"
    if not calibration["as_in_the_data"]:
        sentence += (
            "; the pixel size of these data is unknown or out of the range that could be tried, so that this holds for "
            "them by analogy only"
        )
    return (
        sentence
        + ". Its counts compare sets that look alike; they are not true numbers of defects."
    )


def _capitalise(text):
    return text[:1].upper() + text[1:]


def name_metric(metric):
    """Return a metric's name with its unit."""
    return f"{metric['name']}, {metric['unit']}" if metric["unit"] else metric["name"]


def draw_microscopy(section, names, keys) -> str:
    """Draw the mean spectrum, histogram, correlation, sizes and directions of the sets `keys`, one panel each, as SVG."""
    from matplotlib.ticker import LogLocator, NullFormatter

    curves = section["curves"]
    with _style():
        figure, panels = _new_figure(7.6, 7.6, 3, 2)
        for axes, (name, title) in zip(panels.flat, TITLES.items()):
            for i, key in enumerate(keys):
                if curves[name]["lines"].get(key) is None:
                    continue
                x, y = _merge_bins(
                    curves[name]["x"], curves[name]["lines"][key], MERGED.get(name, 1)
                )
                style = {"drawstyle": "steps-mid"} if name in MERGED else {}
                colour = INK if key == "held_out" else ACCENTS[(i - 1) % len(ACCENTS)]
                line = {"color": colour, "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.4}
                axes.plot(x, y, label=names.get(key, key), **line, **style)
            axes.set_title(title, loc="left")
            axes.set_xlabel(curves[name]["label"])
            axes.grid(alpha=0.2)
            if name == "spectrum":
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
        handles, labels = panels.flat[0].get_legend_handles_labels()
        panels.flat[-1].set_axis_off()
        panels.flat[-1].legend(handles, labels, loc="center left", frameon=False)
        return _to_svg(figure, "mean curves of held-out micrographs, models and floors")


def _merge_bins(x, y, factor):
    """Return a histogram's bins `factor` at a time: the distances use the fine ones, the eye the coarse."""
    return [sum(x[i : i + factor]) / factor for i in range(0, len(x), factor)], [
        sum(y[i : i + factor]) for i in range(0, len(y), factor)
    ]


def tabulate_microscopy(section, keys):
    """Return rows for the page's table: each metric with its distance for each set of `keys`, and what a level is."""
    return [
        {
            "name": name_metric(metric),
            "definition": f"{metric['definition']} ({metric['source']})",
            "cells": [section["distances"][key][name] for key in keys],
        }
        for name, metric in section["metrics"].items()
    ]


def tabulate_levels(section):
    """Return rows for the page's table of what each set itself holds."""
    area = section["area_unit"]
    labels = {
        "noise_level": "noise, grey levels",
        "signal_to_noise": "signal-to-noise",
        "dark_share": "share of the dark phase",
        "loop_density": f"loops / {area}",
        "dot_density": f"dots / {area}",
        "line_density": section["metrics"]["line_density"]["unit"] + " of lines",
    }
    return [{"name": label, "key": key} for key, label in labels.items()]
