"""Files and folders that are complete or absent, locks, and the cache. Imports nothing of ours."""

import errno
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import filelock

DAY = 86_400  # seconds
LOCK = ".lock"  # of a folder that one process at a time works in
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # some network disks
_without_locks: set[Path] = set()  # folders of which a message said so


class FullDiskError(OSError):
    """A file cannot be written since the disk or a quota is full."""

    def __init__(self, path, number: int = errno.ENOSPC):
        super().__init__(number, os.strerror(number), str(path))

    def __str__(self):
        return (
            f"{self.filename} cannot be written: {self.strerror}. What was saved before is whole. "
            "Free space and run the same command again."
        )


class NotAFolderError(NotADirectoryError):
    """A file is in the place of a folder."""

    def __init__(self, path):
        super().__init__(errno.ENOTDIR, "it is a file, but a folder is needed", str(path))

    def __str__(self):
        return (
            f"{self.filename} is a file, but a folder is needed. Choose another one, for instance "
            "with --out."
        )


def is_full_disk(error: BaseException) -> bool:
    """Say whether an error, also one of a library that writes by itself, means a full disk."""
    is_rust = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) in FULL or bool(is_rust and int(is_rust[1]) in FULL)


def find_cache_dir(cache_dir=None) -> Path:
    """Return the cache folder: the one given, or em-synthesis in the user's cache folder (XDG)."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "em-synthesis"


def make_folder_name(name: str) -> str:
    """Return a name that is safe as one folder: lower case, no separators, no dots at the start.

    A name that loses more than spaces and capitals gets a checksum, so that two stay two.
    """
    plain = str(name).lower().replace(" ", "-")
    safe = re.sub(r"[^\w.-]", "-", plain).lstrip(".-")[:80].rstrip(".")
    if safe and safe == plain:
        return safe
    return f"{safe or 'model'}-{hashlib.sha256(str(name).encode()).hexdigest()[:8]}"


def printable(name: str | Path) -> str:
    """Return the name of a file for people: control characters, and bytes without text, escaped."""
    text = str(name)
    if text.isprintable():
        return text
    undecoded = {chr(0xDC00 + byte): f"\\x{byte:02x}" for byte in range(0x80, 0x100)}
    escaped = (c if c.isprintable() else undecoded.get(c) or repr(c)[1:-1] for c in text)
    return "".join(escaped)


def write_atomically(path, data: bytes | str) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it.

    A reader, also after a power cut, sees the old file or the new one, whole.
    """
    path = Path(path)
    make_folder(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with name_full_disk(path), os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


@contextmanager
def name_full_disk(path) -> Iterator[None]:
    """Raise a lack of space during the block as `FullDiskError` with this path."""
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise FullDiskError(path, getattr(error, "errno", None) or errno.ENOSPC) from error


def flush_to_disk(path) -> None:
    """Flush a file, or the names in a folder, to the disk.

    Windows and some network disks cannot flush a folder.
    """
    is_folder = Path(path).is_dir()
    if os.name == "nt" and is_folder:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def flush_folder(folder) -> None:
    """Flush a folder with all that it holds to the disk."""
    for path in Path(folder).rglob("*"):
        flush_to_disk(path)
    flush_to_disk(folder)


def make_folder(path) -> None:
    """Make a folder and its missing parents; their names are flushed to the disk.

    Raises:
        NotAFolderError: A file has this name.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotAFolderError(path)
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush_to_disk(path.parent)


@contextmanager
def build_folder(folder) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` at the end, or is removed if the block raises.

    If another process has built `folder` in the meantime, theirs stays and ours is removed. Remains
    of killed builds that are older than a day are removed.
    """
    with _make_beside(folder, ".building-", DAY) as temporary:
        yield temporary
        flush_folder(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not Path(folder).is_dir():
                raise
        flush_to_disk(Path(folder).parent)


@contextmanager
def replace_folder(folder) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `folder` at the end.

    A kill or a power cut leaves the old folder, the new one or, for a moment, none: nothing half
    written.
    """
    folder = Path(folder)
    with _make_beside(folder, f".{folder.name}.", 0) as temporary:
        yield temporary
        flush_folder(temporary)
        old = temporary.with_name(f"{temporary.name}.old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        flush_to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _make_beside(folder, prefix, max_age):
    """Yield a new folder that does not outlive the block; remove remains older than `max_age` s."""
    parent = Path(folder).parent
    make_folder(parent)
    for remains in parent.glob(f"{prefix}*"):
        if remains.is_dir() and time.time() - remains.stat().st_mtime >= max_age:
            shutil.rmtree(remains, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        os.chmod(temporary, 0o777 & ~_UMASK)
        with name_full_disk(folder):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def lock(path, message: str | None = None) -> Iterator[None]:
    """Hold the lock file `path` for the block; the system releases it however the process ends.

    On a disk without file locks, the block runs without one, and a message says so.

    message: raise `ValueError` with this text where another process holds the lock. By default,
    wait for it.
    """
    path = Path(path)
    make_folder(path.parent)
    # a soft lock, which is a mere file, would outlive a killed process
    waiting = filelock.FileLock(path, timeout=-1 if message is None else 0, fallback_to_soft=False)
    try:
        held: AbstractContextManager[object] = waiting.acquire()
    except filelock.Timeout as error:
        raise ValueError(message) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _say_without_locks(path.parent)
        held = nullcontext()
    with held:
        yield


def _say_without_locks(folder: Path) -> None:
    if folder not in _without_locks:
        _without_locks.add(folder)
        print(
            f"The disk of {folder} has no file locks, so nothing keeps two processes from writing "
            "the same file. Start one at a time, or give each shard to one task only.",
            file=sys.stderr,
        )


@contextmanager
def leave_nothing_if_refused(folder, names: Collection[str]) -> Iterator[None]:
    """Remove what the block has written to `folder` if it raises before there is a result.

    Folders above that the block has made go as well. What was there before stays.

    Args:
        folder: Locked by its LOCK while something works in it.
        names: Files that are no result. If the block has written others, all stays.
    """
    folder = Path(folder)
    before = {*folder.rglob("*")}
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        new = sorted({*folder.rglob("*")} - before, reverse=True)  # a folder after what it holds
        is_made = bool(new) or (bool(missing) and folder.is_dir())
        if is_made and all(each.is_dir() or each.name in {LOCK, *names} for each in new):
            with suppress(OSError, ValueError):  # another process has begun to work there
                _remove(new, folder / LOCK, before)
                for each in missing:
                    each.rmdir()
        raise


def _remove(paths, path, before):
    """Remove files and folders under a lock, which goes as well unless it was there before."""
    with lock(path, "in use"):
        for each in paths:
            if each.is_dir():
                each.rmdir()
            elif each != path:
                each.unlink()
        if path not in before:
            with suppress(OSError):  # Windows removes it on release
                path.unlink()


_UMASK = os.umask(0)
os.umask(_UMASK)
