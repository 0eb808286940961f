"""The weights that came nearest to held-out images while a model trained, on disk."""

import json
import os
import shutil
from pathlib import Path


class BestWeights:
    """Measures the averaged weights now and then and keeps those that came nearest, as `run.dir`/best/`name`.

    distance: measures images, `measure(generate) -> float` over `num_images` (`em_evaluation.held_out.HeldOutDistance`). facts: what
    else the record says of how it was measured; what was measured otherwise, before a change of flags, is not compared with. What is
    kept is on disk alone: a run that was killed replays the steps since its checkpoint, comes to the same distances and to the same
    best, which lies there already.
    """

    def __init__(self, distance, run, name: str, **facts):
        self.distance, self.run, self.name, self.facts = distance, run, name, facts
        record = read_best(run.dir) if run.accelerator.is_main_process else None
        is_comparable = record is not None and all(
            record.get(key) == value for key, value in facts.items()
        )
        self.record = record if is_comparable else None

    def update(self, model, generate, num_images_seen: int) -> float:
        """Return the distance of `generate`'s images, and keep `model` when it is the smallest so far; all processes call it."""
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


def save_best(model, folder, record: dict, name: str):
    """Keep `model` as `folder`/best/`name` and `record` beside it as best.json, in place of what was there.

    A kill in between leaves the old one, the new one, or what `read_best` makes one of them.
    """
    folder = Path(folder)
    new, old, best = folder / ".best-new", folder / ".best-old", folder / "best"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(new / name)
    (new / "best.json").write_text(
        json.dumps(record, indent=2) + "\n"
    )  # last: with it, the folder is whole
    if best.exists():
        os.replace(best, old)
    os.replace(new, best)
    shutil.rmtree(old, ignore_errors=True)


def read_best(folder) -> dict | None:
    """The record of the weights kept in `folder`/best, or None; finishes what a kill left half done."""
    folder = Path(folder)
    best = folder / "best"
    for name in (".best-new", ".best-old"):
        if not best.exists() and _read_record(folder / name) is not None:
            os.replace(folder / name, best)
    return _read_record(best)


def _read_record(folder) -> dict | None:
    try:
        return json.loads((folder / "best.json").read_text())
    except (OSError, ValueError):  # absent, or cut short by a kill
        return None
