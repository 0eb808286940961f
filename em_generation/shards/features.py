"""Features of the images of a shard: a file of features beside each file of images.

    OUT/features/efficientnet-lite0-1a2b3c4d/images-000007.safetensors

holds `features` in half precision [n, D], their `mean` [D] and `scatter` [D, D] in float64, and in
its header the numbers of the images, the extractor, and the SHA-256 of the images and of itself.
Mean and scatter are those of the features before they are rounded to half precision.
"""

import contextlib
import dataclasses
import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save
from tqdm.auto import tqdm

from em_data.files import flush_to_disk, lock, make_folder, make_folder_name, name_full_disk
from em_evaluation import Extractor, compute_features
from em_evaluation.moments import Moments
from em_generation.shards.check import find_fault, name_files
from em_generation.shards.plan import Plan, parse_shard, read_mark, read_plan
from em_generation.shards.reading import ImageFile

SUFFIX = "safetensors"
MOST_HEADER = 2**20  # bytes
MOST = float(np.finfo(np.float16).max)


@dataclasses.dataclass(frozen=True)
class FeatureOptions:
    """Many images, judged by many workers: see docs/cluster.md."""

    features_of: str | None = None
    """OUT: write the features of the images that generate.py --shard wrote into OUT, to
    OUT/features. Takes --shard, --extractors with their flags, and --batch-size."""
    shard: str = "1/1"
    """I/N: of every N-th file of images, from the I-th on. N may change between starts. Files that
    are done are checked and kept."""
    merge: tuple[str, ...] = ()
    """One or more folders OUT, or folders of features: join the features of all files and compare
    them with real images, of --data or --reference. The Frechet distance is that of all images.
    Intervals and the other metrics rest on --num-images of them, drawn at random."""

    def __post_init__(self):
        parse_shard(self.shard)
        if self.features_of is not None and self.merge:
            raise ValueError("--features-of and --merge are two steps. Give one of them.")
        if self.shard != "1/1" and self.features_of is None:
            raise ValueError("--shard needs --features-of OUT.")


@dataclasses.dataclass(frozen=True)
class FeatureFile:
    """The content of a file of features.

    facts: "extractor" (its identity), "first" and "end" (numbers of the images), "shape" (of an
    image), "images_sha256", "num_images" (of the whole folder when this was written) and "sha256"
    (of the arrays).
    """

    features: np.ndarray  # float16 [n, D]
    moments: Moments
    facts: dict[str, Any]


class _ImagesChangedError(Exception):
    """The images of a file are written anew."""


def write_features(
    out, shard: str, extractors: Sequence[Extractor], *, batch_size: int = 50, log=print
) -> int:
    """Write the features of a shard's files that have none yet; return the number written.

    Args:
        out: A folder that `generate_shard` wrote.
        shard: "I/N".
        extractors: One or more.
        batch_size: Images at once.
        log: Gets sentences.

    Raises:
        ValueError: Files of images are missing or damaged. Features of the others are written.
    """
    plan = read_plan(out)
    files = plan.share(*parse_shard(shard))
    missing, num_written, others = set(), 0, []

    def write(file: int, extractor: Extractor) -> int:
        try:
            return _write_file(plan, file, extractor, batch_size, log)
        except _ImagesChangedError:
            missing.add(file)
            return 0

    with name_full_disk(out):
        for file in tqdm(files, desc="features", unit="file", disable=None):
            if find_fault(plan, file) is not None:
                missing.add(file)
                continue
            for extractor in extractors:
                with contextlib.ExitStack() as held:
                    try:
                        held.enter_context(lock(_lock_path(plan, file, extractor), "held"))
                    except ValueError:
                        others.append((file, extractor))
                        continue
                    num_written += write(file, extractor)
        for file, extractor in others:  # another process has written these, or has ended
            with lock(_lock_path(plan, file, extractor)):
                num_written += write(file, extractor)
    if missing:
        raise ValueError(
            f"{out} lacks whole files of images: {name_files(plan, sorted(missing))}. Write them "
            f"(python generate.py --check {out} says how), and repeat this command."
        )
    return num_written


def find_folder(out: Path, extractor: Extractor) -> Path:
    """Return the folder of an extractor's features."""
    digest = hashlib.sha256(extractor.identity.encode()).hexdigest()[:8]
    return out / "features" / f"{make_folder_name(extractor.name)}-{digest}"


def _lock_path(plan: Plan, file: int, extractor: Extractor) -> Path:
    folder = find_folder(plan.out, extractor).name
    return plan.out / ".locks" / f"{folder}-{plan.name(file)}.lock"


def _write_file(plan: Plan, file: int, extractor: Extractor, batch_size: int, log) -> bool:
    """Write the features of a file unless they are done; return whether they were written.

    Raises:
        _ImagesChangedError: Another process has begun to write the images anew.
    """
    path = find_folder(plan.out, extractor) / f"{plan.name(file)}.{SUFFIX}"
    mark = read_mark(plan, file)
    if not mark:
        raise _ImagesChangedError
    if path.exists():
        fault = "is damaged"
        with contextlib.suppress(ValueError):
            if read_feature_file(path).facts["images_sha256"] == mark["sha256"]:
                return False
            fault = "is of other images"
        log(f"{path} {fault}; it is written again")
    try:
        images = ImageFile(plan.data(file))
        features = compute_features(images, extractor, batch_size=batch_size, use_cache=False)
    except Exception as error:  # reading fails while the images are written
        if read_mark(plan, file) != mark:
            raise _ImagesChangedError from error
        raise
    if read_mark(plan, file) != mark:
        raise _ImagesChangedError
    assert features is not None
    facts = {
        "extractor": extractor.identity,
        "first": mark["first"],
        "end": mark["end"],
        "shape": list(images.shape),
        "images_sha256": mark["sha256"],
        "num_images": plan.num_images,
    }
    if np.abs(features).max() > MOST:
        raise ValueError(
            f"The features of {extractor.name} exceed {MOST:g}, the largest number in half "
            "precision. Use another one with --extractors."
        )
    make_folder(path.parent)
    content = _encode(features, facts)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    for remains in path.parent.glob(f".{path.name}.*"):  # of a killed process
        remains.unlink(missing_ok=True)
    temporary.write_bytes(content)
    flush_to_disk(temporary)
    temporary.replace(path)
    flush_to_disk(path.parent)
    return True


def _encode(features: np.ndarray, facts: dict[str, Any]) -> bytes:
    moments = Moments.of(features)
    arrays = {
        "features": features.astype(np.float16),
        "mean": moments.mean,
        "scatter": moments.scatter,
    }
    return save(arrays, {"facts": json.dumps(facts | {"sha256": _digest(arrays)})})


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in ("features", "mean", "scatter"):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def read_feature_file(path: Path) -> FeatureFile:
    """Read a file of features; `ValueError` if it is damaged."""
    facts = read_facts(path)
    try:
        arrays = load(path.read_bytes())
    except Exception as error:  # of safetensors
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if _digest(arrays) != facts["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 differs. Delete it and write it again.")
    moments = Moments(facts["end"] - facts["first"], arrays["mean"], arrays["scatter"])
    return FeatureFile(arrays["features"], moments, facts)


def read_facts(path: Path) -> dict[str, Any]:
    """Return the facts in the header of a file of features."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MOST_HEADER)))
        return json.loads(header["__metadata__"]["facts"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged: it has no header. Delete it.") from error
