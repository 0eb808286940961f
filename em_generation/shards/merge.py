"""Join the features of all shards, and compare them with real images."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from em_data.files import write_atomically
from em_evaluation import Extractor, compute_features
from em_evaluation.distances import bootstrap_interval
from em_evaluation.feature_metrics import METRICS, choose_metrics, measure
from em_evaluation.images import note_few_micrographs, read_images
from em_evaluation.interval import to_json
from em_evaluation.moments import Moments, frechet_influence_of_moments
from em_evaluation.numbers import format_interval
from em_generation.candidates import Candidate, clean_name
from em_generation.evaluate import EvaluationConfig, check_writable, load_real_images
from em_generation.extractors import create_extractors
from em_generation.folder import RECORD
from em_generation.shards.check import name_files
from em_generation.shards.features import (
    SUFFIX,
    FeatureOptions,
    find_folder,
    read_facts,
    read_feature_file,
    write_features,
)
from em_generation.shards.plan import read_mark, read_plan
from em_generation.shards.reading import ImageFile
from em_training import create_process_state

USED = {
    "features_of": ("extractors", "batch_size", "input_px", "resize_mode", "weights"),
    "merge": (
        *("extractors", "batch_size", "input_px", "resize_mode", "weights", "out", "data"),
        *("reference", "num_images", "tiles", "metrics", "seed", "cache_dir"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Merged:
    """All features of a folder: moments of all images [N], and features of a sample [K, D].

    kept: float16. numbers: of the kept images. shape: of an image.
    """

    moments: Moments
    kept: np.ndarray
    numbers: np.ndarray
    shape: tuple[int, int]


def merge_features(folder: Path, num_kept: int, seed: int, identity: str | None = None) -> Merged:
    """Join the files of a folder of features, in the order of their images.

    The memory does not depend on the number of images: one file and the kept rows are in it.

    Args:
        folder: Of one extractor.
        num_kept: Images to keep, drawn at random without replacement; all if there are fewer.
        seed: Of the drawing.
        identity: The extractor whose features these must be.

    Raises:
        ValueError: Images are missing or doubled, a file is damaged, or of another extractor.
    """
    files = list_feature_files(folder, identity)
    num = files[-1][1]["end"]
    rng = np.random.default_rng([seed, num])
    numbers = np.sort(rng.choice(num, min(num_kept, num), replace=False, shuffle=False))
    moments: Moments | None = None
    kept = []
    for path, facts in tqdm(files, desc="merging", unit="file", disable=None):
        found = read_feature_file(path)
        moments = found.moments if moments is None else moments.merge(found.moments)
        first, last = np.searchsorted(numbers, [facts["first"], facts["end"]])
        kept.append(found.features[numbers[first:last] - facts["first"]])
    assert moments is not None
    height, width = files[0][1]["shape"]
    return Merged(moments, np.concatenate(kept), numbers, (height, width))


def list_feature_files(folder: Path, identity: str | None = None) -> list[tuple[Path, dict]]:
    """Return each file of features with its facts, in the order of the images.

    Raises:
        ValueError: Images are missing or doubled, or the features are of another extractor.
    """
    files = [(path, read_facts(path)) for path in folder.glob(f"images-*.{SUFFIX}")]
    files.sort(key=lambda each: each[1]["first"])
    if not files:
        raise ValueError(
            f"{folder} holds no features of this extractor. Write them with evaluate.py "
            "--features-of OUT and the same --extractors."
        )
    num_images, end = max(facts["num_images"] for _, facts in files), 0
    for path, facts in files:
        if identity is not None and facts["extractor"] != identity:
            raise ValueError(
                f"{path} has features of another extractor ({facts['extractor']}). Merge with the "
                "--extractors that it was written with."
            )
        if facts["first"] != end:
            what = "missing" if facts["first"] > end else "doubled"
            low, high = sorted((facts["first"], end))
            raise ValueError(
                f"{folder}: features of images {low:,} to {high - 1:,} are {what}. Repeat "
                "evaluate.py --features-of OUT; it writes what is missing."
            )
        end = facts["end"]
    if end < num_images:
        raise ValueError(
            f"{folder}: features of images {end:,} to {num_images - 1:,} are missing. Repeat "
            "evaluate.py --features-of OUT; it writes what is missing."
        )
    return files


def check_images(out: Path, files: Sequence[tuple[Path, dict]]) -> None:
    """Refuse features that are not those of the images in a folder of shards.

    A folder that holds features alone has nothing to compare with.
    """
    if not (out / RECORD).exists():
        return
    plan = read_plan(out)
    known = {facts["first"]: facts for _, facts in files}
    other = []
    for file in range(plan.num_files):
        mark, facts = read_mark(plan, file) or {}, known.get(plan.numbers(file).start, {})
        if not mark or any(
            mark[key] != facts.get(name)
            for key, name in (("end", "end"), ("sha256", "images_sha256"))
        ):
            other.append(file)
    if other:
        raise ValueError(
            f"{out}: the features are not those of the present images: {name_files(plan, other)}. "
            f"See python generate.py --check {out}, then repeat evaluate.py --features-of {out}."
        )


def run_feature_step(config: EvaluationConfig, options: FeatureOptions) -> None:
    """Write the features of a shard, or join all features: what the flags ask for."""
    step = "merge" if options.merge else "features_of"
    refuse_unused(config, step)
    device = create_process_state().device
    if options.merge:
        merge_and_compare(config, options.merge, device)
        return
    assert options.features_of is not None
    out = Path(options.features_of)
    extractors = create_extractors(config, find_resolution(out), device)
    num = write_features(out, options.shard, extractors, batch_size=config.batch_size)
    print(f"shard {options.shard}: {num:,} files of features written in {out / 'features'}")
    print(f"Next, when all shards are done: python evaluate.py --merge {out} --data MICROGRAPHS")


def refuse_unused(config: EvaluationConfig, step: str) -> None:
    """Refuse flags that a step has no use for."""
    for field in dataclasses.fields(config):
        is_used = field.name in (*USED[step], "feature_precision")
        if not is_used and getattr(config, field.name) != field.default:
            raise ValueError(
                f"--{step.replace('_', '-')} has no use for --{field.name.replace('_', '-')}. "
                "Leave it out."
            )


def find_resolution(out: Path) -> int:
    """Return the height of the images in a folder of shards."""
    plan = read_plan(out)
    for file in sorted(plan.list_marked()):
        if plan.data(file).is_file():
            return ImageFile(plan.data(file)).shape[0]
    raise ValueError(f"{out} has no images yet. Write them with generate.py --shard.")


def merge_and_compare(config: EvaluationConfig, folders: Sequence[str], device) -> dict:
    """Compare the merged features of each folder with real images; write and print the result."""
    check_writable(config.out, "--out")
    shapes = {read_shape(Path(folder)) for folder in folders}
    if len(shapes) > 1:
        sizes = " and ".join(f"{h} x {w}" for h, w in sorted(shapes))
        raise ValueError(f"The images have {sizes} px. Merge folders of one size.")
    shape = shapes.pop()
    # what stands for the images, of which only the size is needed
    images: Any = SimpleNamespace(shape=shape)
    candidate = Candidate("images", folders[0], images=images)
    real = load_real_images(config, [candidate])
    extractors = create_extractors(config, shape[0], device)
    held_out = read_images(
        real.held_out, min(config.num_images, len(real.held_out)), seed=config.seed
    )
    if held_out.resolution != shape:
        raise ValueError(
            f"The real images have {held_out.resolution[0]} x {held_out.resolution[1]} px, the "
            f"generated ones {shape[0]} x {shape[1]}. Give others with --reference or --tiles."
        )
    measurements = [
        compare_with_real(config, folders, extractor, held_out) for extractor in extractors
    ]
    result = {
        "dataset": {key: value for key, value in real.summary.items() if key != "source"},
        "reference_num_images": len(held_out),
        "seed": config.seed,
        "measurements": measurements,
        "notes": note_few_micrographs(held_out.groups),
    }
    path = Path(config.out) / "merged.json"
    result = to_json(result)
    write_atomically(path, json.dumps(result, indent=2) + "\n")
    print_result(result)
    print(f"\nAll numbers: {path}")
    return result


def read_shape(folder: Path) -> tuple[int, int]:
    """Return the size of the images in a folder of shards or of features."""
    pattern = "features/*/images-*" if (folder / "features").is_dir() else "images-*"
    for path in folder.glob(f"{pattern}.{SUFFIX}"):
        height, width = read_facts(path)["shape"]
        return height, width
    raise ValueError(
        f"{folder} holds no features. Write them with evaluate.py --features-of {folder}."
    )


def compare_with_real(config, folders: Sequence[str], extractor: Extractor, held_out) -> dict:
    """Return the measurement of all folders with one extractor."""
    real = compute_features(
        held_out, extractor, batch_size=config.batch_size, cache_dir=config.cache_dir
    )
    assert real is not None
    names, notes = choose_metrics(config.metrics, extractor, len(held_out))
    rows: dict[str, Any] = {}
    for text in folders:
        folder = Path(text)
        name = clean_name(folder.resolve().name) or "images"
        if name in rows:
            raise ValueError(f"Two folders are called {name}. Rename one of them.")
        if (folder / "features").is_dir():
            folder = find_folder(folder, extractor)
        check_images(folder.resolve().parent.parent, list_feature_files(folder, extractor.identity))
        merged = merge_features(folder, len(held_out), config.seed, extractor.identity)
        distance = frechet_influence_of_moments(merged.moments, merged.kept, real)
        groups: dict[str, Any] = {"groups_b": held_out.groups, "seed": config.seed}
        exact = bootstrap_interval(distance, **groups).limited(lowest=0.0)
        kept, _ = measure(names, merged.kept, real, **groups)
        rows[name] = {
            "num_images": merged.moments.num,
            "frechet_distance": exact,
            "num_kept": len(merged.kept),
            "kept": kept,
        }
    return {
        "extractor": extractor.name,
        "identity": extractor.identity,
        "metrics": names,
        "rows": rows,
        "notes": notes,
    }


def print_result(result: dict) -> None:
    """Print the distances of all images, and all metrics of the kept ones."""
    number = result["reference_num_images"]
    for measured in result["measurements"]:
        rows = measured["rows"]
        width = max(map(len, rows))
        print(f"\n{measured['extractor']}: Frechet distance of all images to {number:,} real ones")
        for name, row in rows.items():
            interval = format_interval(row["frechet_distance"])
            print(f"  {name:{width}}  {interval}, {row['num_images']:,} images")
        kept = next(iter(rows.values()))["num_kept"]
        print(f"\nOf {kept:,} images drawn at random, to {number:,} real ones (95 % interval)")
        for metric in measured["metrics"]:
            print(f"  {METRICS[metric].label}")
            for name, row in rows.items():
                print(f"    {name:{width}}  {format_interval(row['kept'][metric])}")
        for note in measured["notes"]:
            print(f"Note: {note}")
    for note in result["notes"]:
        print(f"Note: {note}")
