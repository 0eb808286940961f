"""Which files of a folder are micrographs, by their names, kinds and first bytes."""

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from em_data.files import printable
from em_data.formats.microscopes import find_companions
from em_data.reading import SUFFIXES, natural_key
from em_data.sources.file_types import (
    LABEL_FILE,
    LABEL_FOLDER,
    LFS_START,
    NOT_DATA,
    NOT_IMAGES,
    NOT_READ,
    is_picture,
)
from em_data.sources.paired_labels import find_paired_labels
from em_data.split import name_some

START_BYTES = 512  # that tell what a file of an unknown suffix is
BY_NAME = "labels by their name"
LABEL_TEXTS = re.compile(r"\.(txt|json|jsonl|csv|tsv|ya?ml|xml|names|labels)")
PAIRED = "images are labels, by the name and the size of a micrograph: {}"
POINTER_BYTES = 1024  # a pointer of Git LFS is smaller


@dataclass
class Listing:
    """What a folder holds. All paths are relative to it.

    Attributes:
        paths: Its images, in natural order.
        labels: Images that are labels by their names.
        files: Other files that may hold labels or classes.
        left_out: {reason: files that are not read}.
        closed: Sentences on folders that cannot be opened.
    """

    paths: list[Path]
    labels: list[Path]
    files: list[Path]
    left_out: dict[str, list[Path]]
    closed: list[str]

    def describe_ignored(self, used: Iterable[Path] = ()) -> list[str]:
        """Return a sentence per reason for which files are not used; `used` are used as labels."""
        used = set(used)
        rest = {why: sorted(set(names) - used) for why, names in self.left_out.items()}
        return [_say(why, names) for why, names in rest.items() if names] + self.closed


def list_images(folder) -> Listing:
    """List the images below a folder, its labels, and what is left out.

    Files without a known suffix are images if they begin like one. Pipes, sockets and devices are
    never opened.

    Raises:
        ValueError: There is no image.
    """
    folder, paths, labels, others, left_out = Path(folder), [], [], [], {}
    closed, visited = [], set()
    for parent, folders, files in os.walk(folder, onerror=closed.append, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link may lead back
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not NOT_DATA.fullmatch(name))
        relative = Path(parent).relative_to(folder)
        for name in folders:
            if suffix_of(name) in NOT_READ:
                left_out.setdefault(_say_not_read(suffix_of(name)), []).append(relative / name)
        folders[:] = [name for name in folders if suffix_of(name) not in NOT_READ]
        for file in (name for name in files if not NOT_DATA.fullmatch(name)):
            reason = _find_reason(os.path.join(parent, file), relative / file)
            if reason is None:
                paths.append(relative / file)
            elif reason:
                left_out.setdefault(reason, []).append(relative / file)
                if BY_NAME in reason:
                    labels.append(relative / file)
            elif LABEL_TEXTS.fullmatch(suffix_of(file)):
                others.append(relative / file)
    used = {each for path in paths for each in find_companions(folder / path)}
    paths = [path for path in paths if folder / path not in used]
    paired = set(find_paired_labels(folder, paths))
    if paired:
        paths = [path for path in paths if path not in paired]
        left_out[PAIRED] = sorted(paired)
    left_out = {
        why: [n for n in names if folder / n not in used] for why, names in left_out.items()
    }
    listing = Listing(
        sorted(paths, key=natural_key),
        sorted([*labels, *paired], key=natural_key),
        sorted(others, key=natural_key),
        left_out,
        [f"folder {printable(error.filename)}: {error.strerror}" for error in closed],
    )
    if not paths:
        ignored = listing.describe_ignored()
        also = f" ({'; '.join(ignored)})" if ignored else ""
        raise ValueError(
            f"{folder} holds no TIFF, PNG, JPEG or BMP image and no file of a microscope{also}. "
            "Give a folder of images."
        )
    return listing


def suffix_of(name) -> str:
    return os.path.splitext(name)[1].lower()


def _find_reason(path, relative) -> str | None:
    """Return why a file is left out, "" if it is no data, and None if it is read."""
    suffix = suffix_of(path)
    try:
        status = os.stat(path)
    except OSError:  # a link that leads nowhere: the reader says so
        return None if suffix in SUFFIXES else ""
    if not stat.S_ISREG(status.st_mode):
        return "pipes, sockets or devices, which are never read: {}"
    if NOT_IMAGES.fullmatch(suffix):
        return ""
    if suffix in NOT_READ and not (suffix == ".map" and is_picture(_read_start(path))):
        return _say_not_read(suffix)
    if suffix not in SUFFIXES:
        start = _read_start(path)
        if not is_picture(start):
            return _say_not_read(suffix) if b"\0" in start else ""
    elif status.st_size < POINTER_BYTES and _read_start(path).startswith(LFS_START):
        return "pointers of Git LFS, not the images themselves: run git lfs pull in their folder"
    for part in relative.parts[:-1]:
        if LABEL_FOLDER.match(part):
            return f"images in folder {printable(part)}/: {BY_NAME}"
    if LABEL_FILE.search(relative.stem):
        return f"images in files named as labels: {BY_NAME}"
    return None


def _read_start(path):
    try:
        with open(path, "rb") as file:
            return file.read(START_BYTES)
    except OSError:
        return b""


def _say_not_read(suffix):
    what = NOT_READ.get(suffix, "not read. If they are images, export them as TIFF.")
    kind = f"{printable(suffix)} files" if suffix else "binary files without a suffix"
    return f"{kind}: {what}"


def _say(reason, names):
    some = name_some([printable(name) for name in names], 5)
    return f"{len(names)} {reason.replace('{}', some)}"
