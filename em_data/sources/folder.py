"""A folder of image files as a source."""

import hashlib
import json
import os
import re
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

from em_data.files import write_atomically
from em_data.formats.microscopes import NOT_MICROGRAPHS
from em_data.reading import SUFFIXES, natural_key, read_micrographs
from em_data.sources.base import Entry, Source

LABEL_WORDS = r"(masks?|labels?|annotations?|annotated|ground[-_ ]?truth|gt|segmentations?)"
LABEL_FOLDER = re.compile(rf"^{LABEL_WORDS}(\d*|[-_ ].*)$", re.IGNORECASE)
LABEL_FILE = re.compile(rf"[-_ .]{LABEL_WORDS}\d*$", re.IGNORECASE)
IMAGE_FOLDER = re.compile(r"^(images?|imgs?|micrographs?|data|raw)$", re.IGNORECASE)
OTHER_MICROSCOPY = re.compile(r"\.(np[yz]|gif|webp)")
FRESH_NS = 2_000_000_000  # a file changed so recently may change again within its time stamp


def open_folder(folder, config, cache_dir=None) -> Source:
    """List the images below a folder. Images that are labels by their name are left out.

    The first start reads every byte of the images to hash them, which takes minutes for large data.
    Later starts read only files that changed.

    Without a folder for the hashes, `cache_dir`, the entries have their paths as keys.
    """
    folder = Path(folder)
    paths, ignored = list_images(folder)
    keys = [str(path) for path in paths]
    if cache_dir is not None:
        keys = hash_files([folder / path for path in paths], cache_dir)
    entries = []
    for path, key in zip(paths, keys):
        name = path.as_posix().encode(errors="replace").decode()
        specimen = find_specimen(Path(name), config.specimen_pattern)

        frames = partial(
            read_micrographs,
            folder / path,
            label_bar=config.label_bar,
            name=name,
            specimen=specimen,
        )
        entries.append(Entry(name, key, frames, specimen))
    return Source(folder.resolve().name, entries, ignored)


def list_images(folder) -> tuple[list[Path], list[str]]:
    """Return the images below a folder, relative to it and in natural order, and what is left out.

    Raises:
        ValueError: There is no image.
    """
    paths, left_out = [], Counter()
    closed, visited = [], set()
    for parent, folders, files in os.walk(folder, onerror=closed.append, followlinks=True):
        if os.path.realpath(parent) in visited:  # a link may lead back
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(parent).relative_to(folder)
        label_folder = next((part for part in relative.parts if LABEL_FOLDER.match(part)), None)
        for file in (name for name in files if not name.startswith(".")):
            suffix = Path(file).suffix.lower()
            if OTHER_MICROSCOPY.fullmatch(suffix):
                reason = f"{suffix} files: not read. Export them as TIFF."
            elif suffix in NOT_MICROGRAPHS:
                reason = f"{suffix} files: {NOT_MICROGRAPHS[suffix]}, not micrographs"
            elif suffix not in SUFFIXES:
                continue
            elif label_folder:
                reason = f"images in folder {label_folder}/: labels by their name"
            elif LABEL_FILE.search(Path(file).stem):
                reason = "images in files named as labels: labels by their name"
            else:
                paths.append(relative / file)
                continue
            left_out[reason] += 1
    ignored = [f"{num} {reason}" for reason, num in left_out.items()]
    ignored += [f"folder {error.filename}: {error.strerror}" for error in closed]
    if not paths:
        also = f" ({'; '.join(ignored)})" if ignored else ""
        raise ValueError(
            f"{folder} holds no TIFF, PNG, JPEG or BMP image and no file of a microscope{also}. "
            "Give a folder of images."
        )
    return sorted(paths, key=natural_key), ignored


def find_specimen(path: Path, pattern: str | None) -> str | None:
    """Return the specimen of a file: by the pattern, or by default the folder that it lies in."""
    if pattern is not None:
        match = re.search(pattern, path.as_posix())
        return (match.group(1) if match.re.groups else match.group()) if match else None
    parts = [part for part in path.parts[:-1] if not IMAGE_FOLDER.match(part)]
    return "/".join(parts) or None


def hash_files(paths, cache_dir) -> list[str]:
    """Return a hash of the content of each file.

    Hashes are remembered by path, size and time of change. A file that changed within the last two
    seconds is not remembered. The hash of an unreadable file is the error.
    """
    memo_path = Path(cache_dir) / "file_hashes.json"
    try:
        memo = json.loads(memo_path.read_text())
    except (OSError, ValueError):
        memo = {}
    hashes, is_changed = [], False
    for path in paths:
        try:
            stat, name = path.stat(), str(path.resolve())
            known = memo.get(name)
            if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
                hashes.append(known[2])
                continue
            hashes.append(hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest())
            if time.time_ns() - stat.st_mtime_ns > FRESH_NS:
                memo[name] = [stat.st_size, stat.st_mtime_ns, hashes[-1]]
                is_changed = True
        except OSError as error:
            hashes.append(f"unreadable: {error.strerror}")
    if is_changed:
        with suppress(OSError):  # without the file the next start hashes again
            write_atomically(memo_path, json.dumps(memo))
    return hashes
