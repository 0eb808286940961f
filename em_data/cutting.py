"""Cut micrographs into tiles, once, and write them to a file that is memory-mapped later."""

import hashlib
import json
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np

from em_data.files import build_folder
from em_data.intensity import describe_narrow, describe_spikes, find_levels
from em_data.label_images import is_label_image
from em_data.labels.describe import count_defects
from em_data.metadata import pixel_size_from_path
from em_data.near_copies import MAX_FOR_CROPS, find_near_copies, make_signature, pair_equals
from em_data.padding import find_padding
from em_data.sources.base import SourceLost
from em_data.spikes import iterate_slabs
from em_data.tile_labels import LabelWriter
from em_data.views import hash_pixels

FORMAT = 3  # of the cached folder; a change makes all cached tiles invalid
MAX_PROBLEMS = 5  # of the frames of one stack that are told one by one
MAX_PADDING = 0.1  # share of a tile
WRITE_BYTES = 32 * 2**20  # tiles are written so many bytes at a time


def find_tile_positions(shape, resolution, downsample=1) -> list[tuple[int, int]]:
    """Return the upper left corners (row_px, col_px) of the tiles of a micrograph of shape (H, W).

    Tiles do not overlap and start at the upper left. What is left over at the right and the bottom
    is not used. `resolution` is the side of a tile after downsampling.
    """
    side = resolution * downsample
    rows, columns = (range(0, length - side + 1, side) for length in shape)
    return [(row, col) for row in rows for col in columns]


def average_area(image, factor, low=None, high=None):
    """Return the rounded means over squares of `factor` x `factor` pixels, in the image's type.

    With `low` and `high`, grey levels are clipped to them first.
    """
    if factor == 1:
        return image
    height, width = image.shape[0] // factor, image.shape[1] // factor
    averaged = np.empty((height, width), image.dtype)
    for rows in iterate_slabs(image[: height * factor : factor]):
        slab = image[rows.start * factor : rows.stop * factor][: height * factor, : width * factor]
        if low is not None:
            slab = np.clip(slab, low, high)
        squares = slab.reshape(-1, factor, width, factor)
        averaged[rows] = np.rint(squares.mean(axis=(1, 3), dtype=np.float64))
    return averaged


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
        "pixel_size_nm": config.pixel_size_nm,
        "pixel_size_pattern": config.pixel_size_pattern
        and [config.pixel_size_pattern, source.name],
    }
    if config.frame_step != 1:
        recipe["frame_step"] = config.frame_step
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]


def cut(source, config, folder, compares=True):
    """Cut the micrographs of a source into a new folder, which `em_data.tiles.Cut` reads.

    It holds tiles.arrow (a `datasets.Dataset`), cut.json (facts of the micrographs, the problems of
    those that cannot be used, names of label images, and pairs of near copies if the micrographs
    are compared) and, if a micrograph has labels, labels.npz.
    """
    micrographs, signatures, problems, labels = [], [], [], []
    label_writer = LabelWriter()
    with_points = len(source.entries) <= MAX_FOR_CROPS
    side_px = config.resolution * config.downsample
    with build_folder(folder) as building:
        path = building / "tiles.arrow"
        with closing(TileWriter(path, config.resolution)) as writer:
            for entry, micrograph in read_all(source.entries, side_px, problems):
                micrograph.pixel_size_nm = find_pixel_size(source, micrograph, config)
                if is_label_image(micrograph.image, micrograph.name):
                    labels.append(micrograph.name)
                    continue
                try:
                    padding = find_padding(micrograph.image)
                    image, levels = downsample(micrograph.image, padding, config)
                except MemoryError:
                    problems.append(f"{micrograph.name}: needs more memory than there is")
                    continue
                if image.min() == image.max():
                    problems.append(
                        f"{micrograph.name}: constant after averaging over "
                        f"{config.downsample} pixels"
                    )
                    continue
                records, facts = cut_micrograph(entry, micrograph, image, padding, levels, config)
                if not records:
                    problems.append(
                        f"{micrograph.name}: every tile has one grey level or more than "
                        f"{MAX_PADDING:.0%} padding"
                    )
                    continue
                for record in records:
                    writer.write(record | {"micrograph_index": len(micrographs)})
                corners = [(record["row_px"], record["col_px"]) for record in records]
                label_writer.write(micrograph, corners, config.resolution, config.downsample)
                micrographs.append(facts)
                if compares:
                    signatures.append(make_signature(micrograph.image, with_points))
            writer.finish()
        facts = {"micrographs": micrographs, "problems": problems, "labels": labels}
        known = (pair_equals(each[key] for each in micrographs) for key in ("group", "pixel_hash"))
        facts["near_copies"] = find_near_copies(signatures, chain(*known)) if compares else None
        facts["num_bytes"] = path.stat().st_size
        facts["num_label_bytes"] = label_writer.finish(building / "labels.npz")
        (building / "cut.json").write_text(json.dumps(facts, indent=1))


def read_all(entries, min_side_px, problems):
    """Yield (entry, micrograph) of usable entries; append a sentence per other one to problems."""
    for entry in entries:
        refused = []
        frames = iter(entry.frames())
        while True:
            try:
                micrograph = next(frames, None)
                if micrograph is None:
                    break
                refuse_unusable(micrograph, min_side_px)
            except SourceLost:
                raise
            except ValueError as error:  # of one frame; the others go on
                refused.append(str(error))
            else:
                yield entry, micrograph
            micrograph = None  # the next one is read before this name gets it
        problems += refused[:MAX_PROBLEMS]
        if len(refused) > MAX_PROBLEMS:
            num = len(refused) - MAX_PROBLEMS
            problems.append(f"{entry.name}: {num} more frames cannot be used")


def refuse_unusable(micrograph, min_side_px):
    """Raise a ValueError if a micrograph is too small or constant."""
    image = micrograph.image
    if min(image.shape) < min_side_px:
        raise ValueError(
            f"{micrograph.name}: {image.shape[0]} x {image.shape[1]} pixels, smaller than one tile "
            f"of {min_side_px}"
        )
    if image.min() == image.max():
        raise ValueError(f"{micrograph.name}: constant: every pixel is {int(image.min())}")


def find_pixel_size(source, micrograph, config) -> float | None:
    """Return the pixel size in nm: by the file, else by its path, else by the flag."""
    size = micrograph.pixel_size_nm
    if not size and config.pixel_size_pattern is not None:
        path, width_px = f"{source.name}/{micrograph.name}", micrograph.image.shape[1]
        size = pixel_size_from_path(path, config.pixel_size_pattern, width_px)
    return size or config.pixel_size_nm


def downsample(image, padding, config) -> tuple[np.ndarray, tuple[int, int, float]]:
    """Return an image averaged over squares, and its levels as of `find_levels`.

    Spikes are found and clipped before they are averaged with their neighbours. `padding` is as of
    `find_padding`; with intensity "auto", its grey level does not count.
    """
    if config.intensity != "auto" or config.downsample == 1 or image.dtype == np.uint8:
        image = average_area(image, config.downsample)
        return image, find_levels(
            _fill(image, padding, config), config.intensity, config.percentiles
        )
    low, high, clipped = find_levels(_fill(image, padding, config), "auto")
    image = average_area(image, config.downsample, low, high)
    return image, (int(image.min()), int(image.max()), clipped)


def _fill(image, padding, config):
    """Return an image of 16 bits whose padding has a level of the micrograph, for `find_levels`."""
    is_counted = config.intensity != "auto" or image.dtype == np.uint8
    if padding is None or is_counted or padding.all():
        return image
    filled = image.copy()
    filled[padding] = image.flat[np.argmin(padding)]  # the first that is none
    return filled


def cut_micrograph(entry, micrograph, image, padding, levels, config) -> tuple[list[dict], dict]:
    """Return one record per tile, for `TileWriter.write`, and the facts of the whole micrograph.

    The tiles keep their grey levels: `low` and `high` are only stored here, and `Tiles.batch`
    scales by them. `image` has the pixels after downsampling, `levels` are its levels as of
    `find_levels`. `padding` is that of the micrograph, as of `find_padding`; tiles with much of it
    and tiles with one grey level are left out.
    """
    low, high, clipped = levels
    notices = list(micrograph.metadata.get("notices", ()))
    if config.intensity == "auto" and clipped:
        num_pixels = micrograph.image.size
        spikes = describe_spikes(round(clipped * num_pixels), num_pixels)
        notices.append(f"{spikes} outside of {low} to {high}: clipped")
    if config.intensity == "auto" and image.dtype == np.uint16:
        notices += describe_narrow(image, low, high)
    clipped += micrograph.metadata.get("num_spikes", 0) / micrograph.image.size
    size, shape = micrograph.pixel_size_nm, micrograph.image.shape
    common = {
        "micrograph": micrograph.name,
        "pixel_size_nm": size and float(size) * config.downsample,
        "specimen": entry.specimen or micrograph.specimen,
        "low": low,
        "high": high,
    }
    records, side, num_left_out = [], config.resolution * config.downsample, 0
    for row_px, col_px in find_tile_positions(shape, config.resolution, config.downsample):
        row, col = row_px // config.downsample, col_px // config.downsample
        tile = image[row : row + config.resolution, col : col + config.resolution]
        is_padding = padding is not None and (
            padding[row_px : row_px + side, col_px : col_px + side].mean() > MAX_PADDING
        )
        if is_padding or tile.min() == tile.max():
            num_left_out += 1
        else:
            records.append({"tile": tile, "row_px": row_px, "col_px": col_px} | common)
    if num_left_out:
        notices.append(
            f"{num_left_out} of {num_left_out + len(records)} tiles left out: one grey level, or "
            f"more than {MAX_PADDING:.0%} padding"
        )
    facts = {
        "name": micrograph.name,
        "group": entry.group,
        "specimen": common["specimen"],
        "shape": list(shape),
        "dtype": str(micrograph.image.dtype),
        "pixel_size_nm": common["pixel_size_nm"],
        "pixel_hash": hash_pixels(micrograph.image),
        "num_tiles": len(records),
        "fraction_clipped": clipped,
        **count_defects(micrograph),
        "notices": notices,
    }
    return records, facts


class TileWriter:
    """Writes tiles to an Arrow file, in the order in which they come.

    All tiles of a file have one type: uint8, until the first tile of 16 bits comes. What was
    written before is then rewritten as uint16.
    """

    def __init__(self, path: Path, resolution: int):
        self.path, self.resolution = path, resolution
        self._open(np.dtype(np.uint8))

    def _open(self, dtype):
        from datasets.arrow_writer import ArrowWriter

        self.dtype = dtype
        self.records_per_write = max(1, WRITE_BYTES // (self.resolution**2 * dtype.itemsize))
        self.writer = ArrowWriter(
            path=str(self.path),
            features=make_features(self.resolution, dtype),
            writer_batch_size=self.records_per_write,
        )

    def write(self, record):
        """Append a record: a dictionary with the columns of `make_features`."""
        if record["tile"].dtype.itemsize > self.dtype.itemsize:
            self._widen()
        self.writer.write(record | {"tile": record["tile"].astype(self.dtype, copy=False)})

    def finish(self):
        self.writer.finalize()

    def close(self):
        self.writer.close()

    def _widen(self):
        import datasets

        self.writer.finalize()
        written = self.path.rename(self.path.with_suffix(".8bit"))
        self._open(np.dtype(np.uint16))
        tiles = datasets.Dataset.from_file(str(written)).with_format("arrow")
        for table in tiles.iter(self.records_per_write):
            self.writer.write_table(table)
        written.unlink()


def make_features(resolution, dtype):
    """Return the columns of the data set of tiles."""
    import datasets
    from datasets import Value

    return datasets.Features(
        {
            "tile": datasets.Array2D((resolution, resolution), dtype.name),
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
