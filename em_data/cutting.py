"""Cut micrographs into tiles, once, and write them to a file that is memory-mapped later."""

import hashlib
import json
from pathlib import Path

import numpy as np

from em_data.checks import hash_pixels, read_all
from em_data.files import build_folder
from em_data.intensity import find_levels

FORMAT = 1  # of the cached folder; a change makes all cached tiles invalid
WRITE_BYTES = 32 * 2**20  # tiles are written so many bytes at a time


def find_tile_positions(shape, resolution, downsample=1) -> list[tuple[int, int]]:
    """Return the upper left corners (row_px, col_px) of the tiles of a micrograph.

    Tiles do not overlap and start at the upper left. What is left over at the right and the bottom
    is not used.

    Args:
        shape: (H, W) of the micrograph.
        resolution: Side of a tile after downsampling.
        downsample: Pixels of the micrograph per pixel of the tile.
    """
    side = resolution * downsample
    rows, columns = (range(0, length - side + 1, side) for length in shape)
    return [(row, col) for row in rows for col in columns]


def average_area(image, factor):
    """Return the rounded means over squares of `factor` x `factor` pixels, in the image's type."""
    if factor == 1:
        return image
    height, width = image.shape[0] // factor, image.shape[1] // factor
    squares = image[: height * factor, : width * factor].reshape(height, factor, width, factor)
    return np.rint(squares.mean(axis=(1, 3), dtype=np.float64)).astype(image.dtype)


def make_cut_key(source, config) -> str:
    """Return a hash of everything that decides the tiles: the source's content and the recipe."""
    recipe = {
        "format": FORMAT,
        "entries": [[e.name, e.key, e.specimen, e.group] for e in source.entries],
        "resolution": config.resolution,
        "downsample": config.downsample,
        "intensity": config.intensity,
        "percentiles": list(config.percentiles) if config.intensity == "percentile" else None,
        "label_bar": config.label_bar,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]


def cut(source, config, folder):
    """Cut the micrographs of a source into a new folder, which `em_data.tiles.Cut` reads.

    It holds tiles.arrow (a `datasets.Dataset`) and cut.json (facts of the micrographs, and the
    problems of those that cannot be used).
    """
    micrographs, problems, side_px = [], [], config.resolution * config.downsample
    with build_folder(folder) as building:
        path = building / "tiles.arrow"
        with TileWriter(path, config.resolution) as writer:
            for entry, micrograph in read_all(source.entries, side_px, problems):
                image = average_area(micrograph.image, config.downsample)
                if image.min() == image.max():
                    problems.append(
                        f"{entry.name}: constant after averaging over {config.downsample} pixels"
                    )
                    continue
                rows, facts = cut_micrograph(entry, micrograph, image, config)
                writer.write([row | {"micrograph_index": len(micrographs)} for row in rows])
                micrographs.append(facts)
        facts = {"micrographs": micrographs, "problems": problems}
        facts["num_bytes"] = path.stat().st_size
        (building / "cut.json").write_text(json.dumps(facts, indent=1))


def cut_micrograph(entry, micrograph, image, config) -> tuple[list[dict], dict]:
    """Return the rows of the tiles of a micrograph, and the facts of the whole.

    Labels (`micrograph.defects`) are not cut yet. Their masks would be another column of
    `make_features`, and `Batch.masks` has room for them.

    Args:
        entry: The micrograph's `Entry`.
        micrograph: The `Micrograph`.
        image: Its pixels after downsampling.
        config: `DataConfig`.
    """
    low, high, clipped = find_levels(image, config.intensity, config.percentiles)
    notices = list(micrograph.metadata.get("notices", ()))
    if config.intensity == "auto" and image.dtype == np.uint16:
        dark, bright, _ = find_levels(image, "percentile", (0.1, 99.9))
        if high - low > 3 * (bright - dark):
            notices.append(
                "a few hot or dead pixels take most of the range; see --tiles.intensity percentile"
            )
    size, shape = micrograph.pixel_size_nm, micrograph.image.shape
    common = {
        "micrograph": entry.name,
        "pixel_size_nm": size and float(size) * config.downsample,
        "specimen": entry.specimen or micrograph.specimen,
        "low": low,
        "high": high,
    }
    rows = []
    for row_px, col_px in find_tile_positions(shape, config.resolution, config.downsample):
        row, col = row_px // config.downsample, col_px // config.downsample
        tile = image[row : row + config.resolution, col : col + config.resolution]
        rows.append({"tile": tile, "row_px": row_px, "col_px": col_px} | common)
    facts = {
        "name": entry.name,
        "group": entry.group,
        "specimen": common["specimen"],
        "shape": list(shape),
        "dtype": str(micrograph.image.dtype),
        "pixel_size_nm": common["pixel_size_nm"],
        "pixel_hash": hash_pixels(micrograph.image),
        "num_tiles": len(rows),
        "fraction_clipped": clipped,
        "notices": notices,
    }
    return rows, facts


class TileWriter:
    """Writes tiles to an Arrow file, in the order in which they come.

    All tiles of a file have one type: uint8, until the first tile of 16 bits comes. What was
    written before is then rewritten as uint16.
    """

    def __init__(self, path: Path, resolution: int):
        self.path, self.resolution = path, resolution
        self._open(np.uint8)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None:
            self._flush()
        self.writer.close()
        self.file.close()

    def write(self, rows):
        """Append rows: dictionaries with the columns of `make_features`."""
        if self.dtype == np.uint8 and any(row["tile"].dtype == np.uint16 for row in rows):
            self._widen()
        self.waiting += rows
        if len(self.waiting) >= self.rows_per_write:
            self._flush()

    def _open(self, dtype):
        import pyarrow as pa

        self.dtype, self.waiting = np.dtype(dtype), []
        self.features = make_features(self.resolution, self.dtype)
        self.rows_per_write = max(1, WRITE_BYTES // (self.resolution**2 * self.dtype.itemsize))
        self.file = pa.OSFile(str(self.path), "wb")
        self.writer = pa.ipc.new_stream(self.file, self.features.arrow_schema)

    def _flush(self):
        import datasets

        if self.waiting:
            columns = {name: [row[name] for row in self.waiting] for name in self.features}
            columns["tile"] = np.stack(columns["tile"]).astype(self.dtype, copy=False)
            table = datasets.Dataset.from_dict(columns, features=self.features).data.table
            self.writer.write_table(table.combine_chunks())
            self.waiting = []

    def _widen(self):
        import datasets

        self.__exit__(None, None, None)
        written = self.path.rename(self.path.with_suffix(".8bit"))
        self._open(np.uint16)
        tiles = datasets.Dataset.from_file(str(written))
        for batch in tiles.with_format("arrow").iter(self.rows_per_write):
            self.writer.write_table(datasets.table.table_cast(batch, self.features.arrow_schema))
        written.unlink()


def make_features(resolution, dtype):
    """Return the columns of the data set of tiles."""
    import datasets
    from datasets import Value

    return datasets.Features(
        {
            "tile": datasets.Array2D((resolution, resolution), np.dtype(dtype).name),
            "micrograph": Value("string"),
            "micrograph_index": Value("int32"),
            "row_px": Value("int32"),
            "col_px": Value("int32"),
            "pixel_size_nm": Value("float64"),
            "specimen": Value("string"),
            "low": Value("int32"),
            "high": Value("int32"),
        }
    )
