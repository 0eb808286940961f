"""Weights of feature networks: a file that the user names, or one download into the user's own cache."""

import fcntl
import hashlib
import os
import urllib.error
from dataclasses import dataclass
from pathlib import Path

from em_data.download import fetch
from em_data.files import find_cache_dir


@dataclass(frozen=True)
class WeightsFile:
    """Where a network's weights come from; `sha256` is the whole digest or its first digits, as far as it is published."""

    url: str
    filename: str
    sha256: str | None = None


INCEPTION_WEIGHTS = {
    # TorchScript translation of the TensorFlow network of the FID paper, the one that clean-fid's mode `clean` uses
    "clean": WeightsFile(
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "inception-2015-12-05.pt",
    ),
    # the same network as a state dict, the one that pytorch-fid and clean-fid's mode `legacy_pytorch` use
    "legacy_pytorch": WeightsFile(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
}


def sha256_of(path) -> str:
    """Return the hexadecimal SHA-256 digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_weights(source: WeightsFile, given=None, cache_dir=None, log=print) -> Path:
    """Return the path of a network's weights: `given` where there is one, else the cached copy, else a download.

    `ValueError` where `given` is not a file, `ConnectionError` where the download is impossible; both name the way out.
    """
    if given is not None:
        if not Path(given).is_file():
            raise ValueError(f"--weights {given}: no such file; give a local copy of {source.url}")
        return Path(given)
    path = find_cache_dir(cache_dir) / "weights" / source.filename
    if not path.is_file():
        log(f"downloading {source.url} to {path}")
        download(source, path)
    return path


def download(source: WeightsFile, path, timeout: float = 30.0) -> None:
    """Download `source.url` to `path`: an interrupted download goes on where it stopped, and `path` only appears whole.

    The bytes gather in `path` + `.part` under a lock, so that two processes do not write one file; they are resumed
    only where the server still serves the same entity (`If-Range` on its ETag), checked against the length that the
    server states and against `source.sha256` (all or its first digits), and renamed at the end.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, etag_file = (path.with_name(path.name + suffix) for suffix in (".part", ".etag"))
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():  # another process was faster
            return
        try:
            fetch(source.url, part, etag_file, timeout)
        except (urllib.error.URLError, OSError) as error:
            raise ConnectionError(
                f"cannot download {source.url} ({error}). Without a network: fetch it elsewhere and pass the file with --weights, "
                f"put it at {path}, or use the extractor efficientnet-lite0, whose weights come with the package."
            ) from error
        digest = sha256_of(part)
        if source.sha256 is not None and not digest.startswith(source.sha256):
            part.unlink()
            raise ValueError(
                f"{source.url} has SHA-256 {digest}, expected {source.sha256}: the download was damaged or replaced; "
                "try again, or pass the right file with --weights"
            )
        os.replace(part, path)
        etag_file.unlink(missing_ok=True)
