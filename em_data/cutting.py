"""Micrographs -> raw tiles in a memory-mapped file, once."""

import hashlib
import json

import numpy as np

from em_data.checks import hash_pixels, read_all, summarise_problems
from em_data.files import build_folder
from em_data.intensity import find_levels

FORMAT = 1  # of the cached folder; a change makes every cached cut a stranger
BYTES_PER_RECORD_BATCH = 32 * 2**20


def find_tile_positions(shape, resolution, downsample=1):
    """Return the upper left corners (row_px, col_px) of the tiles of a micrograph, in its own pixels.

    shape: (H, W) of the micrograph. Tiles do not overlap and start at the upper left; a rest at the right and the bottom that
    holds no whole tile is not used.
    """
    side = resolution * downsample
    return [
        (row * side, col * side)
        for row in range(shape[0] // side)
        for col in range(shape[1] // side)
    ]


def count_tiles(shapes, resolution, downsample=1):
    """Return how many tiles the cutter makes of micrographs of these shapes [(H, W), ...]."""
    return sum(len(find_tile_positions(shape, resolution, downsample)) for shape in shapes)


def average_area(image, factor):
    """Shrink an image [H, W] by the mean over squares of factor x factor pixels, rounded, in its own type."""
    if factor == 1:
        return image
    height, width = image.shape[0] // factor, image.shape[1] // factor
    squares = image[: height * factor, : width * factor].reshape(height, factor, width, factor)
    return np.rint(squares.mean(axis=(1, 3), dtype=np.float64)).astype(image.dtype)


def make_cut_key(source, config):
    """Return the hash of everything that decides the tiles: the content of the source and the recipe."""
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
    """Cut the micrographs of a source into `folder`: tiles.arrow, and cut.json with the micrographs and the problems."""
    problems = []
    with build_folder(folder) as building:
        is_16_bit = any(entry.bits == 16 for entry in source.entries)
        for dtype in (np.uint16,) if is_16_bit else (np.uint8, np.uint16):
            problems.clear()
            micrographs = _write_tiles(source, config, building / "tiles.arrow", dtype, problems)
            if micrographs is not None:
                break
        summarise_problems(problems, len(source.entries), config.on_bad_image, source.ignored)
        facts = {
            "micrographs": micrographs,
            "problems": problems,
            "num_bytes": (building / "tiles.arrow").stat().st_size,
        }
        (building / "cut.json").write_text(json.dumps(facts, indent=1))


def _write_tiles(source, config, path, dtype, problems):
    """Write all tiles as `dtype`; return the micrographs' facts, or None if a 16-bit one does not fit into 8."""
    import pyarrow as pa

    resolution, facts, waiting = config.resolution, [], []
    features = make_features(resolution, dtype)
    schema = features.arrow_schema
    rows_per_batch = max(1, BYTES_PER_RECORD_BATCH // (resolution**2 * np.dtype(dtype).itemsize))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for entry, micrograph in read_all(source.entries, resolution * config.downsample, problems):
            if micrograph.image.dtype == np.uint16 and dtype == np.uint8:
                return None
            rows, fact = cut_micrograph(entry, micrograph, config)
            if fact is None:
                problems.append(
                    f"{micrograph.name}: constant after averaging over {config.downsample} pixels"
                )
                continue
            for row in rows:
                row["micrograph_index"] = len(facts)
            facts.append(fact)
            waiting += rows
            while len(waiting) >= rows_per_batch:
                writer.write_batch(_make_record_batch(waiting[:rows_per_batch], schema, dtype))
                waiting = waiting[rows_per_batch:]
        if waiting:
            writer.write_batch(_make_record_batch(waiting, schema, dtype))
    return facts


def cut_micrograph(entry, micrograph, config):
    """Return (rows, facts) of one micrograph: its tiles with what is known of each, and a summary of the whole.

    Facts are None if nothing but one grey level is left after averaging.
    """
    image = average_area(micrograph.image, config.downsample)
    if image.min() == image.max():
        return [], None
    low, high, clipped = find_levels(image, config.intensity, config.percentiles)
    notices = list(micrograph.metadata.get("notices", ()))
    if config.intensity == "auto" and image.dtype == np.uint16:
        dark, bright, _ = find_levels(image, "percentile", (0.1, 99.9))
        if high - low > 3 * (bright - dark):
            notices.append(
                "a few hot or dead pixels take most of the range; see --tiles.intensity percentile"
            )
    pixel_size_nm = micrograph.pixel_size_nm and float(micrograph.pixel_size_nm) * config.downsample
    specimen = entry.specimen or micrograph.specimen
    rows = []
    for row_px, col_px in find_tile_positions(
        micrograph.image.shape, config.resolution, config.downsample
    ):
        row, col = row_px // config.downsample, col_px // config.downsample
        tile = image[row : row + config.resolution, col : col + config.resolution]
        rows.append(
            {
                "tile": tile,
                "micrograph": entry.name,
                "row_px": row_px,
                "col_px": col_px,
                "pixel_size_nm": pixel_size_nm,
                "specimen": specimen,
                "low": low,
                "high": high,
            }
        )
    facts = {
        "name": entry.name,
        "group": entry.group,
        "specimen": specimen,
        "shape": list(micrograph.image.shape),
        "dtype": str(micrograph.image.dtype),
        "pixel_size_nm": pixel_size_nm,
        "pixel_hash": hash_pixels(micrograph.image),
        "num_tiles": len(rows),
        "fraction_clipped": clipped,
        "notices": notices,
    }
    return rows, facts


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


def _make_record_batch(rows, schema, dtype):
    import pyarrow as pa

    columns = []
    for field in schema:
        values = [row[field.name] for row in rows]
        if field.name == "tile":
            pixels = np.stack(values).astype(dtype, copy=False)
            num, height, width = pixels.shape
            lines = pa.ListArray.from_arrays(
                _offsets(num * height, width), pa.array(pixels.ravel())
            )
            storage = pa.ListArray.from_arrays(_offsets(num, height), lines)
            columns.append(pa.ExtensionArray.from_storage(field.type, storage))
        else:
            columns.append(pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _offsets(num, step):
    import pyarrow as pa

    return pa.array(np.arange(num + 1, dtype=np.int32) * step)
