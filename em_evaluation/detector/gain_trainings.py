"""Trainings of the gain: each is one record on the disk, and several run side by side."""

import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from em_data.config import DataConfig
from em_data.data import load_data, load_tiles
from em_data.files import make_folder_name, write_atomically
from em_data.micrograph import Micrograph
from em_data.tiles import Tiles
from em_evaluation.detector.arms import WEAK, Task
from em_evaluation.detector.labelled import LabelledImage
from em_evaluation.detector.labelled_tiles import compare_kinds, list_labelled, parse_kinds
from em_evaluation.detector.scores import Scores, score_segmenter
from em_evaluation.detector.segmenter import (
    Segmenter,
    SegmenterConfig,
    TrainingSet,
    train_segmenter,
)

VERSION = 1  # of the records; raised when a training with the same settings would differ


@dataclass(frozen=True)
class TrainingSettings:
    """What all trainings of a gain share."""

    data: str
    tiles: DataConfig
    kinds: tuple[str, ...]  # as of --kinds
    segmenter: SegmenterConfig
    synthetic_share: float


class PairSet(NamedTuple):
    """A folder of pairs, ready for the segmenter."""

    training: TrainingSet
    fingerprint: str  # of the content
    kinds: tuple[str, ...]  # in the labels


@dataclass(eq=False)
class Materials:
    """What trainings draw on, read once per process."""

    settings: TrainingSettings
    kind_map: dict[str, str]  # kind in the labels, real or of pairs -> kind for the segmenter
    real_kinds: tuple[str, ...]  # in the labels of the micrographs
    pool: list[LabelledImage]
    test: list[LabelledImage]
    identity: dict  # of the data: what a record depends on
    pool_set: TrainingSet | None = None
    pair_sets: dict[str, PairSet] = field(default_factory=dict)  # by folder

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the segmenter, in an order that does not depend on that of --kinds."""
        return tuple(sorted(set(self.kind_map.values())))

    @property
    def micrographs(self) -> list[str]:
        """Names of the labelled micrographs to train on, sorted."""
        return sorted({each.micrograph for each in self.pool})

    def choose(self, num: int, split: int) -> list[str]:
        """Return the first `num` micrographs of a split; smaller numbers are subsets."""
        names = self.micrographs
        order = np.random.default_rng([split, 5]).permutation(len(names))
        return [names[i] for i in order[:num]]

    def list_micrographs(self, num: int, split: int) -> list[Micrograph]:
        """Return the labelled images of the first `num` micrographs of a split."""
        chosen = set(self.choose(num, split))
        return [
            Micrograph(
                each.image,
                f"{Path(each.micrograph).stem}-{i:05d}",
                each.pixel_size_nm,
                make_folder_name(each.specimen),
                defects=each.defects,
            )
            for i, each in enumerate(self.pool)
            if each.micrograph in chosen
        ]

    def get_pool_set(self) -> TrainingSet:
        """Return the training set of all labelled tiles."""
        if self.pool_set is None:
            self.pool_set = TrainingSet.from_images(self.pool, self.kinds)
        return self.pool_set

    def get_pairs(self, folder: str) -> PairSet:
        """Return the training set of a folder of pairs, with its hash and its kinds."""
        if folder not in self.pair_sets:
            images, tiles = read_pairs(folder, self.settings, self.kind_map)
            training = TrainingSet.from_images(images, self.kinds)
            self.pair_sets[folder] = PairSet(training, tiles.fingerprint, tiles.kinds)
        return self.pair_sets[folder]

    def compare_kinds(self, tasks: Sequence[tuple[Task, str | None]] = ()) -> list[str]:
        """Return sentences on kinds that micrographs or the pairs of the trainings lack.

        Raises:
            ValueError: Neither micrographs nor pairs have a kind of --kinds.
        """
        generated: dict[str, set[str]] = {}
        for task, folder in tasks:
            if folder is not None:
                name = f"the pairs {task.arm.pairs}"
                generated.setdefault(name, set()).update(self.get_pairs(folder).kinds)
        generated_kinds = {name: sorted(kinds) for name, kinds in generated.items()}
        return compare_kinds(self.kind_map, self.real_kinds, generated_kinds)


def read_materials(settings: TrainingSettings, log=print) -> Materials:
    """Read the labelled tiles: those to train on and, of other specimens, those of the test.

    Raises:
        ValueError: One side has no labelled micrographs.
    """
    data = load_data(settings.data, settings.tiles, log=log)
    kind_map = parse_kinds(settings.kinds, data.train.kinds)
    sides = [
        list_labelled(side, kind_map, settings.tiles.split) for side in (data.train, data.held_out)
    ]
    for side, name in zip(sides, ("to train on", "for the test")):
        if not side:
            raise ValueError(
                f"{settings.data} has no labelled micrograph {name}. Label some, or change the "
                "split with --tiles.seed or --tiles.held-out-fraction."
            )
    identity = {"train": data.train.fingerprint, "test": data.held_out.fingerprint}
    return Materials(settings, kind_map, data.train.kinds, sides[0], sides[1], identity)


def read_pairs(
    folder: str, settings: TrainingSettings, kind_map
) -> tuple[list[LabelledImage], Tiles]:
    """Return the labelled images of pairs, cut to the segmenter's crops, and the tiles.

    Raises:
        ValueError: No image has labels, or none of the kinds is one that the segmenter looks for.
    """
    kind_map = {name: name for name in kind_map.values()} | dict(kind_map)
    tiles = replace(
        settings.tiles,
        resolution=settings.segmenter.crop_px,
        downsample=1,
        label_bar="keep",
        split="micrograph",
    )
    cut = load_tiles(folder, tiles, log=lambda text: None)
    images = list_labelled(cut, kind_map, "micrograph")
    if not images:
        raise ValueError(f"{folder} holds no labelled images. Make them with generate.py --pairs.")
    if not set(cut.kinds) & set(kind_map):
        raise ValueError(
            f"{folder} has defects of the kinds {', '.join(cut.kinds) or 'none'}, but the "
            f"segmenter looks for {', '.join(kind_map)}. Join kinds that mean the same with "
            "--kinds NEW=KIND+KIND, or make pairs of these kinds with --labelled."
        )
    return images, cut


def make_record_settings(task: Task, folder: str | None, materials: Materials) -> dict:
    """Return all that a training depends on, as JSON values."""
    settings, micrographs = materials.settings, materials.choose(task.num, task.split)
    record = {
        "version": VERSION,
        **materials.identity,
        "kinds": {
            kind: new
            for kind, new in materials.kind_map.items()
            if folder is not None or kind in materials.real_kinds
        },
        "segmenter": asdict(settings.segmenter),
        "is_strong": task.arm.key != WEAK,
        "micrographs": hashlib.sha256("\n".join(sorted(micrographs)).encode()).hexdigest()[:16],
        "num": task.num,
        "pairs": None if folder is None else materials.get_pairs(folder).fingerprint,
        "share": settings.synthetic_share if folder is not None and task.arm.has_real else None,
        "seed": [task.split, task.seed],
    }
    return json.loads(json.dumps(record))  # as it is read back


def hash_settings(settings: dict) -> str:
    """Return the name of a record."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def train_task(task: Task, folder: str | None, materials: Materials) -> Segmenter:
    """Train the segmenter of a task."""
    chosen = set(materials.choose(task.num, task.split))
    indices = [i for i, each in enumerate(materials.pool) if each.micrograph in chosen]
    return train_segmenter(
        materials.get_pool_set().select(indices),
        materials.kinds,
        materials.settings.segmenter,
        synthetic=None if folder is None else materials.get_pairs(folder).training,
        synthetic_share=materials.settings.synthetic_share,
        is_strong=task.arm.key != WEAK,
        seed=1000 * task.split + task.seed,
    )


def run_task(task: Task, folder: str | None, materials: Materials) -> dict:
    """Train and test a segmenter; return its record."""
    start = time.perf_counter()
    scores = score_segmenter(train_task(task, folder, materials), materials.test)
    return {
        "settings": make_record_settings(task, folder, materials),
        "seconds": round(time.perf_counter() - start, 2),
        "scores": scores.to_json(),
    }


_materials: Materials | None = None  # of a worker process


def _start_worker(settings):
    global _materials
    torch.set_num_threads(1)
    _materials = read_materials(settings, log=lambda text: None)


def _work(task, folder):
    assert _materials is not None
    return run_task(task, folder, _materials)


def run_tasks(
    tasks: Sequence[tuple[Task, str | None]],
    materials: Materials,
    folder: Path,
    jobs: int,
    say=print,
) -> dict[Task, Scores]:
    """Run the trainings that have no record yet, `jobs` at a time; return the scores of all.

    Args:
        tasks: Trainings, each with its folder of pairs or None.
        materials: Of this process.
        folder: Folder of the records.
        jobs: Processes; each has one thread. 1: this process alone.
    """
    paths, scores, missing = {}, {}, []
    for task, pairs in tasks:
        settings = make_record_settings(task, pairs, materials)
        paths[task] = folder / f"{hash_settings(settings)}.json"
        record = read_record(paths[task], settings)
        if record is None:
            missing.append((task, pairs))
        else:
            scores[task] = Scores.from_json(record["scores"])
    say(f"{len(tasks):,} trainings: {len(scores):,} are on the disk, {len(missing):,} to do")
    for task, record in tqdm(
        _run(missing, materials, jobs), "trainings", len(missing), unit="training", smoothing=0.05
    ):
        write_atomically(paths[task], json.dumps(record) + "\n")
        scores[task] = Scores.from_json(record["scores"])
    return {task: scores[task] for task, _ in tasks}


def _run(tasks, materials, jobs) -> Iterator[tuple[Task, dict]]:
    if jobs == 1 or len(tasks) < 2:
        yield from ((task, run_task(task, pairs, materials)) for task, pairs in tasks)
        return
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (materials.settings,))
    try:
        futures = {pool.submit(_work, *each): each[0] for each in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_record(path: Path, settings: dict) -> dict | None:
    """Return the record of a training with these settings, or None."""
    try:
        record = json.loads(path.read_text())
        return record if record["settings"] == settings else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
