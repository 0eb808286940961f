"""The log of a stage, stats.jsonl: one JSON object a line."""

import contextlib
import json
import math
from pathlib import Path

from em_data.files import write_atomically


def read_stats(stage_dir: str | Path) -> list[dict]:
    """Return the lines of a stage's stats.jsonl, {"num_images_seen", "train_seconds", ...}."""
    path = Path(stage_dir) / "stats.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # the last line, cut short by a kill
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def cut_stats(stage_dir: str | Path, num_images_seen: int) -> None:
    """Drop the lines after the checkpoint of this count, and a line cut short by a kill."""
    path = Path(stage_dir) / "stats.jsonl"
    if path.exists():
        kept = [
            line
            for line in read_stats(stage_dir)
            if line.get("num_images_seen", math.inf) <= num_images_seen
        ]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
