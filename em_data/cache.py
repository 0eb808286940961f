"""Files and folders that are there whole or not at all."""

import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path


def find_cache_dir(cache_dir=None):
    """Return the folder of cached tiles: the one given, or em-synthesis in the user's cache folder (XDG)."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "em-synthesis"


def write_atomically(path, data):
    """Write bytes to a file, under another name until it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def build_folder(folder):
    """Yield a temporary folder that becomes `folder` at the end, or is removed if the block raises.

    If another process has built `folder` in the meantime, theirs stays and ours is removed. Remains of killed builds that
    are older than a day are swept away.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for remains in folder.parent.glob(".building-*"):
        if time.time() - remains.stat().st_mtime > 86_400:
            shutil.rmtree(remains, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_UMASK)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_UMASK = os.umask(0)
os.umask(_UMASK)
