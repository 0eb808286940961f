"""Weights of feature networks: a file that the user names, or one download into the cache."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from em_data.download import download_file
from em_data.files import find_cache_dir


@dataclass(frozen=True)
class WeightsFile:
    """A network's published weights; sha256: the digest or its first digits, if published."""

    url: str
    filename: str
    sha256: str | None = None


INCEPTION_WEIGHTS = {
    # the FID paper's network as TorchScript, for clean-fid's mode `clean`
    "clean": WeightsFile(
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
        "inception-2015-12-05.pt",
        "inception-2015-12-05.pt",
    ),
    # the same as a state dict, for pytorch-fid and clean-fid's mode `legacy_pytorch`
    "legacy_pytorch": WeightsFile(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
}


def sha256_of(path) -> str:
    """Return the hexadecimal SHA-256 digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_weights(source: WeightsFile, given=None, cache_dir=None, log=print) -> Path:
    """Return the path of a network's weights: `given`, else the cached copy, else a download.

    Raises:
        ValueError: `given` is not a file.
        ConnectionError: The download is impossible.
    """
    if given is not None:
        if not Path(given).is_file():
            raise ValueError(f"--weights {given} is not a file. Give a local copy of {source.url}.")
        return Path(given)
    path = find_cache_dir(cache_dir) / "weights" / source.filename
    if not path.is_file():
        log(f"downloading {source.url} to {path}")
        download(source, path)
    return path


def download(source: WeightsFile, path) -> None:
    """Download `source.url` to `path` as `em_data.download.download_file` does, in one try."""
    try:
        download_file(source.url, path, sha256=source.sha256, num_tries=1)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error} Without a network: fetch it elsewhere and pass the file with --weights, put "
            f"it at {path}, or use the extractor efficientnet-lite0, whose weights come with the "
            "package."
        ) from error
    except ValueError as error:
        raise ValueError(f"{error} Or pass the right file with --weights.") from error
