"""Published numbers, read from a JSON file, that a report shows beside its own."""

import json
from pathlib import Path

from em_evaluation.interval import to_json


def read_baselines(path) -> dict | None:
    """Read a file of published numbers, or return None for None.

    The file holds {"title", "metric", "note", "models": [{"name", "frechet_distance",
    "train_seconds", "sample_seconds_50000"}], "autoencoders": [{"name", "frechet_distance"}]}.
    All but `title` and one of the lists may be missing.

    Raises:
        ValueError: The file cannot be read or has another form.
    """
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text())
        rows = [*content.get("models", ()), *content.get("autoencoders", ())]
        if not rows or not all(isinstance(row["name"], str) for row in rows):
            raise ValueError("it needs a list of models or autoencoders with names")
        for row in rows:
            float(row["frechet_distance"])
        title = str(content["title"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--baselines {path} is not a file of published numbers ({error}). "
            "See experiments/2024_gan_vs_ldm/study.json for the form."
        ) from error
    defaults = {"train_seconds": None, "sample_seconds_50000": None}
    return to_json(
        {"metric": "Frechet distance", "note": "", "autoencoders": [], **content}
        | {"title": title, "models": [defaults | row for row in content.get("models", ())]}
    )
