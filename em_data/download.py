"""Download files: resumed where they stopped, checked, and complete or absent."""

import contextlib
import hashlib
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from em_data.files import flush_to_disk, lock

NUM_TRIES = 3
TIMEOUT = 30.0  # seconds without an answer before a connection counts as broken
IS_FINAL = (401, 403, 404)  # status codes that another try does not change


def download_file(
    url, path, *, num_bytes=None, sha256=None, sha512=None, num_tries=NUM_TRIES
) -> None:
    """Download a file; `path` appears when it is complete and checked.

    The bytes are collected in `path`.part, under a lock on the folder.
    An interrupted download goes on where it stopped if the server still has the same file
    (`If-Range` with its ETag). A file that exists and matches is not downloaded again.

    Args:
        url: Address, http or https.
        path: File to write. Its folder is made if needed.
        num_bytes: Expected length.
        sha256, sha512: Expected digests, hexadecimal. The first digits are enough.
        num_tries: Number of connections before giving up.

    Raises:
        ConnectionError: The file cannot be downloaded.
        ValueError: The content does not match.
    """
    path = Path(path)
    part, etag_file = (path.with_name(path.name + suffix) for suffix in (".part", ".etag"))
    expected = {"num_bytes": num_bytes, "sha256": sha256, "sha512": sha512}

    def is_done():
        return path.is_file() and find_mismatch(path, **expected) is None

    if is_done():
        return
    with lock(path.parent / ".download.lock"):
        if is_done():  # by another process
            return
        _fetch_part(url, part, etag_file, num_tries)
        mismatch = find_mismatch(part, **expected)
        etag_file.unlink(missing_ok=True)
        if mismatch is not None:
            part.unlink()
            raise ValueError(f"{url} has {mismatch}: it was damaged or replaced. Try again.")
        flush_to_disk(part)
        os.replace(part, path)


def find_mismatch(path, *, num_bytes=None, sha256=None, sha512=None) -> str | None:
    """Return in which way a file is not the expected one, or None if it is."""
    size = Path(path).stat().st_size
    if num_bytes is not None and size != num_bytes:
        return f"{size} bytes, not {num_bytes}"
    for algorithm, expected in (("sha256", sha256), ("sha512", sha512)):
        if expected is not None:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, algorithm).hexdigest()
            if not digest.startswith(expected.lower()):
                return f"{algorithm.upper().replace('A', 'A-')} {digest}, not {expected}"
    return None


def _fetch_part(url, part, etag_file, num_tries):
    for left in reversed(range(num_tries)):
        try:
            _fetch(url, part, etag_file)
            return
        except OSError as error:  # urllib's errors are OSErrors
            if not left or getattr(error, "code", None) in IS_FINAL:
                raise ConnectionError(
                    f"cannot download {url} ({error}). Run the same command again to go on where "
                    "it stopped."
                ) from error


def _fetch(url, part, etag_file):
    """Append to `part` what it lacks, or start again if the server's file is another one."""
    request = urllib.request.Request(url)
    offset = part.stat().st_size if part.is_file() and etag_file.is_file() else 0
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", etag_file.read_text())
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not offset:  # 416: the range starts beyond the end
            raise
        part.unlink()
        return _fetch(url, part, etag_file)
    with contextlib.closing(response):
        if response.status != 206:
            offset = 0
            etag_file.unlink(missing_ok=True)
            if (etag := response.headers.get("ETag")) and not etag.startswith("W/"):
                etag_file.write_text(etag)
        length = response.headers.get("Content-Length")
        total = None if length is None else offset + int(length)
        bar = {"total": total, "initial": offset, "desc": part.stem, "leave": False}
        with (
            open(part, "ab" if offset else "wb") as file,
            tqdm.wrapattr(response, "read", **bar) as body,
        ):
            shutil.copyfileobj(body, file, 2**20)
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"connection closed after {part.stat().st_size} of {total} bytes")
