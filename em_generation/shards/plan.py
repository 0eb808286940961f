"""What a folder of shards holds: its files, and the mark that says that a file is done.

    OUT/generation.json             settings of all images, and their number
    OUT/data/images-000007.arrow    images 70,000 to 79,999 (or .tar)
    OUT/done/images-000007.json     its mark: numbers of the images, seed, bytes and SHA-256

An image belongs to a file by its number alone. A shard is every N-th file: N decides who writes a
file, never what is in it.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from em_data.files import write_atomically
from em_generation.folder import RECORD
from em_generation.store import scan_names
from em_training.config import read_json_object

SUFFIXES = {"arrow": "arrow", "webdataset": "tar"}
FILE_NAME = r"images-(\d{6,})\.(arrow|tar)"
MOST_IN_FILE = 1_000_000


@dataclasses.dataclass(frozen=True)
class ShardOptions:
    """Many images, by many workers: --format arrow or webdataset, see docs/cluster.md."""

    shard: str | None = None
    """I/N: write every N-th file of images, from the I-th on; I is 1 to N. N may change between
    starts: files that are done are checked and kept. 1/1 writes all files."""
    images_per_file: int = 10_000
    """Images in each file. A file is written whole or not at all."""
    check: str | None = None
    """OUT: say which files of a folder of shards are missing, damaged or doubled, and how to write
    them. Needs no other flag. The exit code is 1 if a file is missing."""

    def __post_init__(self):
        if not 1 <= self.images_per_file <= MOST_IN_FILE:
            raise ValueError(
                f"--images-per-file is {self.images_per_file}, but must be 1 to {MOST_IN_FILE:,}."
            )
        if self.shard is not None:
            parse_shard(self.shard)
        elif self.images_per_file != ShardOptions.images_per_file:
            raise ValueError("--images-per-file only holds for shards. Add --shard 1/1.")


def parse_shard(text: str) -> tuple[int, int]:
    """Return (I - 1, N) of a text such as "3/20"."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    index, number = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= number:
        raise ValueError(
            f"--shard is {text}; give I/N with I from 1 to N, such as 3/20 for the third of 20."
        )
    return index - 1, number


@dataclasses.dataclass(frozen=True)
class Plan:
    """The files of a folder of shards.

    out: The folder. format: "arrow" or "webdataset".
    """

    out: Path
    num_images: int
    images_per_file: int
    format: str

    @property
    def num_files(self) -> int:
        return -(-self.num_images // self.images_per_file)

    def numbers(self, file: int) -> range:
        """Return the numbers of the images in a file."""
        first = file * self.images_per_file
        return range(first, min(first + self.images_per_file, self.num_images))

    def share(self, index: int, number: int) -> range:
        """Return the files of shard `index` (from 0) of `number`."""
        return range(index, self.num_files, number)

    def name(self, file: int) -> str:
        """Return the name of a file without its suffix."""
        return f"images-{file:06d}"

    def data(self, file: int) -> Path:
        """Return the path of a file of images."""
        return self.out / "data" / f"{self.name(file)}.{SUFFIXES[self.format]}"

    def mark(self, file: int) -> Path:
        """Return the path of the mark that a file is done."""
        return self.out / "done" / f"{self.name(file)}.json"

    def lock(self, file: int) -> Path:
        """Return the path of the lock that a worker holds while it writes a file."""
        return self.out / ".locks" / f"{self.name(file)}.lock"

    def list_marked(self) -> set[int]:
        """Return the files that have a mark, by one scan of the folder."""
        folder = self.out / "done"
        names = scan_names(folder) if folder.is_dir() else []
        found = (re.fullmatch(r"images-(\d{6,})\.json", name) for name in names)
        return {int(match[1]) for match in found if match}


def read_plan(out) -> Plan:
    """Return the plan of a folder; `ValueError` if it is no folder of shards."""
    path = Path(out) / RECORD
    record: dict[str, Any] = read_json_object(path) if path.is_file() else {}
    settings = record.get("settings", {})
    if "images_per_file" not in settings:
        raise ValueError(
            f"{out} is no folder of shards. Name one that generate.py --shard has written."
        )
    format = settings["format"]
    return Plan(Path(out), record["num_images"], settings["images_per_file"], format)


def write_mark(plan: Plan, file: int, facts: dict) -> None:
    """Mark a file as done. facts: what else is known of it, beside its images."""
    numbers = plan.numbers(file)
    content = {
        "file": f"data/{plan.data(file).name}",
        "first": numbers.start,
        "end": numbers.stop,
        **facts,
    }
    write_atomically(plan.mark(file), json.dumps(content, indent=2) + "\n")


def read_mark(plan: Plan, file: int) -> dict | None:
    """Return the mark of a file; None if there is none, {} if it is damaged."""
    try:
        mark = json.loads(plan.mark(file).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    keys = {"first": int, "end": int, "bytes": int, "sha256": str}
    is_whole = isinstance(mark, dict) and all(
        isinstance(mark.get(key), kind) for key, kind in keys.items()
    )
    return mark if is_whole else {}
