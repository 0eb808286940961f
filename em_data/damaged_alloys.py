"""The Damaged Alloys set: STEM micrographs of irradiated FeCrAl with dislocation loops (Li, Field & Morgan 2018).

    python -m em_data.damaged_alloys FOLDER             say what a folder holds
    python -m em_data.damaged_alloys FOLDER --download  fetch it from the Materials Data Facility first

`--data damaged-alloys:FOLDER` trains on it. Two layouts are known, those of the authors' two programs; what else lies in a
folder is counted and left out. The download was tested against a local server only: nobody here could reach the facility.
"""

import argparse
import json
import re
import shutil
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path, PurePosixPath

import PIL.Image
from tqdm import tqdm

from em_data.damaged_alloys_labels import find_labels, read_defects
from em_data.download import download_file
from em_data.files import build_folder, find_cache_dir
from em_data.reading import SUFFIXES, natural_key, read_micrograph

SOURCE_ID = "pub_100_li_detection_v1.2"
INDEX_URL = "https://search.api.globus.org/v1/index/1a57bbe5-5272-477f-9d31-343b8258b7a5/search"
SERVER_URL = "https://data.materialsdatafacility.org"
ENDPOINT = "82f1b5c6-6e9b-11e5-ba47-22000b92c6ec"
EXPECTED = {(1024, 1024): 442, (2048, 2048): 52}  # of the study
PIXEL_SIZES_NM = {
    "70": 0.8805,
    "100": 0.8691,
    "300": 0.4785,
    "500": 0.2832,
}  # by magnification in thousands
ON_ZONE_NM = 0.1416
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LEVELS = 4  # folders below the given one in which a layout is sought


def pixel_size_from_name(name):
    """Return nm per pixel by the magnification in a file's name (`BF X500K, 06.jpg`, `70kx`), or None where it says none."""
    if re.search(r"on[-_ ]?zone", name, re.IGNORECASE):
        return ON_ZONE_NM
    found = re.search(r"(?<!\d)(\d+)\s*kx|x\s*(\d+)\s*k", name, re.IGNORECASE)
    return PIXEL_SIZES_NM.get(found.group(1) or found.group(2)) if found else None


def open_damaged_alloys(folder, config, cache_dir):
    """Return the Source of the set below a folder, in either layout, with boxes and pixel sizes.

    `ignored` says what lies there and is not used (augmented copies, negatives, crops, names without a file), and how the
    number differs from the study's 494. `ValueError` for a folder in no known layout.
    """
    from em_data.sources import Entry, Source, hash_files

    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is no folder; give that of the Damaged Alloys set, or fetch it: python -m em_data.damaged_alloys FOLDER --download"
        )
    paths, labels, ignored = find_layout(Path(folder))
    entries = []
    for path, key in zip(paths, hash_files(paths, cache_dir)):
        name = path.relative_to(folder).as_posix()
        label = labels.get(path)
        if label is not None:  # a changed label is a changed entry
            key += f"-{label.stat().st_size}-{label.stat().st_mtime_ns}"

        def read(path=path, name=name, label=label):
            micrograph = read_micrograph(path, label_bar=config.label_bar, name=name)
            micrograph.pixel_size_nm = pixel_size_from_name(path.stem) or micrograph.pixel_size_nm
            if label is not None:
                micrograph.defects = read_defects(
                    label,
                    micrograph.image.shape,
                    micrograph.pixel_size_nm,
                    micrograph.metadata["notices"],
                )
            return micrograph

        entries.append(Entry(name, key, read))
    return Source("damaged-alloys", entries, ignored + explain_number(paths, labels))


def find_layout(folder):
    """Return (paths of the original micrographs, {path: label file}, sentences on what is left out)."""
    folders = [
        folder,
        *sorted(
            p
            for p in folder.rglob("*")
            if p.is_dir() and len(p.relative_to(folder).parts) <= LEVELS
        ),
    ]
    for parent in folders:
        if (parent / "images.txt").is_file() and (parent / "images").is_dir():
            return _find_listed(parent)
    for parent in folders:
        if (parent / "positive").is_dir() and _list_images(parent / "positive"):
            return _find_positive(parent)
    inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{folder} holds no known layout of the Damaged Alloys set: neither images.txt beside images/ nor a folder positive/ with "
        f"images, but {inside}. If these are the micrographs and nothing else, give the folder itself: --data {folder}"
    )


def _list_images(folder):
    return sorted(
        (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()),
        key=lambda p: natural_key(p.name),
    )


def _find_listed(parent):
    """Layout 1: the names in images.txt are the originals."""
    listed = list(
        dict.fromkeys(
            line.strip()
            for line in (parent / "images.txt").read_text().splitlines()
            if line.strip()
        )
    )
    there = {path.name: path for path in _list_images(parent / "images")}
    by_stem = {path.stem: path for path in there.values()}
    found = {
        name: there.get(name) or by_stem.get(name) or by_stem.get(Path(name).stem)
        for name in listed
    }
    paths = list(dict.fromkeys(path for path in found.values() if path is not None))
    missing = [name for name, path in found.items() if path is None]
    extra = set(there.values()) - set(paths)
    ignored = [
        f"layout of the Faster R-CNN program: {len(paths)} of {len(listed)} names in images.txt have an image"
    ]
    if missing:
        ignored.append(
            f"{len(missing)} names in images.txt without an image in images/, such as {missing[0]}"
        )
    if extra:
        ignored.append(
            f"{len(extra)} images in images/ that images.txt does not list: augmented copies or others"
        )
    ignored += _count_elsewhere(parent, parent / "images")
    if not paths:
        raise ValueError(
            f"{parent}: none of the {len(listed)} names in images.txt has an image in images/; copy the set again"
        )
    return paths, find_labels(paths, [parent / "bounding_boxes"]), ignored


def _find_positive(parent):
    """Layout 2: the originals lie in positive/; its neighbours hold negatives, augmented copies and crops."""
    paths = _list_images(parent / "positive")
    ignored = [f"layout of the MATLAB program: {len(paths)} images in positive/"]
    ignored += _count_elsewhere(parent, parent / "positive")
    folders = [parent, *(p for p in parent.rglob("*") if p.is_dir())]
    return paths, find_labels(paths, folders), ignored


def _count_elsewhere(parent, used):
    """Say how many images lie below `parent` and not directly in `used`: they are no originals."""
    counts = Counter(
        path.parent.relative_to(parent).as_posix()
        for path in parent.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.parent != used
    )
    return [
        f"{num} images in {name}/: negatives, augmented copies or crops"
        for name, num in sorted(counts.items())
    ]


def explain_number(paths, labels):
    """Return sentences on how the micrographs found differ from the study's 494, by size, and on labels and pixel sizes."""
    sizes, unreadable = Counter(), []
    for path in paths:
        try:
            with PIL.Image.open(path) as image:
                sizes[image.size[::-1]] += 1
        except OSError:
            unreadable.append(path.name)
    expected, notes = sum(EXPECTED.values()), []
    if len(paths) != expected or sizes != EXPECTED:
        parts = [
            f"{sizes[size]} of {num} with {size[0]} x {size[1]} pixels"
            for size, num in EXPECTED.items()
        ]
        parts += [
            f"{num} with {h} x {w}, which the study has not"
            for (h, w), num in sorted(sizes.items())
            if (h, w) not in EXPECTED
        ]
        parts += [f"{len(unreadable)} unreadable, such as {unreadable[0]}"] if unreadable else []
        notes.append(f"{len(paths)} micrographs, the study has {expected}: {'; '.join(parts)}")
    if len(labels) < len(paths):
        notes.append(
            f"{len(paths) - len(labels)} micrographs without a label file: no boxes for them"
        )
    unknown = sum(pixel_size_from_name(path.stem) is None for path in paths)
    if unknown:
        notes.append(
            f"{unknown} micrographs whose names tell no known magnification: pixel size unknown unless the file has it"
        )
    return notes


# ---------------------------------------------------------------- download


def query_index(index_url=INDEX_URL, limit=100, timeout=30.0):
    """Ask the public search index; return (path of the data on the server, [{path, url, length, sha512}, ...]).

    `ConnectionError` without an answer, `ValueError` where the index does not know the set.
    """
    root, files, offset = None, {}, 0
    while True:
        query = urllib.parse.urlencode({"q": SOURCE_ID, "limit": limit, "offset": offset})
        try:
            with urllib.request.urlopen(f"{index_url}?{query}", timeout=timeout) as response:
                answer = json.load(response)
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"the search index {index_url} does not answer ({error}); try again later"
            ) from error
        results = answer.get("gmeta", [])
        for content in _contents(results):
            if content.get("mdf", {}).get("source_id") != SOURCE_ID:
                continue
            location = content.get("data", {}).get("endpoint_path")
            root = root or (urllib.parse.urlparse(location).path if location else None)
            for file in content.get("files", []):
                where = file.get("globus") or file.get("url") or ""
                files[where] = file | {
                    "path": urllib.parse.unquote(urllib.parse.urlparse(where).path)
                }
        offset += len(results)
        if not results or offset >= answer.get("total", 0):
            break
    if root is None:
        raise ValueError(
            f"the search index knows no data set {SOURCE_ID} with a place of its data; see https://materialsdatafacility.org"
        )
    return root, list(files.values())


def _contents(results):
    for result in results:
        if isinstance(result.get("content"), list):
            yield from result["content"]
        for entry in result.get("entries", []):
            yield entry.get("content", {})


def download_damaged_alloys(folder, *, index_url=INDEX_URL, server_url=SERVER_URL, log=print):
    """Download the set into a folder: every file that the index names, resumed, checked by length and SHA-512, unpacked.

    `ValueError` where the index names no files: it says where they lie for Globus to fetch.
    """
    folder = Path(folder)
    root, files = query_index(index_url)
    if not files:
        raise ValueError(
            f"the search index names no single files of {SOURCE_ID}. They lie on the Globus endpoint {ENDPOINT} under {root}; "
            f"fetch that folder with Globus, then python -m em_data.damaged_alloys {folder}"
        )
    log(
        f"{len(files)} files, {sum(f.get('length') or 0 for f in files) / 1e6:.1f} MB, from {server_url}{root}"
    )
    for file in tqdm(files, "files", unit="file"):
        path = PurePosixPath(file["path"])
        relative = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath(path.name)
        if ".." in relative.parts:
            raise ValueError(
                f"the search index names {path}, outside of its folder {root}: not downloaded"
            )
        url = server_url + urllib.parse.quote(str(path))
        download_file(
            url, folder / relative, num_bytes=file.get("length"), sha512=file.get("sha512")
        )
        if path.name.lower().endswith(ARCHIVES):
            _unpack(folder / relative)


def _unpack(archive):
    """Unpack an archive into a folder of its name beside it, which appears whole or not at all."""
    name = archive.name.lower()
    target = archive.with_name(
        archive.name[
            : -len(next(s for s in sorted(ARCHIVES, key=len, reverse=True) if name.endswith(s)))
        ]
    )
    if target.exists():
        return
    with build_folder(target) as building:
        options = (
            {} if name.endswith(".zip") else {"filter": "data"}
        )  # zipfile leaves names that lead outside by itself
        shutil.unpack_archive(archive, building, **options)


def main(arguments=None):
    """Say what a folder holds of the set, after downloading it if asked: the command of this module."""
    from em_data.config import DataConfig

    parser = argparse.ArgumentParser(
        prog="python -m em_data.damaged_alloys", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--download", action="store_true", help="fetch the set into the folder first"
    )
    parser.add_argument("--search-url", default=INDEX_URL, help="search index to ask")
    parser.add_argument("--server-url", default=SERVER_URL, help="server of the files")
    args = parser.parse_args(arguments)
    try:
        if args.download:
            download_damaged_alloys(
                args.folder, index_url=args.search_url, server_url=args.server_url
            )
        source = open_damaged_alloys(args.folder, DataConfig(), find_cache_dir())
    except (ValueError, ConnectionError) as error:
        parser.error(str(error))
    print(f"{args.folder}: {len(source.entries)} micrographs")
    print("\n".join(f"  {sentence}" for sentence in source.ignored))


if __name__ == "__main__":
    main()
