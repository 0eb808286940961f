"""What generated pairs add to a detector: F1 against the number of labelled micrographs.

The command: python -m em_evaluation.detector_gain --data DATA --pairs way1=FOLDER --out OUT
"""

import dataclasses
import json
import time
from pathlib import Path

import tyro

from em_data.config import DataConfig
from em_data.files import write_atomically
from em_data.labels import write_labelled
from em_data.module_command import run_module
from em_evaluation.detector.adherence_measure import describe_set, draw_adherence, search_images
from em_evaluation.detector.arms import ALL, Arm, Task, list_tasks, name_pairs
from em_evaluation.detector.gain_page import describe_gain, render_gain
from em_evaluation.detector.gain_statistics import analyse
from em_evaluation.detector.gain_trainings import (
    Materials,
    TrainingSettings,
    read_materials,
    read_pairs,
    run_tasks,
    train_task,
)
from em_evaluation.detector.segmenter import SegmenterConfig
from em_evaluation.environment import describe_environment
from em_evaluation.interval import to_json


@dataclasses.dataclass(frozen=True)
class GainConfig:
    """Measure what generated pairs of images and labels add to a detector.

    A small segmenter is trained on N labelled micrographs with flips and turns, with strong
    classical augmentation, and with pairs added to it, and tested on held-out specimens. All
    trainings have the same number of steps. Each finished training is kept in OUT/trainings: the
    same command continues after a stop, and more splits or seeds add to what is there.
    """

    data: str = "synthetic-other"
    """Labelled micrographs, as in training. The held-out side of the split is the test set. Use the
    --tiles flags of the generator's training, so that the generator has not seen the test set."""
    pairs: tuple[str, ...] = ()
    """NAME=FOLDER of labelled generated images (generate.py --pairs), or NAME=SOURCE. Four names
    have a title on the page: raw (simulation as it is), way1, way2 and way3. {num} and {split} in
    FOLDER are the number of labelled micrographs and the split, if a generator saw them."""
    write_labelled: str | None = None
    """Only write the labelled micrographs of each number and split into such a folder, with {num}
    and {split} in it, for generators that learn from them."""
    out: str = "runs/detector_gain"
    """Folder for the trainings, results.json and gain.html."""
    nums: tuple[int, ...] = (5, 10, 25, 50, 100)
    """Numbers of labelled micrographs. Smaller sets are parts of larger ones."""
    curve: tuple[int, ...] = ()
    """More numbers for strong classical augmentation alone, to read label equivalents off."""
    splits: int = 5
    """Draws of the labelled micrographs."""
    seeds: int = 3
    """Trainings of each arm on each draw."""
    synthetic_share: float = 0.5
    """Share of pairs in a batch at the first step; it falls to 0 at the last one."""
    kinds: tuple[str, ...] = ()
    """Kinds to find: KIND, or NEW=KIND+KIND for kinds that count as one, also where micrographs and
    pairs name them otherwise. Default: all kinds of the micrographs, each by itself."""
    jobs: int = 1
    """Trainings side by side. Each has one thread and reads the data once (about 1 GB)."""
    seed: int = 0
    """Of the intervals."""
    segmenter: SegmenterConfig = dataclasses.field(default_factory=SegmenterConfig)
    tiles: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(resolution=128, split="specimen", held_out_fraction=0.3)
    )

    def __post_init__(self):
        for name, least in (("splits", 1), ("seeds", 1), ("jobs", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}, but must be at least {least}."
                )
        if not 0 < self.synthetic_share <= 1:
            raise ValueError(
                f"--synthetic-share is {self.synthetic_share}, but must be above 0 and at most 1."
            )
        if not self.nums or min(*self.nums, *self.curve, 1) < 1:
            raise ValueError("--nums and --curve must be numbers from 1, at least one in --nums.")
        parse_folders(self.pairs)


def parse_folders(words) -> dict[str, str]:
    """Return {name: folder} of NAME=FOLDER; raise a ValueError for anything else."""
    folders = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not name.isidentifier() or not folder or name in folders:
            raise ValueError(
                f"--pairs has {word!r}, but takes NAME=FOLDER with a new name, such as "
                "way1=runs/pairs/way1."
            )
        folders[name] = folder
    return folders


def measure_gain(config: GainConfig, say=print) -> Path:
    """Run the trainings that are missing, analyse all and write results.json and the page.

    With `write_labelled`, write the labelled micrographs instead.

    Returns:
        The page's path.

    Raises:
        ValueError: There are no labelled micrographs, a folder of pairs cannot be used, or neither
            has a kind.
    """
    start, out = time.perf_counter(), Path(config.out)
    settings = TrainingSettings(
        config.data, config.tiles, config.kinds, config.segmenter, config.synthetic_share
    )
    materials = read_materials(settings, log=say)
    if config.write_labelled is not None:
        return write_labelled_sets(config, materials, say)
    folders = parse_folders(config.pairs)
    tasks = choose_tasks(config, materials, folders, say)
    for line in materials.compare_kinds(tasks):
        say(line)
    done = run_tasks(tasks, materials, out / "trainings", config.jobs, say)
    cells: dict = {}
    for task, scores in done.items():
        cells.setdefault((task.arm.key, task.num), {})[task.split, task.seed] = scores
    results = {
        "protocol": describe_protocol(config, materials, folders, len(done)),
        "arms": {task.arm.key: task.arm.title for task in done},
        **analyse(cells, config.splits, config.seeds, config.seed),
    }
    results["adherence"], figures = measure_adherence(materials, folders)
    results["environment"] = describe_environment()
    results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    results = to_json(results)
    write_atomically(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_atomically(out / "gain.html", render_gain(results, figures))
    for line in describe_gain(results):
        say(line)
    say(f"\n{out / 'gain.html'}")
    return out / "gain.html"


def write_labelled_sets(config, materials: Materials, say) -> Path:
    """Write the labelled micrographs of each number and split; return the last folder.

    Raises:
        ValueError: The name of the folder has no {num} or {split}, or a folder is not empty.
    """
    for line in materials.compare_kinds():
        say(line)
    pattern = config.write_labelled
    if "{num}" not in pattern or "{split}" not in pattern:
        raise ValueError(
            f"--write-labelled is {pattern}, but must have {{num}} and {{split}} in it, such as "
            "runs/labelled/{num}/{split}."
        )
    nums = [num for num in config.nums if num <= len(materials.micrographs)]
    for num in nums:
        for split in range(config.splits):
            folder = Path(pattern.format(num=num, split=split))
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"{folder} is not empty. Delete it, or name another folder.")
            write_labelled(materials.list_micrographs(num, split), folder)
            say(f"{folder}: {num} labelled micrographs")
    return folder


def choose_tasks(config, materials: Materials, folders, say) -> list[tuple[Task, str | None]]:
    """Return the trainings with their folders of pairs; say which are left out."""
    num_pool = len(materials.micrographs)
    nums, curve = (
        [num for num in numbers if num <= num_pool] for numbers in (config.nums, config.curve)
    )
    too_many = sorted({*config.nums, *config.curve} - {*nums, *curve})
    if too_many:
        say(
            f"N = {', '.join(map(str, too_many))}: left out; there are {num_pool} labelled "
            "micrographs to train on"
        )
    depends = [name for name, folder in folders.items() if folder != folder.format(num=0, split=0)]
    alone = [name for name in folders if name not in depends]
    tasks = list_tasks(nums, num_pool, list(folders), alone, config.splits, config.seeds, curve)
    chosen, missing = [], set()
    for task in tasks:
        folder = folders.get(task.arm.pairs)
        folder = folder and folder.format(num=task.num, split=task.split)
        if task.arm.pairs in depends and not Path(folder).is_dir():
            missing.add((task.arm.title, task.num))
            continue
        chosen.append((task, folder))
    for title, num in sorted(missing):
        say(f"{title} at N = {num}: left out; not all splits have a folder")
    return [each for each in chosen if (each[0].arm.title, each[0].num) not in missing]


def measure_adherence(materials: Materials, folders) -> tuple[list[dict], list[dict]]:
    """Return how well pairs follow their labels, beside the test set, and figures of them.

    The segmenter is that of all labels. Of pairs that depend on the labels, the first folder that
    there is counts.
    """
    segmenter = train_task(Task(Arm(ALL), len(materials.micrographs), 0, 0), None, materials)
    sets = [("real micrographs of the test", materials.test)]
    for name, pattern in folders.items():
        folder = find_folder(pattern, len(materials.micrographs))
        if folder is not None:
            images, _ = read_pairs(folder, materials.settings, materials.kind_map)
            sets.append((name_pairs(name), images))
    rows, figures = [], []
    for name, images in sets:
        comparisons, scores = search_images(segmenter, images)
        rows.append(describe_set(name, scores))
        caption = "The first images, and below them what the segmenter finds"
        figures.append(draw_adherence(images, comparisons, name, caption))
    return rows, figures


def find_folder(pattern: str, most: int) -> str | None:
    """Return the folder of a pattern, of the largest number and the first split that exist."""
    if pattern == pattern.format(num=0, split=0):
        return pattern
    names = (pattern.format(num=num, split=split) for num in range(most, 0, -1) for split in (0, 1))
    return next((name for name in names if Path(name).is_dir()), None)


def describe_protocol(config, materials: Materials, folders, num_trainings) -> dict:
    """Return what a reader must know to judge the numbers."""
    return {
        # a page that is passed on shows no local path
        "data": Path(config.data).name if Path(config.data).is_dir() else config.data,
        "pairs": {name: Path(folder).name for name, folder in folders.items()},
        "kinds": materials.kind_map,
        "num_pool": len(materials.micrographs),
        "num_test": len({each.micrograph for each in materials.test}),
        "num_test_tiles": len(materials.test),
        "num_test_specimens": len({each.specimen for each in materials.test}),
        "num_test_defects": sum(len(each.defects) for each in materials.test),
        "image_px": list(materials.test[0].image.shape),
        "nums": config.nums,
        "splits": config.splits,
        "seeds": config.seeds,
        "num_trainings": num_trainings,
        "synthetic_share": config.synthetic_share,
        "segmenter": dataclasses.asdict(config.segmenter),
    }


def main():
    """Read the command line and measure."""
    measure_gain(tyro.cli(GainConfig, prog="python -m em_evaluation.detector_gain"))


if __name__ == "__main__":
    run_module(main, "stopped; the same command continues")
