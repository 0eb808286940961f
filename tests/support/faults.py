"""Power cuts, kills and full disks at any moment of a block of code, without root.

An audit hook sees every file that Python opens for writing, renames or removes, in whatever
library. `os.fsync`, the flush of a memory map and what opens files in Rust (safetensors) and C++
(pyarrow) are wrapped.
"""

import errno
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow
import safetensors.torch

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NAMES = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0}  # the path that changes
_watchers: list = []
_hook_is_set = False
_lock = threading.RLock()


class Watcher:
    """Is told of every change below `root`, by number, before it happens and after a flush."""

    def __init__(self, root: Path):
        self.root, self.count = Path(root).resolve(), 0

    def before(self, kind: str, path: Path) -> None:
        """A change comes: kind is "open", "fsync" or one of `NAMES`."""
        self.count += 1

    def victim(self, stat: os.stat_result) -> None:
        """A name of this file or folder goes."""

    def flushed(self, path: Path) -> None:
        """A file or folder is on the disk."""


class Count(Watcher):
    """Only counts."""


class Kill(Watcher):
    """Kills this process before change number `at`."""

    def __init__(self, root: Path, at: int):
        super().__init__(root)
        self.at = at

    def before(self, kind, path):
        super().before(kind, path)
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class FullDisk(Watcher):
    """From change number `at` on, nothing can be made or flushed; names still go and change."""

    def __init__(self, root: Path, at: int):
        super().__init__(root)
        self.at = at

    def before(self, kind, path):
        super().before(kind, path)
        if self.count >= self.at and kind in ("open", "fsync", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class PowerCuts(Watcher):
    """Keeps what a power cut would leave before each change, as folders below `states`.

    Content is on the disk once its file was flushed, names once their folder was. What was not
    flushed is kept or lost as the worst, the mildest or a random file system would:

    - "names": names are as they were last flushed.
    - "content": names are as they are now, content that was not flushed is gone: empty files.
    - "mixed": each folder and each file by lot.

    Args:
        every: keep the states before every so many changes.
    """

    KINDS = ("names", "content", "mixed")

    def __init__(self, root: Path, states: Path, every: int = 1, seed: int = 0):
        super().__init__(root)
        self.states, self.every, self.rng = Path(states), every, random.Random(seed)
        self._ids: dict[int, int] = {}  # inode -> a number that is never used again
        self._content: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        for path in [self.root, *self.root.rglob("*")]:
            self.flushed(path)

    def before(self, kind, path):
        super().before(kind, path)
        if self.count % self.every == 0:
            self.keep(f"{self.count:04d}-{kind}")

    def keep(self, name: str) -> None:
        """Write what a power cut would leave now to `states`/`name`-KIND."""
        for kind in self.KINDS:
            self._write(self._id(self.root.stat()), self.root, self.states / f"{name}-{kind}", kind)

    def victim(self, stat):
        self._ids.pop(stat.st_ino, None)

    def flushed(self, path):
        if not path.exists():
            return
        number = self._id(path.stat())
        if path.is_dir():
            self._names[number] = {each.name: self._id(each.stat()) for each in path.iterdir()}
            for each in path.iterdir():
                if each.is_dir():
                    self._names.setdefault(self._id(each.stat()), {})
        else:
            self._content[number] = path.read_bytes()

    def _id(self, stat) -> int:
        number = self._ids.get(stat.st_ino)
        if number is None:
            number = self._ids[stat.st_ino] = self._next = getattr(self, "_next", 0) + 1
        return number

    def _write(self, number: int, now: Path | None, target: Path, kind: str) -> None:
        """Write a file or folder as a power cut would leave it; `now` is None if it is gone."""
        is_folder = number in self._names or (now is not None and now.is_dir())
        old = kind == "names" or (kind == "mixed" and self.rng.random() < 0.5)
        if not is_folder:
            saved = self._content.get(number, b"")
            target.write_bytes(now.read_bytes() if kind == "mixed" and not old and now else saved)
            return
        target.mkdir(parents=True)
        current = {}
        if now is not None:
            current = {each.name: (self._id(each.stat()), each) for each in now.iterdir()}
        paths = dict(current.values())
        if old or now is None:
            names = self._names.get(number, {})
            current = {name: (each, paths.get(each)) for name, each in names.items()}
        for name, (each, path) in current.items():
            self._write(each, path, target / name, kind)


@contextmanager
def watch(watcher: Watcher):
    """Tell `watcher` of all changes below its root during the block."""
    global _hook_is_set
    if not _hook_is_set:
        sys.addaudithook(_see)
        _hook_is_set = True
    fsync, flush = os.fsync, np.memmap.flush

    def fsync_seen(descriptor):
        path = _find(watcher.root, os.fstat(descriptor))
        with _lock:
            if path is not None:
                _tell("fsync", path)
            fsync(descriptor)
            if path is not None:
                watcher.flushed(path)

    def flush_seen(array):
        flush(array)
        if array.filename is not None and _is_below(array.filename, watcher.root):
            with _lock:
                watcher.flushed(Path(array.filename))

    serialize, open_file = safetensors.torch.serialize_file, pyarrow.OSFile

    def serialize_seen(tensors, path, *arguments, **options):
        try:
            _see("open", (path, "wb", 0))
        except OSError as error:
            raise safetensors.SafetensorError(
                f"Error while serializing: I/O error: No space left on device (os error 28): {path}"
            ) from error
        return serialize(tensors, path, *arguments, **options)

    def open_file_seen(path, mode="r", **options):
        _see("open", (path, mode, 0))
        return open_file(path, mode, **options)

    os.fsync, np.memmap.flush = fsync_seen, flush_seen
    safetensors.torch.serialize_file, pyarrow.OSFile = serialize_seen, open_file_seen
    _watchers.append(watcher)
    try:
        yield watcher
    finally:
        _watchers.remove(watcher)
        os.fsync, np.memmap.flush = fsync, flush
        safetensors.torch.serialize_file, pyarrow.OSFile = serialize, open_file


def _see(event: str, arguments: tuple) -> None:
    if not _watchers or (event != "open" and event not in NAMES):
        return
    if event == "open":
        path, mode, flags = arguments
        is_write = (flags or 0) & WRITES or any(each in (mode or "") for each in "wax+")
        if not is_write or not isinstance(path, str | bytes | os.PathLike):
            return
        paths, folders = [path], [-1]
    else:
        which = NAMES[event] + 1
        paths, folders = list(arguments[:which]), [-1] * which
        if event in ("os.remove", "os.rmdir"):
            folders = [arguments[1]]
        elif event == "os.rename":
            folders = list(arguments[2:4])
    folder = None if folders[-1] in (-1, None) else folders[-1]
    path = Path(os.fsdecode(paths[-1]))
    if folder is not None and not path.is_absolute():
        path = Path(os.readlink(f"/proc/self/fd/{folder}")) / path
    if not _is_below(path, _watchers[-1].root):
        return
    with _lock:
        _tell(event, path)
        if event in ("os.rename", "os.remove", "os.rmdir"):
            with suppress(FileNotFoundError):
                for watcher in _watchers:
                    watcher.victim(os.lstat(path))


def _tell(kind: str, path: Path) -> None:
    """Call the watchers; what they do themselves is not seen."""
    active, _watchers[:] = list(_watchers), []
    try:
        for watcher in active:
            watcher.before(kind, path)
    finally:
        _watchers[:] = active


def _is_below(path, root: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(root)


def _find(root: Path, stat: os.stat_result) -> Path | None:
    """Return the path of an open file or folder; None if it lies elsewhere."""
    for path in [root, *root.rglob("*")]:
        with suppress(FileNotFoundError):
            if os.path.samestat(path.lstat(), stat):
                return path
    return None


def list_states(root: Path, work: Callable[[], object], states: Path, every: int = 1) -> list[Path]:
    """Do the work under `PowerCuts` and return the states that it would have left, in order.

    The last ones are those after the work.
    """
    with watch(PowerCuts(root, states, every)) as cuts:
        work()
    cuts.keep(f"{cuts.count + 1:04d}-end")
    return sorted(states.iterdir())


def replace_by(folder: Path, state: Path) -> None:
    """Put a state in the place of `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(state, folder)
