"""Reports of several runs beside each other, if they were measured by one protocol; else which part of it differs."""

import json
from pathlib import Path

from em_evaluation.conclusion import format_number
from em_evaluation.metrics import METRICS

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
    """Return a table of the models of several `report.json`, with the order of the Frechet distances and what it is worth.

    `ValueError` with every difference between the protocols where there is one (number of images, reference, extractors and their
    weights, resolution, split), for fewer than two reports, and for files that are not such reports.
    """
    if len(paths) < 2:
        raise ValueError(
            "a comparison takes at least two reports: --compare A/report.json B/report.json"
        )
    reports = {str(path): read_report(path) for path in paths}
    (first_path, first), *others = reports.items()
    for path, report in others:
        reasons = find_differences(first, report)
        if reasons:
            raise ValueError(
                f"{first_path} and {path} cannot be compared, they were measured differently:\n  "
                + "\n  ".join(reasons)
                + "\nEvaluate both again with the same flags and data, best in one call of evaluate.py."
            )
    return "\n".join(_tabulate(reports, i) for i in range(len(first["measurements"])))


def read_report(path) -> dict:
    """Return a report's JSON; `ValueError` where it is none, or one from before the protocol was written down."""
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text())
        complete = {"measurements", "protocol", "models"} <= set(
            report
        ) and "reference_digest" in report["protocol"]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a report.json of evaluate.py ({error})") from error
    if not complete:
        raise ValueError(
            f"{path} does not say all of its protocol, it is of an older version; evaluate again"
        )
    return report


def find_differences(first, second) -> list[str]:
    """Return what the protocols of two reports differ in, one sentence each; empty where they are equal."""
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
    rows.sort(key=lambda row: row[1]["frechet_distance"]["value"])
    lines = [
        f"\n{measurements[0]['extractor']} features, {next(iter(reports.values()))['protocol']['num_images']:,} images of each set"
    ]
    width = max(len(name) for name, _ in rows)
    for metric in metrics:
        lines.append(
            f"{METRICS[metric].label} ({'higher' if METRICS[metric].higher_is_better else 'lower'} is better)"
        )
        for name, row in rows:
            low, high = (format_number(row[metric][key]) for key in ("low", "high"))
            lines.append(
                f"  {name:{width}}  {format_number(row[metric]['value']):>9}  [{low}, {high}]"
            )
    if len(rows) < 2:
        return "\n".join(lines)
    (best, a), (second, b) = rows[:2]
    if a["frechet_distance"]["high"] < b["frechet_distance"]["low"]:
        lines.append(
            f"{best} is closer to the held-out micrographs than {second}: the intervals do not overlap."
        )
    else:
        lines.append(
            f"{best} and {second} cannot be told apart by these intervals, which overlap; evaluated in one call of evaluate.py, "
            "their common reference would cancel."
        )
    return "\n".join(lines)
