"""Files over HTTPS into a folder: resumed where they stopped, checked, and there whole or not at all."""

import contextlib
import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

NUM_TRIES = 3


def download_file(url, path, *, num_bytes=None, sha512=None, timeout=30.0) -> None:
    """Download `url` to `path`; an interrupted download goes on by Range where it stopped, `path` only appears whole.

    The bytes gather in `path` + ".part", which is resumed only where the server still serves the same entity (`If-Range`
    on its ETag). num_bytes, sha512 (hexadecimal): checked before the file gets its name. A file that is there with
    the right length and SHA-512, as far as they are given, is kept. `ConnectionError` after three broken
    connections, `ValueError` for content that does not match.
    """
    path = Path(path)
    is_whole = path.is_file() and (num_bytes is None or path.stat().st_size == num_bytes)
    if is_whole and (sha512 is None or _sha512_of(path) == sha512.lower()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part, etag_file = (path.with_name(path.name + suffix) for suffix in (".part", ".etag"))
    for left in reversed(range(NUM_TRIES)):
        try:
            fetch(url, part, etag_file, timeout)
            break
        except (urllib.error.URLError, OSError) as error:
            given_up = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404)
            if given_up or not left:
                raise ConnectionError(
                    f"cannot download {url} ({error}); run the same command again to go on where it stopped"
                ) from error
    size = part.stat().st_size
    digest = None if sha512 is None else _sha512_of(part)
    if (num_bytes is not None and size != num_bytes) or (
        digest is not None and digest != sha512.lower()
    ):
        part.unlink()
        etag_file.unlink(missing_ok=True)
        what = (
            f"{size} bytes, not {num_bytes}"
            if num_bytes not in (None, size)
            else f"SHA-512 {digest}, not {sha512}"
        )
        raise ValueError(
            f"{url} has {what}: damaged or replaced on the way; run the same command again"
        )
    os.replace(part, path)
    etag_file.unlink(missing_ok=True)


def _sha512_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha512").hexdigest()


def fetch(url, part, etag_file, timeout) -> None:
    """Append what `part` lacks of `url`, or begin again where the server does not serve the entity of `etag_file` any more."""
    request = urllib.request.Request(url)
    offset = part.stat().st_size if part.is_file() and etag_file.is_file() else 0
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", etag_file.read_text())
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not offset:  # a range beyond the end: begin again
            raise
        part.unlink()
        offset, response = 0, urllib.request.urlopen(url, timeout=timeout)
    with contextlib.closing(response):
        if response.status != 206:
            offset = 0
            etag_file.unlink(missing_ok=True)
            if (etag := response.headers.get("ETag")) and not etag.startswith("W/"):
                etag_file.write_text(etag)
        expected = response.headers.get("Content-Length")
        total = offset + int(expected) if expected is not None else None
        bar = tqdm(
            total=total, initial=offset, unit="B", unit_scale=True, desc=part.stem, leave=False
        )
        with open(part, "ab" if offset else "wb") as file, bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"connection closed after {part.stat().st_size} of {total} bytes")
