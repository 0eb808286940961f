"""Where micrographs come from: a folder, a Hugging Face data set, or the embedded generator."""

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from em_data.files import write_atomically
from em_data.reading import SUFFIXES, natural_key, read_micrograph

LABEL_WORDS = r"(masks?|labels?|annotations?|annotated|ground[-_ ]?truth|gt|segmentations?)"
LABEL_FOLDER = re.compile(rf"^{LABEL_WORDS}(\d*|[-_ ].*)$", re.IGNORECASE)
LABEL_FILE = re.compile(rf"[-_ .]{LABEL_WORDS}\d*$", re.IGNORECASE)
IMAGE_FOLDER = re.compile(r"^(images?|imgs?|micrographs?|data|raw)$", re.IGNORECASE)
OTHER_MICROSCOPY = (
    ".dm3",
    ".dm4",
    ".emd",
    ".ser",
    ".mrc",
    ".mrcs",
    ".hdf5",
    ".h5",
    ".npy",
    ".npz",
    ".gif",
    ".webp",
)
DEFAULT_NUM_SYNTHETIC = 48


@dataclass
class Entry:
    """One micrograph that is not read yet.

    name: unique in its source. key: hash of its content. group: what must not be cut apart by the split (its name, unless
    several entries are pieces of one micrograph). specimen: None where unknown. read: () -> Micrograph, or ValueError.
    bits: 8 or 16 where that is known before it is read.
    """

    name: str
    key: str
    read: Callable
    specimen: str | None = None
    group: str | None = None
    bits: int | None = None

    def __post_init__(self):
        self.group = self.group or self.name


@dataclass
class Source:
    """The entries of a source in their natural order, and what lies there and is not used (sentences)."""

    name: str
    entries: list
    ignored: list


def open_source(source, config, cache_dir):
    """Return the Source that a string names: a folder, "synthetic", "hub:owner/name[@revision]" (kept on this disk) or
    "hub-stream:owner/name[@revision]" (not kept), "damaged-alloys:FOLDER", or "datasets:NAME_OR_PATH"."""
    from em_data.dataset_rows import open_dataset  # not at the top: it builds on this

    source = os.path.expanduser(str(source))
    if source == "synthetic":
        opened = open_synthetic(config)
    elif source.startswith(("hub:", "hub-stream:")):
        opened = open_dataset(source, config)
    elif source.startswith("damaged-alloys:"):
        from em_data.damaged_alloys import (
            open_damaged_alloys,
        )  # not at the top: it is a command, too

        opened = open_damaged_alloys(
            Path(source.removeprefix("damaged-alloys:")).expanduser(), config, cache_dir
        )
    elif source.startswith("datasets:"):
        opened = open_dataset(source.removeprefix("datasets:"), config)
    elif (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
        opened = open_dataset(source, config)
    elif Path(source).is_dir():
        opened = open_folder(source, config, cache_dir)
    elif Path(source).exists():
        raise ValueError(f"{source} is a file; give the folder that holds the micrographs")
    else:
        raise ValueError(
            f"{source!r} is no folder here; give a folder, 'synthetic', 'hub:owner/name', 'hub-stream:owner/name', "
            "'damaged-alloys:FOLDER' or 'datasets:NAME_OR_PATH'"
        )
    if config.num_micrographs is not None and len(opened.entries) > config.num_micrographs:
        opened.ignored.append(f"{len(opened.entries) - config.num_micrographs} images beyond the first "
                              f"{config.num_micrographs}, as num_micrographs asks")  # fmt: skip
        opened.entries = opened.entries[: config.num_micrographs]
    return opened


def open_folder(folder, config, cache_dir):
    """List the images below a folder; folders and files that hold labels by their name are left out, and said."""
    folder = Path(folder)
    paths, num_labels, others, closed = [], Counter(), Counter(), []
    visited = set()  # folders reached through links may lead back
    for parent, folders, files in os.walk(folder, onerror=closed.append, followlinks=True):
        if os.path.realpath(parent) in visited:
            folders[:] = []
            continue
        visited.add(os.path.realpath(parent))
        relative = Path(parent).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        label_folder = next((part for part in relative.parts if LABEL_FOLDER.match(part)), None)
        for file in files:
            suffix = Path(file).suffix.lower()
            if file.startswith("."):
                continue
            if suffix in OTHER_MICROSCOPY:
                others[suffix] += 1
            elif suffix not in SUFFIXES:
                continue
            elif label_folder:
                num_labels[f"folder {label_folder}/"] += 1
            elif LABEL_FILE.search(Path(file).stem):
                num_labels["files named as labels"] += 1
            else:
                paths.append(relative / file)
    ignored = [
        f"{count} images in {where}: labels by their name" for where, count in num_labels.items()
    ]
    ignored += [
        f"{count} {suffix} files: not read; export them as TIFF" for suffix, count in others.items()
    ]
    ignored += [f"folder {error.filename}: {error.strerror}" for error in closed]
    if not paths:
        said = f" ({'; '.join(ignored)})" if ignored else ""
        raise ValueError(
            f"{folder} holds no TIFF, PNG, JPEG or BMP image{said}; give a folder of micrographs"
        )
    paths.sort(key=natural_key)
    hashes = hash_files([folder / path for path in paths], cache_dir)
    entries = []
    for path, key in zip(paths, hashes):
        name = path.as_posix().encode(errors="replace").decode()
        specimen = _specimen_of(Path(name), config.specimen_pattern)

        def read(path=folder / path, name=name, specimen=specimen):
            return read_micrograph(path, label_bar=config.label_bar, name=name, specimen=specimen)

        entries.append(Entry(name, key, read, specimen))
    return Source(folder.resolve().name, entries, ignored)


def _specimen_of(path, pattern):
    """Name the specimen of a file: by the pattern, or by the folder that it lies in; None where neither says."""
    if pattern is not None:
        match = re.search(pattern, path.as_posix())
        return (match.group(1) if match.re.groups else match.group()) if match else None
    parts = [part for part in path.parts[:-1] if not IMAGE_FOLDER.match(part)]
    return "/".join(parts) or None


def hash_files(paths, cache_dir):
    """Return a hash of each file's content; one whose path, size and time of change are known is not read again.

    A file changed in the last two seconds is not remembered, since a second change could leave its time as it is.
    An unreadable file hashes to the error, and is named when it is read.
    """
    memo_path = Path(cache_dir) / "file_hashes.json"
    try:
        memo = json.loads(memo_path.read_text())
    except (OSError, ValueError):
        memo = {}
    hashes, num_new = [], 0
    for path in paths:
        try:
            stat, key = path.stat(), str(path.resolve())
            known = memo.get(key)
            if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
                hashes.append(known[2])
                continue
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            hashes.append(digest)
            if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
                memo[key] = [stat.st_size, stat.st_mtime_ns, digest]
                num_new += 1
        except OSError as error:
            hashes.append(f"unreadable: {error.strerror}")
    if num_new:
        with suppress(
            OSError
        ):  # a memory only: where it cannot be written, the next start hashes again
            write_atomically(memo_path, json.dumps(memo).encode())
    return hashes


def open_synthetic(config):
    """List the micrographs of the embedded generator; the key holds its code, so that a change of it is a new source."""
    from em_data import synthetic

    num = config.num_micrographs or DEFAULT_NUM_SYNTHETIC
    size = config.micrograph_size
    code = b"".join(
        path.read_bytes() for path in sorted(Path(synthetic.__file__).parent.glob("synthetic*.py"))
    )
    code = hashlib.blake2b(code, digest_size=8).hexdigest()
    micrographs = Replayed(lambda: synthetic.synthesise_micrographs(num, config.seed, size))
    entries = [
        Entry(
            f"synthetic_{i:05d}",
            f"{code}-{config.seed}-{size}-{i}-of-{num}",
            lambda i=i: micrographs[i],
        )
        for i in range(num)
    ]
    return Source("synthetic", entries, [])


class Replayed:
    """Items of an iterator by rising number; asking for an earlier one starts it again."""

    def __init__(self, start):
        self.start, self.iterator, self.next = start, None, 0

    def __getitem__(self, i):
        if self.iterator is None or i < self.next:
            self.iterator, self.next = iter(self.start()), 0
        while True:
            item = next(self.iterator)
            self.next += 1
            if self.next == i + 1:
                return item
