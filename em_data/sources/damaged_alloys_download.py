"""Download the Damaged Alloys set from the Materials Data Facility.

This was tested with a local server only: the facility could not be reached during development.
"""

import json
import shutil
import urllib.parse
import urllib.request
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from em_data.download import TIMEOUT, download_file
from em_data.files import build_folder

SOURCE_ID = "pub_100_li_detection_v1.2"
INDEX_URL = "https://search.api.globus.org/v1/index/1a57bbe5-5272-477f-9d31-343b8258b7a5/search"
SERVER_URL = "https://data.materialsdatafacility.org"
ENDPOINT = "82f1b5c6-6e9b-11e5-ba47-22000b92c6ec"
ARCHIVES = (".tar.bz2", ".tar.gz", ".tar.xz", ".tar", ".tgz", ".zip")


def download_damaged_alloys(folder, *, index_url=INDEX_URL, server_url=SERVER_URL, log=print):
    """Download the files that the search index lists, check length and SHA-512, and unpack them.

    A download that was interrupted goes on where it stopped.
    """
    folder = Path(folder)
    root, files = query_index(index_url)
    if not files:
        raise ValueError(
            f"The search index lists no files of {SOURCE_ID}. They are on the Globus endpoint "
            f"{ENDPOINT} under {root}. Fetch that folder with Globus, then run "
            f"python -m em_data.damaged_alloys {folder}"
        )
    num_bytes = sum(file.get("length") or 0 for file in files)
    log(f"{len(files)} files, {num_bytes / 1e6:.1f} MB, from {server_url}{root}")
    for file in tqdm(files, "files", unit="file"):
        path = PurePosixPath(file["path"])
        relative = PurePosixPath(path.relative_to(root) if path.is_relative_to(root) else path.name)
        if ".." in relative.parts:
            raise ValueError(
                f"The search index lists {path}, which is outside of its folder {root}: "
                "not downloaded."
            )
        url = server_url + urllib.parse.quote(str(path))
        expected = {"num_bytes": file.get("length"), "sha512": file.get("sha512")}
        download_file(url, folder / relative, **expected)
        _unpack(folder / relative)


def query_index(index_url):
    """Ask the index for the path of the set on its server, and its files (path, length, sha512)."""
    root, files, offset = None, {}, 0
    while True:
        query = urllib.parse.urlencode({"q": SOURCE_ID, "limit": 100, "offset": offset})
        try:
            with urllib.request.urlopen(f"{index_url}?{query}", timeout=TIMEOUT) as response:
                answer = json.load(response)
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"The search index {index_url} does not answer ({error}). Try again later."
            ) from error
        results = answer.get("gmeta", [])
        for content in _list_contents(results):
            if content.get("mdf", {}).get("source_id") != SOURCE_ID:
                continue
            location = content.get("data", {}).get("endpoint_path")
            root = root or (urllib.parse.urlparse(location).path if location else None)
            for file in content.get("files", []):
                where = file.get("globus") or file.get("url") or ""
                path = urllib.parse.unquote(urllib.parse.urlparse(where).path)
                files[where] = file | {"path": path}
        offset += len(results)
        if not results or offset >= answer.get("total", 0):
            break
    if root is None:
        raise ValueError(
            f"The search index knows no data set {SOURCE_ID} with a location of its data; see "
            "https://materialsdatafacility.org"
        )
    return root, list(files.values())


def _list_contents(results):
    """Yield the records of search results, in either of the index's two forms."""
    for result in results:
        if isinstance(result.get("content"), list):
            yield from result["content"]
        for entry in result.get("entries", []):
            yield entry.get("content", {})


def _unpack(path):
    """Unpack an archive into a new folder beside it; leave other files as they are."""
    suffix = next((s for s in ARCHIVES if path.name.lower().endswith(s)), None)
    target = path.with_name(path.name[: -len(suffix)]) if suffix else path
    if target.exists():
        return
    # zipfile itself leaves out names that lead outside; tarfile needs a filter
    options = {} if suffix == ".zip" else {"filter": "data"}
    with build_folder(target) as building:
        shutil.unpack_archive(path, building, **options)
