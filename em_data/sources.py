"""Where micrographs come from: a folder, a Hugging Face data set, or the embedded generator."""

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from em_data.cache import write_atomically
from em_data.hub import fetch_repository, hash_as_hub
from em_data.intensity import float_to_uint16
from em_data.micrograph import Micrograph
from em_data.reading import SUFFIXES, natural_key, read_micrograph

LABEL_WORDS = r"(masks?|labels?|annotations?|annotated|ground[-_ ]?truth|gt|segmentations?)"
LABEL_FOLDER = re.compile(rf"^{LABEL_WORDS}(\d*|[-_ ].*)$", re.IGNORECASE)
LABEL_FILE = re.compile(rf"[-_ .]{LABEL_WORDS}\d*$", re.IGNORECASE)
IMAGE_FOLDER = re.compile(r"^(images?|imgs?|micrographs?|data|raw)$", re.IGNORECASE)
OTHER_MICROSCOPY = (".dm3", ".dm4", ".emd", ".ser", ".mrc", ".mrcs", ".hdf5", ".h5", ".npy", ".npz", ".gif", ".webp")
DEFAULT_NUM_SYNTHETIC = 48


@dataclass
class Entry:
    """One micrograph that is not read yet.

    name: unique in its source. key: hash of its content. group: what must not be cut apart by the split (its name, unless
    several entries are pieces of one micrograph). specimen: None where unknown. read: () -> Micrograph, or ValueError.
    """

    name: str
    key: str
    read: Callable
    specimen: str | None = None
    group: str | None = None

    def __post_init__(self):
        self.group = self.group or self.name


@dataclass
class Source:
    """The entries of a source in their natural order, and what lies there and is not used (sentences)."""

    name: str
    entries: list
    ignored: list


def open_source(source, config, cache_dir):
    """Return the Source that a string names: a folder, "synthetic", "hub:owner/name[@revision]", "damaged-alloys:FOLDER", or
    "datasets:NAME_OR_PATH"."""
    source = os.path.expanduser(str(source))
    if source == "synthetic":
        opened = open_synthetic(config)
    elif source.startswith("hub:"):
        opened = open_dataset(source, config)
    elif source.startswith("damaged-alloys:"):
        from em_data.damaged_alloys import open_damaged_alloys  # not at the top: it is a command, too

        opened = open_damaged_alloys(Path(source.removeprefix("damaged-alloys:")).expanduser(), config, cache_dir)
    elif source.startswith("datasets:"):
        opened = open_dataset(source.removeprefix("datasets:"), config)
    elif (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
        opened = open_dataset(source, config)
    elif Path(source).is_dir():
        opened = open_folder(source, config, cache_dir)
    elif Path(source).exists():
        raise ValueError(f"{source} is a file; give the folder that holds the micrographs")
    else:
        raise ValueError(
            f"{source!r} is no folder here; give a folder, 'synthetic', 'hub:owner/name', 'damaged-alloys:FOLDER' or "
            "'datasets:NAME_OR_PATH'"
        )
    if config.num_micrographs is not None and len(opened.entries) > config.num_micrographs:
        opened.ignored.append(f"{len(opened.entries) - config.num_micrographs} images beyond the first "
                              f"{config.num_micrographs}, as num_micrographs asks")  # fmt: skip
        opened.entries = opened.entries[: config.num_micrographs]
    return opened


def open_folder(folder, config, cache_dir):
    """List the images below a folder; folders and files that hold labels by their name are left out, and said."""
    folder = Path(folder)
    paths, num_labels, others, closed = [], Counter(), Counter(), []
    visited = set()  # folders reached through links may lead back
    for parent, folders, files in os.walk(folder, onerror=closed.append, followlinks=True):
        if os.path.realpath(parent) in visited:
            folders[:] = []
            continue
        visited.add(os.path.realpath(parent))
        relative = Path(parent).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        label_folder = next((part for part in relative.parts if LABEL_FOLDER.match(part)), None)
        for file in files:
            suffix = Path(file).suffix.lower()
            if file.startswith("."):
                continue
            if suffix in OTHER_MICROSCOPY:
                others[suffix] += 1
            elif suffix not in SUFFIXES:
                continue
            elif label_folder:
                num_labels[f"folder {label_folder}/"] += 1
            elif LABEL_FILE.search(Path(file).stem):
                num_labels["files named as labels"] += 1
            else:
                paths.append(relative / file)
    ignored = [f"{count} images in {where}: labels by their name" for where, count in num_labels.items()]
    ignored += [f"{count} {suffix} files: not read; export them as TIFF" for suffix, count in others.items()]
    ignored += [f"folder {error.filename}: {error.strerror}" for error in closed]
    if not paths:
        said = f" ({'; '.join(ignored)})" if ignored else ""
        raise ValueError(f"{folder} holds no TIFF, PNG, JPEG or BMP image{said}; give a folder of micrographs")
    paths.sort(key=natural_key)
    hashes = hash_files([folder / path for path in paths], cache_dir)
    entries = []
    for path, key in zip(paths, hashes):
        name = path.as_posix().encode(errors="replace").decode()
        specimen = _specimen_of(Path(name), config.specimen_pattern)

        def read(path=folder / path, name=name, specimen=specimen):
            return read_micrograph(path, label_bar=config.label_bar, name=name, specimen=specimen)

        entries.append(Entry(name, key, read, specimen))
    return Source(folder.resolve().name, entries, ignored)


def _specimen_of(path, pattern):
    """Name the specimen of a file: by the pattern, or by the folder that it lies in; None where neither says."""
    if pattern is not None:
        match = re.search(pattern, path.as_posix())
        return (match.group(1) if match.re.groups else match.group()) if match else None
    parts = [part for part in path.parts[:-1] if not IMAGE_FOLDER.match(part)]
    return "/".join(parts) or None


def hash_files(paths, cache_dir):
    """Return a hash of each file's content; one whose path, size and time of change are known is not read again.

    A file changed in the last two seconds is not remembered, since a second change could leave its time as it is.
    An unreadable file hashes to the error, and is named when it is read.
    """
    memo_path = Path(cache_dir) / "file_hashes.json"
    try:
        memo = json.loads(memo_path.read_text())
    except (OSError, ValueError):
        memo = {}
    hashes, num_new = [], 0
    for path in paths:
        try:
            stat, key = path.stat(), str(path.resolve())
            known = memo.get(key)
            if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
                hashes.append(known[2])
                continue
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            hashes.append(digest)
            if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
                memo[key] = [stat.st_size, stat.st_mtime_ns, digest]
                num_new += 1
        except OSError as error:
            hashes.append(f"unreadable: {error.strerror}")
    if num_new:
        with suppress(OSError):  # a memory only: where it cannot be written, the next start hashes again
            write_atomically(memo_path, json.dumps(memo).encode())
    return hashes


def open_synthetic(config):
    """List the micrographs of the embedded generator; the key holds its code, so that a change of it is a new source."""
    from em_data import synthetic

    num = config.num_micrographs or DEFAULT_NUM_SYNTHETIC
    size = config.micrograph_size
    code = b"".join(path.read_bytes() for path in sorted(Path(synthetic.__file__).parent.glob("synthetic*.py")))
    code = hashlib.blake2b(code, digest_size=8).hexdigest()
    micrographs = _Replayed(lambda: synthetic.synthesise_micrographs(num, config.seed, size))
    entries = [
        Entry(f"synthetic_{i:05d}", f"{code}-{config.seed}-{size}-{i}-of-{num}", lambda i=i: micrographs[i])
        for i in range(num)
    ]
    return Source("synthetic", entries, [])


class _Replayed:
    """Items of an iterator by rising number; asking for an earlier one starts it again."""

    def __init__(self, start):
        self.start, self.iterator, self.next = start, None, 0

    def __getitem__(self, i):
        if self.iterator is None or i < self.next:
            self.iterator, self.next = iter(self.start()), 0
        while True:
            item = next(self.iterator)
            self.next += 1
            if self.next == i + 1:
                return item


def open_dataset(name_or_path, config):
    """List the rows of a Hugging Face data set.

    Images are taken from the first column of images or of two-dimensional arrays, by our own reader: `datasets` itself cuts
    16-bit images to 8. Columns `name`, `micrograph` (rows with the same one are pieces of one image), `pixel_size_nm` and
    `specimen` are used where they are.
    """
    import datasets

    ignored = []
    dataset, fingerprint = _load_dataset(name_or_path, ignored)
    features = dataset.features
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    images += [key for key, feature in features.items() if isinstance(feature, datasets.Array2D)]
    if not images:
        raise ValueError(f"{name_or_path} has no column of images (Image or Array2D), only {', '.join(features)}")
    column = images[0]
    if len(images) > 1:
        ignored.append(f"columns {', '.join(images[1:])}: the images are in column {column}")
    is_image = isinstance(features[column], datasets.Image)
    if is_image:
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    known = {key: dataset[key][:] for key in ("name", "micrograph", "pixel_size_nm", "specimen") if key in features}
    arrays = dataset.select_columns([column])
    if not is_image:  # without its type, `datasets` makes 64 bits of any integer, and 8 bits are 8 bits no more
        arrays = arrays.with_format("numpy", dtype=np.dtype(features[column].dtype))
    entries = []
    for i in range(len(dataset)):
        row = {key: values[i] for key, values in known.items()}
        name = f"{row.get('name') or row.get('micrograph') or 'row'}_{i:06d}"

        def read(i=i, name=name, row=row):
            return _read_row(arrays[i][column], name, row, config)

        group = row.get("micrograph") and str(row["micrograph"])
        entries.append(Entry(name, f"{fingerprint}-{i}", read, row.get("specimen"), group))
    if not entries:
        raise ValueError(f"{name_or_path} has no rows")
    name = str(name_or_path).rstrip("/")
    return Source(Path(name.split("@")[0] if name.startswith("hub:") else name).name, entries, ignored)


def _load_dataset(name_or_path, ignored):
    """Return (dataset, what names its content)."""
    import datasets

    if str(name_or_path).startswith("hub:"):
        return _load_from_hub(str(name_or_path).removeprefix("hub:"))
    path = Path(name_or_path)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset = datasets.load_from_disk(str(path))
        else:
            dataset = datasets.load_dataset(str(name_or_path))
    except Exception as error:  # the Hub, the network, the disk: all of them the same mistake to the user
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"datasets:{name_or_path} cannot be loaded: {first}") from error
    if isinstance(dataset, datasets.DatasetDict):
        split = "train" if "train" in dataset else next(iter(dataset))
        if len(dataset) > 1:
            ignored.append(f"splits {', '.join(key for key in dataset if key != split)}: split {split} is used")
        dataset = dataset[split]
    return dataset, dataset._fingerprint


def _load_from_hub(name):
    """The Parquet files of a data set on the Hub, downloaded once; named by their checksums, so alike on every machine."""
    import datasets

    folder = fetch_repository(name, ["*.parquet"], kind="dataset")
    paths = sorted(folder.rglob("*.parquet"))
    if not paths:
        raise ValueError(f"the data set {name} on the Hub holds no Parquet file; write one with python -m em_data.push")
    content = hashlib.sha256("".join(hash_as_hub(path)[0] for path in paths).encode()).hexdigest()[:32]
    try:
        return datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train"), content
    except Exception as error:  # any of its parts: the files, the disk
        raise ValueError(f"hub:{name} cannot be read: {(str(error).splitlines() or ['?'])[0]}") from error


def _read_row(value, name, row, config):
    if isinstance(value, dict):  # an image that is not decoded: {"bytes", "path"}
        data = value["bytes"] if value["bytes"] is not None else value["path"]
        micrograph = read_micrograph(data, label_bar=config.label_bar, name=name, specimen=row.get("specimen"))
        micrograph.pixel_size_nm = row.get("pixel_size_nm") or micrograph.pixel_size_nm
        return micrograph
    image, notices = np.asarray(value), []
    if image.dtype not in (np.uint8, np.uint16):
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise ValueError(f"{name}: holds NaN or infinite values; mend them before use")
        stored = image.dtype
        image, low, high = float_to_uint16(image)
        if (low, high) != (0.0, 65535.0):
            notices.append(f"{stored} scaled to 16 bits: {low:.6g} to 0, {high:.6g} to 65535")
    return Micrograph(image, name, row.get("pixel_size_nm"), row.get("specimen"), {"notices": notices})
