"""The report: one self-contained page and the JSON that all of its numbers come from."""

import json
from pathlib import Path

from em_data.figures import make_figure
from em_data.files import write_atomically
from em_data.views import SYMMETRIES
from em_evaluation import wording
from em_evaluation.charts import draw_curves, draw_distances, draw_overview
from em_evaluation.class_report import view_classes
from em_evaluation.detector.adherence_measure import list_colours
from em_evaluation.feature_metrics import METRICS
from em_evaluation.memorisation_report import view_memorisation
from em_evaluation.microscopy_report import view_microscopy
from em_evaluation.numbers import (
    format_count,
    format_number,
)
from em_evaluation.pages import render_template
from em_evaluation.quiz import make_quiz
from em_evaluation.repeats import count_outcomes, list_units, name_group

FIRST_TABLE = ("frechet_distance", "precision", "recall")


def write_report(report: dict, pictures: list[dict], out_dir: str | Path) -> Path:
    """Write report.json, report.html and report.png into a folder.

    The JSON is strict (no NaN). The page is rendered from it, refers to nothing outside itself,
    and reads on a phone, on paper, in light and dark.

    Args:
        report, pictures: What `evaluate_models` returns.
        out_dir: The folder, made if it is missing.

    Returns:
        The page's path.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    report = json.loads(text)
    page = render_page(report, pictures)
    write_atomically(out_dir / "report.json", text + "\n")
    write_atomically(out_dir / "report.html", page)
    if pictures:
        write_atomically(out_dir / "report.png", draw_overview(report, pictures))
    return out_dir / "report.html"


def render_page(report: dict, pictures: list[dict]) -> str:
    """Render the page from the JSON's content and the grids of images."""
    pixel_size_nm = report["dataset"].get("pixel_size_nm")
    figures = {
        role: [
            make_figure(picture, pixel_size_nm) for picture in pictures if picture["role"] == role
        ]
        for role in ("real", "model", "level")
    }
    pairs = [
        make_figure(picture, pixel_size_nm, len(picture["levels"]) // 2)
        for picture in pictures
        if picture["role"] == "pairs"
    ]
    measured = report["measurements"][0]["metrics"]
    return render_template(
        "report.html.j2",
        report=report,
        names=wording.name_sets(report),
        wording=wording,
        figures=figures,
        quiz=make_quiz(pictures, report["protocol"]["seed"]),
        units=view_units(report),
        for_detector=view_for_detector(report),
        name_group=name_group,
        count_outcomes=count_outcomes,
        metrics=METRICS,
        first_metrics=[name for name in FIRST_TABLE if name in measured],
        notes=wording.list_notes(report),
        warnings=wording.warn(report),
        conclusions=wording.conclude(report),
        distances_svg=draw_distances(report),
        microscopy=view_microscopy(report),
        classes=view_classes(report, pictures),
        memorisation=view_memorisation(report),
        adherence=view_adherence(report, pictures),
        closest_pairs=pairs,
        curves=[
            {"model": model["name"], "stage": stage, "charts": draw_curves(lines)}
            for model in report["models"]
            for stage, lines in model["curves"].items()
            if lines
        ],
        data_rows=list_data(report["dataset"]),
    )


def view_adherence(report: dict, pictures: list[dict]) -> dict | None:
    """Return what the page shows of adherence; None if no set of the report has labels."""
    if report.get("adherence") is None:
        return None
    figures = [picture["figure"] for picture in pictures if picture["role"] == "adherence"]
    return {"section": report["adherence"], "figures": figures, "colours": list_colours()}


def view_units(report: dict) -> list[dict]:
    """Return the rows of the first table: each group of trainings, or None, with its models."""
    models = {model["name"]: model for model in report["models"]}
    groups = {group["name"]: group for group in report["repeats"]}
    return [
        {
            "group": groups[name] if len(members) > 1 else None,
            "models": [models[member] for member in members],
        }
        for name, members in list_units(report["repeats"], list(models)).items()
    ]


def view_for_detector(report: dict) -> list[tuple[str, str]]:
    """Return what the verdicts mean for a detector: (names, text).

    Trainings that differ in the seed alone share a text if their verdicts have the same outcomes,
    and so do all models with the same text.
    """
    names_of: dict[str, list[str]] = {}
    for unit in view_units(report):
        alike: dict[tuple, list[str]] = {}
        for name in (model["name"] for model in unit["models"]):
            outcomes = tuple(each["outcome"] for each in wording.find_verdicts(report, name))
            alike.setdefault(outcomes, []).append(name)
        for names in alike.values():
            text = wording.say_for_detector(report, *names)
            is_group = unit["group"] and len(alike) == 1
            names_of.setdefault(text, []).extend([name_group(unit["group"])] if is_group else names)
    return [(wording.join_words(names), text) for text, names in names_of.items()]


DATA_LABELS = {
    "name": "set",
    "num_micrographs": "micrographs",
    "num_held_out_micrographs": "held-out micrographs",
    "held_out": "names of held-out micrographs",
    "num_tiles": "tiles",
    "num_train_tiles": "training tiles",
    "num_held_out_tiles": "held-out tiles",
    "num_train_views": "training views (tiles turned and flipped)",
    "num_held_out_views": "held-out views",
    "symmetries": "each tile is shown",
    "split": "split by",
    "resolution": "side of a tile, pixels",
    "downsample": "micrographs reduced by a factor of",
    "bits": "bits per pixel",
    "intensity": "scaling of grey levels",
    "fraction_clipped": "share of clipped pixels",
    "pixel_size_nm": "pixel size, nm",
    "specimens": "specimens",
    "split_hash": "hash of the split",
    "fingerprint": "hash of the tiles",
    "ignored": "files left out",
    "notices": "remarks",
}


def list_data(dataset: dict) -> list[tuple[str, str]]:
    """Return the rows of the table on the data: label and text."""
    rows = []
    for key, value in dataset.items():
        if value is None or value == [] or key not in DATA_LABELS:
            continue
        if key == "symmetries":
            number = len(SYMMETRIES.get(value, ()))
            value = "as recorded" if number == 1 else f"under {number} symmetries of the square"
        if isinstance(value, list):
            value = ", ".join(str(each) for each in value)
        elif isinstance(value, int):
            value = format_count(value)
        elif isinstance(value, float):
            value = format_number(value)
        rows.append((DATA_LABELS[key], value))
    return rows
