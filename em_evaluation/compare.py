"""Compare the reports of several evaluations, if they were measured by one protocol."""

import json
import statistics
from pathlib import Path

from em_evaluation.evaluator import FORMAT
from em_evaluation.feature_metrics import METRICS
from em_evaluation.numbers import format_interval
from em_evaluation.repeats import DISTANCE, list_units, name_group

# (where in the report, what it means to the reader)
PROTOCOL = (
    (("protocol", "num_images"), "number of images"),
    (("protocol", "resolution"), "resolution"),
    (("protocol", "grey_levels"), "grey levels"),
    (("dataset", "split_hash"), "split of the micrographs"),
    (("dataset", "fingerprint"), "cut of the tiles"),
    (("protocol", "seed"), "seed, which draws the reference"),
    (("protocol", "reference_digest"), "content of the reference images"),
    (("protocol", "train_digest"), "content of the training images"),
)


def compare_reports(paths) -> str:
    """Return a table of the models of several reports, with the order of the Frechet distances.

    Args:
        paths: Two or more report.json, or folders that hold one.

    Raises:
        ValueError: Fewer than two reports, files that are no reports of this version, or reports
            of unequal protocols; the message has every difference.
    """
    if len(paths) < 2:
        raise ValueError(
            "--compare needs at least two reports: --compare A/report.json B/report.json"
        )
    reports = {str(path): read_report(path) for path in paths}
    (first_path, first), *others = reports.items()
    for path, report in others:
        reasons = find_differences(first, report)
        if reasons:
            raise ValueError(
                f"{first_path} and {path} cannot be compared, they were measured differently:\n  "
                + "\n  ".join(reasons)
                + "\nEvaluate both again with the same flags and data, best in one call."
            )
    return "\n".join(_tabulate(reports, i) for i in range(len(first["measurements"])))


def read_report(path) -> dict:
    """Read a report.json, or that of a folder.

    Raises:
        ValueError: It is no report of evaluate.py, or one of another version.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text())
        number, _ = report.get("format"), report["models"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a report.json of evaluate.py ({error}).") from error
    if number != FORMAT:
        raise ValueError(
            f"{path} has format {number}, but this version reads format {FORMAT}. "
            "Run evaluate.py again with the same flags."
        )
    return report


def find_differences(first, second) -> list[str]:
    """Return in what the protocols of two reports differ, one phrase each."""
    reasons = []
    for (part, key), meaning in PROTOCOL:
        a, b = first[part].get(key), second[part].get(key)
        if a != b:
            reasons.append(f"{meaning}: {a} and {b}")
    extractors = [
        [each["identity"] for each in report["measurements"]] for report in (first, second)
    ]
    if extractors[0] != extractors[1]:
        reasons.append(f"features: {'; '.join(extractors[0])} and {'; '.join(extractors[1])}")
    return reasons


def _tabulate(reports, index):
    measurements = [report["measurements"][index] for report in reports.values()]
    metrics = [
        name
        for name in measurements[0]["metrics"]
        if all(name in each["metrics"] for each in measurements)
    ]
    rows = [
        (f"{name} ({path})", each["rows"][name]["held_out"])
        for (path, report), each in zip(reports.items(), measurements)
        for name in (model["name"] for model in report["models"])
    ]
    rows += [
        (f"{name_group(group)}, median and range ({path})", found["held_out"])
        for path, report in reports.items()
        for group in report.get("repeats", [])
        for found in (group["measurements"][index],)
    ]
    rows.sort(key=lambda row: row[1][DISTANCE]["value"])
    lines = [
        f"\n{measurements[0]['extractor']} features, "
        f"{next(iter(reports.values()))['protocol']['num_images']:,} images of each set, "
        "95 % intervals"
    ]
    width = max(len(name) for name, _ in rows)
    for metric in metrics:
        better = "higher" if METRICS[metric].higher_is_better else "lower"
        lines.append(f"{METRICS[metric].label} ({better} is better)")
        lines += [f"  {name:{width}}  {format_interval(row.get(metric))}" for name, row in rows]
    units = [
        unit
        for (path, report), each in zip(reports.items(), measurements)
        for unit in _find_ranges(path, report, each["rows"])
    ]
    units.sort(key=lambda unit: unit[1])
    if len(units) < 2:
        return "\n".join(lines)
    (best, _, _, high), (second, _, low, _) = units[:2]
    if high < low:
        lines.append(
            f"{best} is closer to the reference than {second}: the intervals do not overlap."
        )
    else:
        lines.append(
            f"{best} and {second} cannot be told apart: the intervals overlap. Evaluate them in "
            "one call of evaluate.py for a sharper comparison: their common reference cancels."
        )
    return "\n".join(lines)


def _find_ranges(path: str, report: dict, rows: dict):
    """Yield (name, distance, low, high) of models, and of groups over the intervals of all."""
    models = [model["name"] for model in report["models"]]
    for name, members in list_units(report.get("repeats", []), models).items():
        found = [rows[member]["held_out"][DISTANCE] for member in members]
        trainings = f", all {len(members)} trainings" if len(members) > 1 else ""
        yield (
            f"{name}{trainings} ({path})",
            statistics.median(each["value"] for each in found),
            min(each["low"] for each in found),
            max(each["high"] for each in found),
        )
