"""A folder of image files as a source."""

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path, PurePath

from em_data.files import printable, write_atomically
from em_data.formats.microscopes import find_companions
from em_data.labels.find import find_classes, find_labels
from em_data.labels.label_set import attach_labels
from em_data.reading import read_micrographs
from em_data.series import drop_time_folders
from em_data.sources.base import Entry, Source
from em_data.sources.listing import list_images

IMAGE_FOLDER = re.compile(r"^(images?|imgs?|micrographs?|data|raw)$", re.IGNORECASE)
LABELS_FORMAT = 1  # of what is read from files of labels; a change makes cached tiles invalid
FRESH_NS = 2_000_000_000  # a file changed so recently may change again within its time stamp


def open_folder(folder, config, cache_dir=None) -> Source:
    """List the images below a folder, with their labels and classes.

    Images that are labels by their name are left out.

    The first start reads every byte of the images to hash them, which takes minutes for large data.
    Later starts read only files that changed.

    Without a folder for the hashes, `cache_dir`, the entries have their paths as keys.
    """
    folder = Path(folder)
    listing = list_images(folder)
    paths, files = listing.paths, listing.files
    labels, notes, named = find_labels(
        folder, paths, listing.labels, files, config.labels, config.masks
    )
    classes, where, said = find_classes(folder, paths, files, config.classes)
    label_files = labels.files if labels else {}
    ignored = listing.describe_ignored(named)
    ignored += dict.fromkeys([*notes, *(labels.notes if labels else ()), *said])
    entries = []
    for path, key in zip(paths, _make_keys(folder, paths, labels, classes, cache_dir)):
        name = printable(path.as_posix())
        specimen = find_specimen(Path(name), config.specimen_pattern)
        read = partial(
            read_micrographs,
            folder / path,
            label_bar=config.label_bar,
            name=name,
            specimen=specimen,
            frame_step=config.frame_step,
        )
        frames: Callable = read
        if path in label_files or path in classes:
            fails = config.on_bad_image == "fail"
            frames = partial(_Labelled, read, path, labels, classes.get(path), fails)
        entries.append(Entry(name, key, frames, specimen, group_of(name)))
    found = labels.describe() if labels else ""
    return Source(folder.resolve().name, entries, ignored, found, where)


def _make_keys(folder, paths, labels, classes, cache_dir):
    """Return what identifies the content of each image with its labels and its class."""
    if cache_dir is None:
        return [str(path) for path in paths]
    label_files = labels.files if labels else {}
    files = {
        path: [path, *(each.relative_to(folder) for each in find_companions(folder / path))]
        for path in paths
    }
    every = list(dict.fromkeys(chain(*files.values(), *label_files.values())))
    hashes = dict(zip(every, hash_files([folder / each for each in every], cache_dir)))
    keys = []
    for path, group in files.items():
        key = "+".join(hashes[each] for each in group)
        if path in label_files:
            parts = [hashes[each] for each in label_files[path]]
            key += f" labels {LABELS_FORMAT} {labels.form} {labels.recipe} {'+'.join(parts)}"
        keys.append(key + (f" class {classes[path]}" if path in classes else ""))
    return keys


class _Labelled:
    """Iterates over the micrographs of a file, adds labels, and goes on after a refused frame."""

    def __init__(self, read, path, labels, class_name, fails):
        self.frames, self.path, self.labels = read(), path, labels
        self.class_name, self.fails = class_name, fails

    def __iter__(self):
        return self

    def __next__(self):
        micrograph = next(self.frames)
        micrograph.class_name = self.class_name
        if self.labels is not None:
            attach_labels(self.labels, self.path, micrograph, self.fails)
        return micrograph


def group_of(name: str) -> str:
    """Return what files of one acquisition share: TIA writes each channel to NAME_1.ser and on."""
    return re.sub(r"_\d+\.ser$", ".ser", name, flags=re.IGNORECASE)


def find_specimen(path: PurePath, pattern: str | None) -> str | None:
    """Return the specimen of a file: by the pattern, or by default the folder that it lies in.

    Folders that only tell when a frame was recorded count as part of the folder above.
    """
    if pattern is not None:
        match = re.search(pattern, path.as_posix())
        return (match.group(1) if match.re.groups else match.group()) if match else None
    parts = [part for part in drop_time_folders(path) if not IMAGE_FOLDER.match(part)]
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
