"""Labels of tiles: defects cut with the pixels, kept as run lengths, turned with the views.

The file labels.npz of a cut holds the defects of all tiles, one after another. A cut without labels
has no such file.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from em_data.labels.masks import crop_mask, fit_box
from em_data.labels.runs import decode_runs, encode_runs
from em_data.micrograph import IS_CUT, Defect
from em_data.views import ELEMENTS, apply_symmetry


def cut_defects(defects, shape, corners, resolution, factor=1) -> list[list[Defect]]:
    """Return the defects of each tile, in pixels of the tile.

    Of a defect that lies in several tiles, each has its part, with the least box around it.
    Diameters and lengths stay those of the whole defect.

    Args:
        defects: Defects of a micrograph.
        shape: (H, W) of the micrograph.
        corners: (row_px, col_px) of the tiles, as of `em_data.cutting.find_tile_positions`.
        resolution: Side of a tile in pixels.
        factor: Pixels of the micrograph per pixel of a tile, along one side.
    """
    side = resolution * factor
    numbers = {(row // side, col // side): i for i, (row, col) in enumerate(corners)}
    tiles: list[list[Defect]] = [[] for _ in corners]
    for whole in defects:
        defect = downsample_defect(whole, shape, factor)
        if defect is None:
            continue
        x0, y0, x1, y1 = defect.box_px
        for row in range(y0 // resolution, (y1 - 1) // resolution + 1):
            for col in range(x0 // resolution, (x1 - 1) // resolution + 1):
                i = numbers.get((row, col))
                if i is None:  # a tile that is left out
                    continue
                part = _cut_defect(defect, (row * resolution, col * resolution), resolution)
                if part is not None:
                    tiles[i].append(part)
    return tiles


def downsample_defect(defect, shape, factor) -> Defect | None:
    """Return a defect in the pixels of a micrograph averaged over squares of `factor` pixels.

    A pixel belongs to the defect if at least half of its square does. A defect without such a pixel
    keeps the one that it covers most. None if it lies outside of all whole squares.
    """
    height, width = shape
    x0, y0, x1, y1 = defect.box_px
    box = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if box[0] >= box[2] or box[1] >= box[3]:
        return None
    mask = crop_mask(defect, shape)
    inside = np.ones((y1 - y0, x1 - x0), bool) if mask is None else mask
    inside = inside[box[1] - y0 : box[3] - y0, box[0] - x0 : box[2] - x0]
    if factor > 1:
        box, inside = _average(box, inside, factor)
        inside = inside[: height // factor - box[1], : width // factor - box[0]]
    if not inside.any():
        return None
    covered = inside >= 0.5
    if not covered.any():
        covered.flat[inside.argmax()] = True
    fitted = fit_box(box, covered)
    assert fitted is not None
    return replace(defect, box_px=fitted[0], mask=None if mask is None else fitted[1])


def _average(box, inside, factor):
    """Return the box around the squares that a box touches, and the covered share of each."""
    x0, y0, x1, y1 = box
    left, top, right, bottom = x0 // factor, y0 // factor, -(-x1 // factor), -(-y1 // factor)
    squares = np.zeros(((bottom - top) * factor, (right - left) * factor), bool)
    squares[y0 - top * factor : y1 - top * factor, x0 - left * factor : x1 - left * factor] = inside
    shares = squares.reshape(bottom - top, factor, right - left, factor).mean(axis=(1, 3))
    return (left, top, right, bottom), shares


def _cut_defect(defect, corner, resolution):
    """Return the part of a defect in the tile at `corner` (row, col), or None."""
    (top, left), (x0, y0, x1, y1) = corner, defect.box_px
    box = max(x0, left), max(y0, top), min(x1, left + resolution), min(y1, top + resolution)
    is_cut, mask = box != defect.box_px, defect.mask
    if mask is not None:
        fitted = fit_box(box, mask[box[1] - y0 : box[3] - y0, box[0] - x0 : box[2] - x0])
        if fitted is None:
            return None
        box, mask = fitted
    box = box[0] - left, box[1] - top, box[2] - left, box[3] - top
    is_cut = is_cut or bool(defect.metadata.get(IS_CUT))
    return replace(defect, box_px=box, mask=mask, metadata={IS_CUT: is_cut})


def turn_defect(defect, symmetry, side) -> Defect:
    """Return a defect of a square of `side` pixels under a symmetry (a key of `ELEMENTS`)."""
    transpose, flip_rows, flip_columns = ELEMENTS[symmetry]
    x0, y0, x1, y1 = defect.box_px
    if transpose:
        x0, y0, x1, y1 = y0, x0, y1, x1
    if flip_rows:
        y0, y1 = side - y1, side - y0
    if flip_columns:
        x0, x1 = side - x1, side - x0
    mask = defect.mask
    if mask is not None:
        mask = np.ascontiguousarray(apply_symmetry(mask, symmetry))
    return replace(defect, box_px=(x0, y0, x1, y1), mask=mask)


class LabelWriter:
    """Collects the defects of tiles, in the order of the tiles, and writes them to a file."""

    def __init__(self):
        self.counts, self.rows, self.sizes_nm, self.runs, self.kinds = [], [], [], [], {}
        self.is_needed = False

    def write(self, micrograph, corners, resolution, factor) -> None:
        """Append the defects of the tiles of a micrograph; it may have no labels."""
        if micrograph.defects is None:
            self.counts += [0] * len(corners)
            return
        self.is_needed = True
        shape = micrograph.image.shape
        for defects in cut_defects(micrograph.defects, shape, corners, resolution, factor):
            self.counts.append(len(defects))
            for each in defects:
                kind = self.kinds.setdefault(each.kind, len(self.kinds))
                runs = [] if each.mask is None else encode_runs(each.mask)
                self.rows.append((kind, *each.box_px, each.metadata[IS_CUT], len(runs)))
                self.sizes_nm.append((each.diameter_nm, each.length_nm))
                self.runs.append(np.array(runs, np.uint32))

    def finish(self, path: Path) -> int | None:
        """Write the file and return its number of bytes; None if no micrograph has labels."""
        if not self.is_needed:
            return None
        np.savez(
            path,
            kinds=np.array(list(self.kinds), str),
            starts=np.cumsum([0, *self.counts]),
            rows=np.array(self.rows, np.int32).reshape(-1, 7),
            sizes_nm=np.array(self.sizes_nm, np.float64).reshape(-1, 2),
            runs=np.concatenate([np.empty(0, np.uint32), *self.runs]),
        )
        return path.stat().st_size


class TileLabels:
    """Reads what a `LabelWriter` wrote.

    Args:
        path: The file.
        num_bytes: Its number of bytes.

    Raises:
        OSError: The file is absent or damaged.
    """

    def __init__(self, path: Path, num_bytes: int):
        if path.stat().st_size != num_bytes:
            raise OSError(f"{path} has {path.stat().st_size} bytes, not {num_bytes}")
        with np.load(path) as file:
            self.kinds = [str(kind) for kind in file["kinds"]]
            self.starts, self.rows, self.sizes_nm = file["starts"], file["rows"], file["sizes_nm"]
            self.runs = file["runs"]
        self.run_starts = np.cumsum([0, *self.rows[:, 6]])

    def defects(self, tile: int) -> list[Defect]:
        """Return the defects of a tile, in its pixels."""
        return [self._read(i) for i in range(self.starts[tile], self.starts[tile + 1])]

    def draw(self, tile: int, kinds: Sequence[str], out: np.ndarray) -> None:
        """Set to 1 the pixels of each kind's defects in `out`, zeros [K, R, R]."""
        for defect in self.defects(tile):
            x0, y0, x1, y1 = defect.box_px
            part = out[kinds.index(defect.kind), y0:y1, x0:x1]
            part[... if defect.mask is None else defect.mask] = 1

    def _read(self, i) -> Defect:
        kind, x0, y0, x1, y1, is_cut, num_runs = self.rows[i].tolist()
        runs = self.runs[self.run_starts[i] : self.run_starts[i] + num_runs]
        mask = decode_runs(runs, (y1 - y0, x1 - x0)) if num_runs else None
        diameter_nm, length_nm = (None if np.isnan(x) else float(x) for x in self.sizes_nm[i])
        return Defect(
            self.kinds[kind],
            (x0, y0, x1, y1),
            mask,
            diameter_nm,
            length_nm,
            {IS_CUT: bool(is_cut)},
        )
