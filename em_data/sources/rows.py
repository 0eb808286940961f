"""A Hugging Face data set as a source: from the disk, downloaded from the Hub, or streamed."""

import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfFileSystem, constants

from em_data.files import printable
from em_data.formats.base import Stored
from em_data.micrograph import Micrograph
from em_data.reading import finish, read_micrograph
from em_data.sources.base import Entry, Replayed, Source, SourceLost
from em_data.sources.columns import find_dtype, list_image_columns, read_size, to_plane
from em_data.sources.row_labels import find_class_column, find_row_labels, name_classes
from em_hub.transport import explain_hub_errors, fetch_repository, hash_as_hub, list_files

KNOWN_COLUMNS = ("name", "micrograph", "pixel_size_nm", "specimen")
BLOCK_BYTES = 2**18  # a stream asks for at least so much at a time
FETCHED, STREAMED, NAMED = "hub:", "hub-stream:", "datasets:"


def is_dataset(source) -> bool:
    """Return True if a source is a data set: by its prefix, or a folder that `datasets` wrote."""
    return str(source).startswith((FETCHED, STREAMED, NAMED)) or _is_saved(source)


def open_dataset(source, config) -> Source:
    """List the rows of a data set that hold an image, see `list_image_columns`.

    The columns `name`, `micrograph` (rows that share it are pieces of one image), `pixel_size_nm`
    and `specimen`, labels (`em_data.sources.row_labels`) and classes are used if they exist.
    """
    ignored, source = [], str(source)
    rows = open_rows(source, ignored, config)
    if not rows.num:
        raise ValueError(f"{source} has no rows.")
    features = rows.features
    images = list_image_columns(features)
    if not images:
        raise ValueError(
            f"{source} has no column of images (Image, Array2D, Array3D or lists of numbers), only "
            f"{', '.join(features)}."
        )
    column = images[0]
    labels = find_row_labels(features, column, config, rows.read, ignored)
    label_columns = labels.columns if labels else []
    unused = [key for key in images[1:] if key not in label_columns]
    if unused:
        ignored.append(f"columns {', '.join(unused)}: the images are in column {column}")
    by_class = find_class_column(features, config.classes)
    classes = {}
    if by_class:
        classes = name_classes(rows.known[by_class], features[by_class], by_class, ignored)
    content, entries = rows.read([column, *label_columns]), []
    dtype, fails = find_dtype(features[column]), config.on_bad_image == "fail"
    form = f" labels {labels.name} {labels.form}" if labels else ""
    for i in range(rows.num):
        facts = {key: values[i] for key, values in rows.known.items()}
        name = printable(f"{facts.get('name') or facts.get('micrograph') or 'row'}_{i:06d}")

        def frames(i=i, name=name, facts=facts):
            row = content[i]
            micrograph = _read_image(row[column], dtype, name, facts, config.label_bar)
            micrograph.class_name = classes.get(i)
            if labels:
                labels.attach(row, micrograph, fails)
            yield micrograph

        group = facts.get("micrograph") and str(facts["micrograph"])
        key = f"{rows.content}-{i}{form}" + (f" class {classes[i]}" if i in classes else "")
        entries.append(Entry(name, key, frames, facts.get("specimen"), group))
    name = source.split("@")[0] if source.startswith((FETCHED, STREAMED)) else source
    name = Path(name.removeprefix(NAMED).rstrip("/")).name
    found = f"column {labels.name} ({labels.form})" if labels else ""
    return Source(name, entries, ignored, found, f"column {by_class}" if classes else "")


@dataclass
class Rows:
    """The rows of a data set, before images are read."""

    features: dict
    num: int
    known: dict  # {name: values} of the known columns
    content: str  # hash of the data set, the same on any machine
    read: Callable  # names of columns (the image first) -> rows by number, images as encoded bytes


def open_rows(source: str, ignored: list, config) -> Rows:
    """Open the data set of a source; append to `ignored` what is not used."""
    import datasets

    if source.startswith(STREAMED):
        return _open_stream(source.removeprefix(STREAMED), config)
    if source.startswith(FETCHED):
        dataset, content = _load_from_hub(source.removeprefix(FETCHED))
    else:
        dataset = _load_dataset(source.removeprefix(NAMED), ignored)
        content = dataset._fingerprint
    features = dataset.features
    known = {name: dataset[name][:] for name in _list_known(features, config)}

    def read(names):
        columns = _leave_images_encoded(dataset.select_columns(names))
        if not isinstance(features[names[0]], datasets.Array2D | datasets.Array3D):
            return columns
        dtype = find_dtype(features[names[0]])  # without it, all integers become 64 bits
        return columns.with_format("numpy", columns=names[:1], output_all_columns=True, dtype=dtype)

    return Rows(features, len(dataset), known, content, read)


def _open_stream(name, config) -> Rows:
    """Open the Parquet files of one commit on the Hub; nothing is kept on this disk.

    Known columns are read at once. The rest is read row by row: asking for an earlier row starts
    the stream again. Memory holds one row group of one file. The files' checksums are not compared,
    because no file arrives whole. PNG images carry checksums of their own, which the reader
    compares.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{STREAMED}{name} is read over the network at every start, and HF_HUB_OFFLINE "
            f"forbids it; unset it, or use {FETCHED}{name}, which is kept on this disk."
        )
    repo, commit, files = list_files(name, ".parquet", kind="dataset")
    if not files:
        raise ValueError(_say_no_parquet(name))
    paths = [f"datasets/{repo}@{commit}/{path}" for path in files]
    tables = []
    with _explain_lost_stream(name):
        file_system = HfFileSystem(endpoint=constants.ENDPOINT)
        for path in paths:
            with file_system.open(path, block_size=BLOCK_BYTES) as file:
                parquet = pq.ParquetFile(file, pre_buffer=False)
                schema = parquet.schema_arrow
                features = datasets.Features.from_arrow_schema(schema)
                tables.append(parquet.read(columns=_list_known(features, config)))
        known = pa.concat_tables(tables, promote_options="default")

    def read(names):
        return Replayed(lambda: _stream(name, paths, names))

    content = _hash_content(files.values())
    num = sum(table.num_rows for table in tables)  # also without known columns
    return Rows(features, num, known.to_pydict(), content, read)


def _stream(name, paths, names):
    """Yield rows of Parquet files on the Hub as dictionaries."""
    import datasets

    with _explain_lost_stream(name):
        dataset = datasets.load_dataset(
            "parquet",
            data_files={"train": [f"hf://{path}" for path in paths]},
            split="train",
            streaming=True,
            columns=names,
            batch_size=1,
            storage_options={"hf": {"endpoint": constants.ENDPOINT, "block_size": BLOCK_BYTES}},
        )
        yield from _leave_images_encoded(dataset)


@contextmanager
def _explain_lost_stream(name):
    """Raise every error of the network or of a file as a `SourceLost` of one sentence."""
    try:
        with explain_hub_errors(name, "streaming"):
            yield
    except SourceLost:
        raise
    except ValueError as explained:
        raise SourceLost(str(explained)) from explained
    except Exception as error:
        raise SourceLost(f"{STREAMED}{name} cannot be read: {_first_line(error)}") from error


def _is_saved(path) -> bool:
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load_dataset(name_or_path, ignored):
    import datasets

    try:
        if _is_saved(name_or_path):
            dataset = datasets.load_from_disk(str(name_or_path))
        else:
            dataset = datasets.load_dataset(str(name_or_path))
    except Exception as error:  # of the Hub, the network or the disk
        raise ValueError(
            f"datasets:{name_or_path} cannot be loaded: {_first_line(error)}"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        split = "train" if "train" in dataset else next(iter(dataset))
        others = [key for key in dataset if key != split]
        if others:
            ignored.append(f"splits {', '.join(others)}: split {split} is used")
        dataset = dataset[split]
    return dataset


def _load_from_hub(name):
    """Download the Parquet files of a data set; return the data set and a hash of the files."""
    import datasets

    folder = fetch_repository(name, ["*.parquet"], kind="dataset")
    paths = sorted(folder.rglob("*.parquet"))
    if not paths:
        raise ValueError(_say_no_parquet(name))
    content = _hash_content(hash_as_hub(path)[0] for path in paths)
    files = [str(path) for path in paths]
    try:
        return datasets.load_dataset("parquet", data_files=files, split="train"), content
    except Exception as error:  # of the files or the disk
        raise ValueError(f"{FETCHED}{name} cannot be read: {_first_line(error)}") from error


def _say_no_parquet(name):
    return (
        f"The data set {name} on the Hub holds no Parquet file. "
        "Write one with python -m em_data.push."
    )


def _hash_content(checksums):
    """Return a hash of files by their checksums, the same for downloaded and streamed files."""
    return hashlib.sha256("".join(checksums).encode()).hexdigest()[:32]


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def _list_known(features, config):
    """Return the columns that are read at once: those that are known, and that of the classes."""
    names = [name for name in KNOWN_COLUMNS if name in features]
    by_class = find_class_column(features, config.classes)
    return [*names, *([by_class] if by_class and by_class not in names else [])]


def _leave_images_encoded(dataset):
    """Cast image columns so that rows hold encoded bytes: `datasets` decodes 16 bits to 8."""
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _read_image(value, dtype, name, facts, label_bar) -> Micrograph:
    """Return the micrograph of an encoded image or an array. facts: values of known columns."""
    specimen, pixel_size_nm = facts.get("specimen"), read_size(facts.get("pixel_size_nm"))
    if value is None or (isinstance(value, dict) and value["bytes"] is value["path"] is None):
        raise ValueError(f"{name}: no image in this row (null).")
    if isinstance(value, dict):  # an encoded image, which `datasets` would cut to 8 bits
        data = value["bytes"] if value["bytes"] is not None else value["path"]
        micrograph = read_micrograph(data, label_bar=label_bar, name=name, specimen=specimen)
        micrograph.pixel_size_nm = pixel_size_nm or micrograph.pixel_size_nm
        return micrograph
    try:
        stored = Stored(to_plane(value, dtype), {"notices": []}, pixel_size_nm)
        return finish(stored, label_bar, name, specimen)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
