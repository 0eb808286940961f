"""Say before a training when the structures of the micrographs do not suit its tiles."""

import shlex
from collections.abc import Callable

import numpy as np

from em_data.look.recommendation import choose_scale
from em_data.look.structure_size import measure_structure_size
from em_data.tiles import Cut

MOST_MICROGRAPHS = 6
MOSAIC_PX = 768  # tiles of a micrograph are put together up to this side
SMALLEST, LARGEST = 1 / 32, 1 / 2  # share of a tile's side beyond which structures do not suit it


def warn_of_tile_size(cut: Cut, downsample: int, source: str, log: Callable[[str], object]) -> None:
    """Say through `log`, in two lines, when structures are much larger or smaller than a tile.

    Structures are measured on at most 6 micrographs, which takes less than a second.

    Args:
        cut: All tiles, as of `Tiles.cut`.
        downsample: Of the cut.
        source: As of `load_data`, for the command that the second line names.
    """
    size = measure_tiles(cut, downsample)
    if size is None or SMALLEST <= size / cut.resolution <= LARGEST:
        return
    shapes = [each["shape"] for each in cut.micrographs]
    better = choose_scale(size * downsample, size * downsample, shapes)
    if better == (cut.resolution, downsample):
        return
    share = size / cut.resolution
    meaning = (
        "most tiles show a part of one" if share > LARGEST else "their details are a few pixels"
    )
    log(
        f"Structures are about {size:.2g} px across in tiles of {cut.resolution} px "
        f"({100 * share:.0f} % of the side): {meaning}."
    )
    log(
        f"--tiles.resolution {better[0]} --tiles.downsample {better[1]} suits them better; "
        f"`python -m em_data.look {shlex.quote(str(source))}` shows such tiles."
    )


def measure_tiles(cut: Cut, downsample: int) -> float | None:
    """Return the median diameter of structures in pixels of the tiles, or None."""
    num = len(cut.micrographs)
    numbers = np.unique(np.linspace(0, num - 1, min(num, MOST_MICROGRAPHS)).round().astype(int))
    sizes = [measure_structure_size(join_tiles(cut, number, downsample)) for number in numbers]
    diameters = [size.diameter_px for size in sizes if size is not None]
    return float(np.median(diameters)) if diameters else None


def join_tiles(cut: Cut, number: int, downsample: int) -> np.ndarray:
    """Return the upper left tiles of a micrograph as one image [H, W], at most MOSAIC_PX a side."""
    first, end = np.searchsorted(cut.micrograph_of_tile, [number, number + 1])
    corners = np.stack([_read(cut, name)[first:end] for name in ("row_px", "col_px")], axis=1)
    places = (corners - corners.min(axis=0)) // (cut.resolution * downsample)
    shape = np.minimum(places.max(axis=0) + 1, max(1, MOSAIC_PX // cut.resolution))
    image = np.full(shape * cut.resolution, cut.tile(int(first)).mean(), np.float32)
    for i, (row, col) in zip(range(first, end), places * cut.resolution):
        if row < image.shape[0] and col < image.shape[1]:
            image[row : row + cut.resolution, col : col + cut.resolution] = cut.tile(i)
    return image


def _read(cut, name):
    return cut.dataset.data.table.column(name).to_numpy()
