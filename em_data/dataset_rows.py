"""Rows of a Hugging Face data set as micrographs: from the disk, fetched whole from the Hub, or streamed from it."""

import hashlib
from pathlib import Path

import numpy as np
from huggingface_hub import HfFileSystem, constants

from em_data.checks import SourceLost
from em_data.intensity import float_to_uint16
from em_data.labels import make_defects
from em_data.micrograph import DEFECT_KINDS, Micrograph
from em_data.reading import read_micrograph
from em_data.sources import Entry, Replayed, Source
from em_hub.transport import explain_hub_errors, fetch_repository, hash_as_hub, list_files

KNOWN = ("name", "micrograph", "pixel_size_nm", "specimen", "bits")
BLOCK_BYTES = 2**18  # least that one request of a stream asks for
FETCHED, STREAMED = "hub:", "hub-stream:"


def open_dataset(source, config):
    """List the rows of a Hugging Face data set: "hub:NAME[@REVISION]", "hub-stream:NAME[@REVISION]", or what `datasets` loads.

    Images are taken from the first column of images or of two-dimensional arrays, by our own reader: `datasets` itself cuts
    16-bit images to 8. Columns `name`, `micrograph` (rows with the same one are pieces of one image), `pixel_size_nm`,
    `specimen` and `bits` are used where they are, and the labels `objects` and `mask` that em_data.push writes.
    """
    import datasets

    ignored, source = [], str(source)
    rows = open_rows(source, ignored)
    features = rows.features
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    images += [key for key, feature in features.items() if isinstance(feature, datasets.Array2D)]
    if not images:
        raise ValueError(
            f"{source} has no column of images (Image or Array2D), only {', '.join(features)}"
        )
    column, labels = images[0], _find_labels(features, images[0])
    unused = [key for key in images[1:] if key not in labels]
    if unused:
        ignored.append(f"columns {', '.join(unused)}: the images are in column {column}")
    known = rows.read_columns([key for key in KNOWN if key in features])
    content = rows.read_rows([column, *labels])
    entries = []
    for i in range(len(rows)):
        row = {key: values[i] for key, values in known.items()}
        name = f"{row.get('name') or row.get('micrograph') or 'row'}_{i:06d}"

        def read(i=i, name=name, row=row):
            return _read_row(content[i], column, name, row, config)

        group = row.get("micrograph") and str(row["micrograph"])
        entries.append(
            Entry(name, f"{rows.content}-{i}", read, row.get("specimen"), group, row.get("bits"))
        )
    if not entries:
        raise ValueError(f"{source} has no rows")
    is_on_hub = source.startswith((FETCHED, STREAMED))
    name = Path((source.split("@")[0] if is_on_hub else source).rstrip("/")).name
    return Source(name, entries, ignored)


def _find_labels(features, column):
    """Return the names of the columns with labels as em_data.push writes them."""
    items = getattr(features.get("objects"), "feature", None)
    if not isinstance(items, dict) or not {"kind", "box_px"} <= set(items):
        return []
    return [key for key in ("objects", "mask") if key in features and key != column]


def open_rows(source, ignored):
    """Return the rows that a source names: `StoredRows` or `StreamedRows`."""
    if source.startswith(STREAMED):
        return StreamedRows(source.removeprefix(STREAMED))
    if source.startswith(FETCHED):
        return StoredRows(*_load_from_hub(source.removeprefix(FETCHED)))
    dataset = _load_dataset(source, ignored)
    return StoredRows(dataset, dataset._fingerprint)


class StoredRows:
    """Rows that lie on this disk, a `datasets.Dataset`. content: what names them all, the same wherever they lie."""

    def __init__(self, dataset, content):
        self.dataset, self.content, self.features = dataset, content, dataset.features

    def __len__(self):
        return len(self.dataset)

    def read_columns(self, names):
        """Return {name: its values}."""
        return {name: self.dataset[name][:] for name in names}

    def read_rows(self, names):
        """Return what gives row i as {name: value} when asked for [i]; images as their bytes, arrays in their own type."""
        import datasets

        dataset = _leave_images_encoded(self.dataset.select_columns(names))
        for name in names:
            if isinstance(self.features[name], datasets.Array2D):
                # without its type, `datasets` makes 64 bits of any integer, and 8 bits are 8 bits no more
                dtype = np.dtype(self.features[name].dtype)
                dataset = dataset.with_format(
                    "numpy", columns=[name], output_all_columns=True, dtype=dtype
                )
        return dataset


class StreamedRows:
    """Rows of the Parquet files of a data set on the Hub, of one commit; nothing of them is kept on this disk.

    Numbers of rows and `KNOWN` columns are read at once, the rest row by row in their order: one asked for again, or out of
    order, starts the stream again. In memory is one row group of one file. What arrives is not compared with the checksums of
    the files, since no file arrives whole; PNG images have checksums of their own, which the reader compares.
    """

    def __init__(self, name):
        self.name = name
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{STREAMED}{name} is read over the network at every start, and HF_HUB_OFFLINE forbids it; unset it, or use "
                f"{FETCHED}{name}, which is kept on this disk"
            )
        repo, commit, files = list_files(name, ".parquet", kind="dataset")
        if not files:
            raise ValueError(no_parquet(name))
        self.paths = [f"datasets/{repo}@{commit}/{path}" for path in files]
        self.content = _name_content(files.values())
        with _losing_the_stream(name):
            self._read_footers()

    def _read_footers(self):
        import datasets
        import pyarrow.parquet as pq

        files = HfFileSystem(endpoint=constants.ENDPOINT)
        self.features, self._num_rows, self._columns = None, 0, {}
        for path in self.paths:
            with files.open(path, block_size=BLOCK_BYTES) as file:
                parquet = pq.ParquetFile(file, pre_buffer=False)
                if self.features is None:
                    self.features = datasets.Features.from_arrow_schema(parquet.schema_arrow)
                    self._columns = {name: [] for name in KNOWN if name in self.features}
                self._num_rows += parquet.metadata.num_rows
                if self._columns:
                    table = parquet.read(columns=list(self._columns))
                    for name, values in self._columns.items():
                        values += table.column(name).to_pylist()

    def __len__(self):
        return self._num_rows

    def read_columns(self, names):
        """Return {name: its values}, of `KNOWN` names."""
        return {name: self._columns[name] for name in names}

    def read_rows(self, names):
        """Return what gives row i as {name: value} when asked for [i]; images as their bytes, arrays in their own type."""
        return Replayed(lambda: self._stream(names))

    def _stream(self, names):
        import datasets

        options = {"hf": {"endpoint": constants.ENDPOINT, "block_size": BLOCK_BYTES}}
        with _losing_the_stream(self.name):
            dataset = datasets.load_dataset(
                "parquet",
                data_files={"train": [f"hf://{path}" for path in self.paths]},
                split="train",
                streaming=True,
                columns=names,
                batch_size=1,
                storage_options=options,
            )
            arrays = {
                name: np.dtype(self.features[name].dtype)
                for name in names
                if isinstance(self.features[name], datasets.Array2D)
            }
            for row in _leave_images_encoded(dataset):
                yield row | {name: np.asarray(row[name], dtype) for name, dtype in arrays.items()}


class _losing_the_stream:
    """Turn what goes wrong in the block, network and file alike, into a `SourceLost` of one sentence."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if not isinstance(error, Exception) or isinstance(error, SourceLost):
            return
        try:
            with explain_hub_errors(self.name, "streaming"):
                raise error
        except ValueError as explained:
            raise SourceLost(str(explained)) from error
        except Exception:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise SourceLost(f"{STREAMED}{self.name} cannot be read: {first}") from error


def _leave_images_encoded(dataset):
    """Cast the columns of images so that they give their bytes: `datasets` decodes 16 bits to 8."""
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _load_dataset(name_or_path, ignored):
    import datasets

    path = Path(name_or_path)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset = datasets.load_from_disk(str(path))
        else:
            dataset = datasets.load_dataset(str(name_or_path))
    except (
        Exception
    ) as error:  # the Hub, the network, the disk: all of them the same mistake to the user
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"datasets:{name_or_path} cannot be loaded: {first}") from error
    if isinstance(dataset, datasets.DatasetDict):
        split = "train" if "train" in dataset else next(iter(dataset))
        if len(dataset) > 1:
            ignored.append(
                f"splits {', '.join(key for key in dataset if key != split)}: split {split} is used"
            )
        dataset = dataset[split]
    return dataset


def _load_from_hub(name):
    """Return (the Parquet files of a data set on the Hub, downloaded once; what names their content)."""
    import datasets

    folder = fetch_repository(name, ["*.parquet"], kind="dataset")
    paths = sorted(folder.rglob("*.parquet"))
    if not paths:
        raise ValueError(no_parquet(name))
    content = _name_content(hash_as_hub(path)[0] for path in paths)
    try:
        return datasets.load_dataset(
            "parquet", data_files=[str(path) for path in paths], split="train"
        ), content
    except Exception as error:  # any of its parts: the files, the disk
        raise ValueError(
            f"hub:{name} cannot be read: {(str(error).splitlines() or ['?'])[0]}"
        ) from error


def no_parquet(name):
    return f"the data set {name} on the Hub holds no Parquet file; write one with python -m em_data.push"


def _name_content(checksums):
    """Name the content of files by their checksums: alike on every machine, streamed or not."""
    return hashlib.sha256("".join(checksums).encode()).hexdigest()[:32]


def _read_row(content, column, name, row, config):
    """Return the Micrograph of one row. content: the columns of pixels and labels; row: what was known before."""
    value = content[column]
    if isinstance(value, dict):  # an image that is not decoded: {"bytes", "path"}
        data = value["bytes"] if value["bytes"] is not None else value["path"]
        micrograph = read_micrograph(
            data, label_bar=config.label_bar, name=name, specimen=row.get("specimen")
        )
        micrograph.pixel_size_nm = row.get("pixel_size_nm") or micrograph.pixel_size_nm
    else:
        micrograph = _read_array(np.asarray(value), name, row)
    if content.get("objects") is not None:
        mask = (content.get("mask") or {}).get("bytes")
        instances = (
            None
            if mask is None
            else read_micrograph(mask, label_bar="keep", name=f"mask of {name}").image
        )
        kinds = {each["kind"] for each in content["objects"]} - set(DEFECT_KINDS)
        if kinds:
            micrograph.metadata["notices"].append(
                f"labels not used: kinds {', '.join(sorted(map(str, kinds)))}"
            )
        else:
            micrograph.defects = make_defects(content["objects"], instances, micrograph.image.shape)
    return micrograph


def _read_array(image, name, row):
    notices = []
    if image.dtype not in (np.uint8, np.uint16):
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise ValueError(f"{name}: holds NaN or infinite values; mend them before use")
        stored = image.dtype
        image, low, high = float_to_uint16(image)
        if (low, high) != (0.0, 65535.0):
            notices.append(f"{stored} scaled to 16 bits: {low:.6g} to 0, {high:.6g} to 65535")
    return Micrograph(
        image, name, row.get("pixel_size_nm"), row.get("specimen"), {"notices": notices}
    )
