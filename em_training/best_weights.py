"""The weights that came nearest to held-out images while a model trained, on disk."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from em_data.files import flush_folder, flush_to_disk, write_atomically


class BestWeights:
    """Measures averaged weights now and then, and keeps the best ones as `run.dir`/best/`name`.

    They are on disk alone: a run that was killed replays the steps since its checkpoint, comes to
    the same distances, and finds the same best weights there already.

    Args:
        distance: Has num_images and measure(generate) -> float.
        run: The stage's `TrainingRun`.
        facts: How the distance is measured, for the record; records with other facts are not
            compared with.
    """

    def __init__(self, distance: Any, run: Any, name: str, **facts: Any):
        self.distance, self.run, self.name, self.facts = distance, run, name, facts
        record = read_best(run.dir) if run.accelerator.is_main_process else None
        is_comparable = record is not None and all(
            record.get(key) == value for key, value in facts.items()
        )
        self.record = record if is_comparable else None

    def update(self, model: Any, generate: Callable, num_images_seen: int) -> float:
        """Return the distance of `generate`'s images, and keep `model` if it is the smallest.

        All processes call it.
        """
        value = self.distance.measure(generate)
        if self.run.accelerator.is_main_process and (
            self.record is None or value < self.record["frechet_distance"]
        ):
            self.record = {
                "num_images_seen": num_images_seen,
                "frechet_distance": value,
                "num_images": self.distance.num_images,
                **self.facts,
            }
            save_best(model, self.run.dir, self.record, self.name)
        return value


def save_best(model: Any, folder: str | Path, record: dict, name: str) -> None:
    """Keep `model` as `folder`/best/`name` with `record` as best.json, in place of what was there.

    After a kill or a power cut, `read_best` finds the old weights or the new ones.
    """
    folder = Path(folder)
    new, old, best = folder / ".best-new", folder / ".best-old", folder / "best"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(new / name)
    flush_folder(new)
    # written last: with it, the folder is complete
    write_atomically(new / "best.json", json.dumps(record, indent=2) + "\n")
    if best.exists():
        os.replace(best, old)
    os.replace(new, best)
    flush_to_disk(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_best(folder: str | Path) -> dict | None:
    """Return the record of the weights in `folder`/best, or None; complete what a kill left."""
    folder = Path(folder)
    best = folder / "best"
    for name in (".best-new", ".best-old"):
        if not best.exists() and _read_record(folder / name) is not None:
            os.replace(folder / name, best)
    return _read_record(best)


def _read_record(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "best.json").read_text())
    except (OSError, ValueError):  # absent, or cut short by a kill
        return None
