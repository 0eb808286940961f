"""Say what is missing, damaged or doubled in a folder of shards, and how to write it."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from tqdm.auto import tqdm

from em_data.files import printable
from em_generation.shards.plan import FILE_NAME, Plan, read_mark, read_plan
from em_generation.shards.reading import ImageFile
from em_generation.store import scan_names

MOST_TASKS = 1000  # of an array, as SLURM allows by default


@dataclasses.dataclass(frozen=True)
class Check:
    """What a check found.

    missing: files without a mark. damaged: file -> what is wrong with it. doubled: name of a file
    that is no part of the plan -> what is wrong with it. remains: files that a killed worker left
    half-written, or a running one is writing. lacks_index: all files are whole, but
    `datasets.load_from_disk` does not find them.
    """

    plan: Plan
    missing: tuple[int, ...]
    damaged: dict[int, str]
    doubled: dict[str, str]
    remains: tuple[str, ...]
    lacks_index: bool = False

    @property
    def to_write(self) -> list[int]:
        """The files that must be written."""
        return sorted([*self.missing, *self.damaged])

    @property
    def is_whole(self) -> bool:
        """Whether each image is there once, and the folder can be loaded."""
        return not (self.missing or self.damaged or self.doubled or self.lacks_index)


def check_shards(out) -> Check:
    """Read every file of a folder of shards and compare it with its mark and with the plan.

    Raises:
        ValueError: `out` is no folder of shards.
    """
    plan = read_plan(out)
    marked = plan.list_marked()
    missing = [file for file in range(plan.num_files) if file not in marked]
    damaged = {}
    present = sorted(marked & set(range(plan.num_files)))
    for file in tqdm(present, desc="checking", unit="file", disable=None):
        fault = find_fault(plan, file, reads_numbers=True)
        if fault is not None:
            damaged[file] = fault
    planned = {plan.data(file).name for file in range(plan.num_files)}
    folder = plan.out / "data"  # a start that was killed may have made none
    names = sorted(scan_names(folder)) if folder.is_dir() else []
    extra = [name for name in names if name not in planned and not name.startswith(".")]
    remains = tuple(name for name in names if re.fullmatch(rf"\.{FILE_NAME}\..+", name))
    doubled = {name: _describe_extra(folder / name) for name in extra}
    lacks_index = not (missing or damaged) and plan.format == "arrow" and not _has_index(plan)
    return Check(plan, tuple(missing), damaged, doubled, remains, lacks_index)


def _has_index(plan: Plan) -> bool:
    """Say whether the index names the files of the plan."""
    try:
        state = json.loads((plan.out / "state.json").read_text())
        names = [each["filename"] for each in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    planned = [f"data/{plan.data(file).name}" for file in range(plan.num_files)]
    return names == planned and (plan.out / "dataset_info.json").is_file()


def find_fault(plan: Plan, file: int, *, reads_numbers: bool = False) -> str | None:
    """Return what is wrong with a file as the end of a sentence; None if it is done.

    reads_numbers: Also compare the numbers of its images with the plan.
    """
    mark, path, numbers = read_mark(plan, file), plan.data(file), plan.numbers(file)
    if mark is None:
        return "has no mark"
    if not mark:
        return "has a damaged mark"
    if mark["first"] != numbers.start or mark["end"] < numbers.stop:
        return f"ends before image {mark['end']:,}, but the plan has more"
    if not path.is_file():
        return "is missing, though it is marked as done"
    if path.stat().st_size != mark["bytes"]:
        return f"has {path.stat().st_size:,} bytes instead of {mark['bytes']:,}"
    with path.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != mark["sha256"]:
            return "has another SHA-256 than its mark"
    if reads_numbers and ImageFile(path).numbers != list(range(mark["first"], mark["end"])):
        return "does not hold the images of its mark, each once and in order"
    return None


def _describe_extra(path: Path) -> str:
    """Say what a file holds that is no part of the plan."""
    try:
        numbers = ImageFile(path).numbers
    except ValueError:
        return "is no file of images"
    if not numbers:
        return "holds no images"
    return f"holds images {min(numbers):,} to {max(numbers):,}"


def describe_check(check: Check) -> str:
    """Return what a check found, and the command that writes what is missing, as text."""
    plan, lines = check.plan, []
    num_whole = plan.num_files - len(check.to_write)
    num_images = plan.num_images - sum(len(plan.numbers(file)) for file in check.to_write)
    lines.append(
        f"{plan.out}: {num_whole:,} of {plan.num_files:,} files are whole "
        f"({num_images:,} of {plan.num_images:,} images)."
    )
    if check.missing:
        lines.append(f"Missing: {name_files(plan, check.missing)}.")
    lines += [f"Damaged: {plan.data(file).name} {why}." for file, why in check.damaged.items()]
    for name, why in check.doubled.items():
        lines.append(
            f"Doubled: data/{printable(name)} {why}, but is no part of the plan. Delete it."
        )
    if check.remains:
        lines.append(
            f"{len(check.remains)} half-written files lie in data/. They are removed when their "
            "images are written again."
        )
    if check.lacks_index:
        lines.append(
            "The index for datasets.load_from_disk is missing or lists other files. Write it: "
            f"{read_command(plan.out)} --shard 1/1"
        )
    if check.to_write:
        lines.append(f"Write them: {read_command(plan.out)} --shard 1/1")
        number = min(plan.num_files, MOST_TASKS)
        shards = compress(sorted({file % number + 1 for file in check.to_write}))
        words = read_command(plan.out).removeprefix("python generate.py ")
        lines.append(
            f"As a SLURM array: NUM_SHARDS={number} sbatch --array={shards} generate.sbatch {words}"
        )
    return "\n".join(lines)


def name_files(plan: Plan, files) -> str:
    """Return a phrase for files: their names and images, the first few of many."""
    shown = [
        f"{plan.data(file).name} (images {plan.numbers(file).start:,} to "
        f"{plan.numbers(file).stop - 1:,})"
        for file in files[:3]
    ]
    more = len(files) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def read_command(out: Path) -> str:
    """Return the command line that generates into a folder, without --shard."""
    path = out / ".command"
    if path.is_file():
        return path.read_text().strip()
    return f"python generate.py --model MODEL --out {out} (with the flags of the first start)"


def compress(numbers: list[int]) -> str:
    """Return sorted numbers as SLURM takes them: "3,7-9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
