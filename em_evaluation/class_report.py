"""The report's section on classes: tables, sentences and charts against the guidance scale."""

import numpy as np

from em_data.figures import make_figure
from em_evaluation.charts import colour_of, draw_panel
from em_evaluation.numbers import format_interval, format_number, format_percent
from em_evaluation.wording import join_words

GOAL = 0.9  # of the probe's accuracy on held-out images
MEASURES = {"accuracy": "Taken for their class", "recall": "Recall (variety)"}


def view_classes(report: dict, pictures: list[dict]) -> dict | None:
    """Return what the page shows of the section; None if the report has none."""
    section = report.get("classes")
    if section is None:
        return None
    pixel_size_nm = report["dataset"].get("pixel_size_nm")
    shown = [picture for picture in pictures if picture["role"] == "class"]
    names = dict.fromkeys(picture["title"] for picture in shown)
    return {
        "section": section,
        "models": list(section["models"]),
        "chance": 1 / len(section["names"]),
        "sentences": conclude_classes(section, list(section["models"])),
        "figures": {
            name: [
                make_figure(each | name_set(each["key"]), pixel_size_nm)
                for each in shown
                if each["title"] == name
            ]
            for name in names
        },
        "charts": draw_guidance(section),
    }


def name_set(key: str) -> dict:
    """Return title and caption of a set's grid below the name of its class."""
    if key == "held_out":
        return {"title": "Real", "caption": "held out"}
    return {"title": key, "caption": "generated"}


def conclude_classes(section: dict, models: list[str]) -> list[str]:
    """Return in sentences what the section says about some of its models."""
    held_out = section["held_out"]["accuracy"]
    sentences = [
        f"A probe trained on {section['num_train_images']:,} real tiles takes "
        f"{format_percent(held_out)} of held-out real images for their class; chance is "
        f"{format_number(100 / len(section['names']), 2)} %."
    ]
    for name in models:
        model = section["models"][name]
        share = model["share_of_held_out"]
        sentences.append(
            f"It takes {format_percent(model['accuracy'])} of the images of {name} for the class "
            f"that was asked for: {format_number(share['value'], 2)} "
            f"({format_number(share['low'], 2)} to {format_number(share['high'], 2)}) of the value "
            f"for real ones, {'at' if share['value'] >= GOAL else 'below'} the {GOAL} to aim at."
        )
        ignored = [
            each
            for each, row in section["rows"].items()
            if row[name]["value"] >= row["others"]["value"]
        ]
        if ignored:
            sentences.append(
                f"Images of {name} are no nearer to held-out images of {join_words(ignored)} than "
                "real images of other classes are."
            )
        sentences += conclude_guidance(name, model["guidance"])
    return sentences


def conclude_guidance(name: str, rows: list[dict]) -> list[str]:
    """Return recall and accuracy at the smallest and the largest guidance scale."""
    if len(rows) < 2:
        return []
    at_ends = [
        f"recall is {format_interval(row['recall'])} at guidance {row['scale']:g}, where "
        f"{format_percent(row['accuracy'])} are taken for their class"
        for row in (rows[0], rows[-1])
    ]
    return [f"For {name}, {at_ends[0]}; {at_ends[1]}."]


def draw_guidance(section: dict) -> list[str]:
    """Draw accuracy and recall of all models against the guidance scale, one chart each."""
    swept = {name: model["guidance"] for name, model in section["models"].items()}
    swept = {name: rows for name, rows in swept.items() if len(rows) > 1}
    charts = []
    for measure, title in MEASURES.items():
        lines, bands = [], []
        for number, (name, rows) in enumerate(swept.items(), 1):
            x = np.array([row["scale"] for row in rows])
            y = np.array([row[measure]["value"] for row in rows])
            colour = colour_of(number)
            lines.append((name, x, y, {"color": colour, "marker": "o", "markersize": 4}))
            bands += [
                ([row["scale"]] * 2, [row[measure]["low"], row[measure]["high"]], colour)
                for row in rows
            ]
        if not lines:
            continue
        if measure == "accuracy":
            x, value = lines[0][1], section["held_out"]["accuracy"]["value"]
            real = np.full(2, value)
            ends = np.array([x.min(), x.max()])
            lines.append(("held-out real", ends, real, {"color": colour_of(0), "linestyle": ":"}))
        charts.append(
            draw_panel(
                lines, title=title, x_label="guidance scale", y_label="share of images",
                label=f"{title} against the guidance scale", from_zero=True, bands=bands,
            )
        )  # fmt: skip
    return charts


def keep_classes(section: dict | None, name: str) -> dict | None:
    """Return the section with one model and the reference levels only."""
    if section is None or name not in section["models"]:
        return None
    kept = {"real", "others", "texture", name}
    rows = {
        each: {key: value for key, value in row.items() if key in kept}
        for each, row in section["rows"].items()
    }
    return section | {"rows": rows, "models": {name: section["models"][name]}}
