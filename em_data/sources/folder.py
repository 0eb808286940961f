"""A folder of image files as a source."""

import hashlib
import json
import os
import re
import stat
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from em_data.files import printable, write_atomically
from em_data.formats.microscopes import find_companions
from em_data.reading import read_micrographs
from em_data.sources.base import Entry, Source
from em_data.sources.listing import list_images

IMAGE_FOLDER = re.compile(r"^(images?|imgs?|micrographs?|data|raw)$", re.IGNORECASE)
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
        files = {path: [folder / path, *find_companions(folder / path)] for path in paths}
        hashes = iter(hash_files([each for group in files.values() for each in group], cache_dir))
        keys = ["+".join(next(hashes) for _ in group) for group in files.values()]
    entries = []
    for path, key in zip(paths, keys):
        name = printable(path.as_posix())
        specimen = find_specimen(Path(name), config.specimen_pattern)

        frames = partial(
            read_micrographs,
            folder / path,
            label_bar=config.label_bar,
            name=name,
            specimen=specimen,
            frame_step=config.frame_step,
        )
        entries.append(Entry(name, key, frames, specimen, group_of(name)))
    return Source(folder.resolve().name, entries, ignored)


def group_of(name: str) -> str:
    """Return what files of one acquisition share: TIA writes each channel to NAME_1.ser and on."""
    return re.sub(r"_\d+\.ser$", ".ser", name, flags=re.IGNORECASE)


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
    seconds is not remembered. The hash of a file that cannot be read is the reason. Pipes and
    devices are not opened.
    """
    memo_path = Path(cache_dir) / "file_hashes.json"
    try:
        memo = json.loads(memo_path.read_text())
    except (OSError, ValueError):
        memo = {}
    hashes, is_changed, real_folders = [], False, {}
    for path in paths:
        parent, file = os.path.split(path)
        if parent not in real_folders:
            real_folders[parent] = os.path.realpath(parent)
        name = os.path.join(real_folders[parent], file)
        try:
            status = os.stat(path)
            known = memo.get(name)
            if known and known[:2] == [status.st_size, status.st_mtime_ns]:
                hashes.append(known[2])
                continue
            if not stat.S_ISREG(status.st_mode):
                hashes.append("not a regular file")
                continue
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16))
            hashes.append(digest.hexdigest())
            if time.time_ns() - status.st_mtime_ns > FRESH_NS:
                memo[name] = [status.st_size, status.st_mtime_ns, hashes[-1]]
                is_changed = True
        except OSError as error:
            hashes.append(f"unreadable: {error.strerror}")
    if is_changed:
        with suppress(OSError):  # without the file the next start hashes again
            write_atomically(memo_path, json.dumps(memo))
    return hashes
