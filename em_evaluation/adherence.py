"""Do images show what their labels say? A segmenter that was trained on real images checks.

The command: python -m em_evaluation.adherence FOLDER --data DATA
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from em_data.config import DataConfig
from em_data.files import write_atomically
from em_data.module_command import run_module
from em_evaluation.detector.adherence_measure import (
    choose_worst,
    describe_set,
    describe_sets,
    draw_adherence,
    list_colours,
    search_images,
)
from em_evaluation.detector.arms import ALL, Arm, Task
from em_evaluation.detector.gain_trainings import (
    TrainingSettings,
    read_materials,
    read_pairs,
    train_task,
)
from em_evaluation.detector.keep_images import keep_images
from em_evaluation.detector.labelled_tiles import compare_kinds
from em_evaluation.detector.segmenter import SegmenterConfig
from em_evaluation.interval import to_json
from em_evaluation.pages import render_template


@dataclasses.dataclass(frozen=True)
class AdherenceConfig:
    """Check whether labelled generated images show what their labels say.

    A small segmenter is trained on labelled real micrographs. It searches the generated images:
    recall is the share of labelled defects that it finds, precision the share of found defects that
    are labelled. The same numbers on held-out real micrographs show how good the segmenter is.
    """

    images: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Labelled images, as generate.py --pairs writes them."""
    data: str = "synthetic-other"
    """Labelled micrographs to train the segmenter on; the held-out side is searched, too."""
    out: str = "runs/adherence"
    """Folder for adherence.json and adherence.html."""
    keep_adherent: float | None = None
    """Share of the images to keep, such as 0.8: the worst ones are dropped. The rest is copied with
    its labels to --keep-in."""
    keep_in: str | None = None
    """New folder for the kept images. Default: FOLDER-adherent."""
    kinds: tuple[str, ...] = ()
    """Kinds to find: KIND, or NEW=KIND+KIND for kinds that count as one, also where micrographs and
    images name them otherwise. Default: all kinds of the micrographs, each by itself."""
    seed: int = 0
    """Of the segmenter and the intervals."""
    segmenter: SegmenterConfig = dataclasses.field(
        default_factory=lambda: SegmenterConfig(num_steps=1200)
    )
    tiles: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(resolution=128, split="specimen", held_out_fraction=0.3)
    )

    def __post_init__(self):
        if self.keep_adherent is not None and not 0 < self.keep_adherent <= 1:
            raise ValueError(
                f"--keep-adherent is {self.keep_adherent}, but must be above 0 and at most 1."
            )


def measure_adherence(config: AdherenceConfig, say=print) -> dict:
    """Train the segmenter, search real and generated images, and write the page.

    With `keep_adherent`, also copy the images that follow their labels best.

    Returns:
        What adherence.json holds: "sets" (the real test images, then the generated ones), and
        "kept" and "dropped" if images were dropped.

    Raises:
        ValueError: There are no labelled micrographs or images, or none of a kind.
    """
    settings = TrainingSettings(config.data, config.tiles, config.kinds, config.segmenter, 1.0)
    materials = read_materials(settings, log=say)
    images, tiles = read_pairs(config.images, settings, materials.kind_map)
    generated = {"the generated images": tiles.kinds}
    for line in compare_kinds(materials.kind_map, materials.real_kinds, generated):
        say(line)
    segmenter = train_task(
        Task(Arm(ALL), len(materials.micrographs), 0, config.seed), None, materials
    )
    rows, figures = [], []
    for name, each in (("real held-out micrographs", materials.test), ("generated images", images)):
        comparisons, scores = search_images(segmenter, each)
        rows.append(describe_set(name, scores, config.seed))
        caption = "The first images, and below them what the segmenter finds"
        figures.append(draw_adherence(each, comparisons, name, caption))
    result: dict = {"sets": rows}
    if config.keep_adherent is not None:
        dropped = choose_worst(
            scores.quality, [each.micrograph for each in images], config.keep_adherent
        )
        target = Path(config.keep_in or f"{config.images.rstrip('/')}-adherent")
        num_kept = keep_images(Path(config.images), target, dropped)
        result |= {"kept": num_kept, "dropped": len(dropped), "folder": str(target)}
    result, out = to_json(result), Path(config.out)
    write_atomically(out / "adherence.json", json.dumps(result, indent=1) + "\n")
    write_atomically(out / "adherence.html", render_adherence(result, figures))
    for line in describe_sets(rows):
        say(line)
    if "kept" in result:
        say(f"{result['dropped']} images dropped, {result['kept']} kept in {result['folder']}")
    say(f"\n{out / 'adherence.html'}")
    return result


def render_adherence(result: dict, figures: list[dict]) -> str:
    """Return the page as HTML that refers to nothing outside itself."""
    return render_template(
        "adherence_page.html.j2", rows=result["sets"], figures=figures, colours=list_colours()
    )


def main():
    """Read the command line and measure."""
    flags = (tyro.conf.PositionalRequiredArgs,)
    measure_adherence(
        tyro.cli(AdherenceConfig, prog="python -m em_evaluation.adherence", config=flags)
    )


if __name__ == "__main__":
    run_module(main)
