"""Tiles and their views: a memory-mapped data set and an index."""

import hashlib
import json
from pathlib import Path

import numpy as np

from em_data.intensity import from_uint
from em_data.views import SYMMETRIES, apply_symmetry


class Cut:
    """The tiles of all micrographs of a source, memory-mapped: what `em_data.cutting.cut` left in a folder."""

    def __init__(self, folder):
        import datasets

        folder = Path(folder)
        self.key = folder.name
        facts = json.loads((folder / "cut.json").read_text())
        self.micrographs, self.problems = facts["micrographs"], facts["problems"]
        path = folder / "tiles.arrow"
        if path.stat().st_size != facts["num_bytes"]:
            raise OSError(f"{path} has {path.stat().st_size} bytes, not {facts['num_bytes']}")
        self.dataset = datasets.Dataset.from_file(str(path))
        table = self.dataset.data.table
        self.chunks = [
            _view_pixels(chunk) for chunk in table.column("tile").chunks
        ]  # each [n, R, R]
        sizes = [len(chunk) for chunk in self.chunks]
        self.chunk_of_tile = np.repeat(np.arange(len(sizes)), sizes)
        self.row_in_chunk = np.arange(sum(sizes)) - np.repeat(np.cumsum([0] + sizes[:-1]), sizes)
        self.low, self.high = (table.column(name).to_numpy() for name in ("low", "high"))
        self.micrograph_of_tile = table.column("micrograph_index").to_numpy()
        self.resolution, self.dtype = self.chunks[0].shape[-1], self.chunks[0].dtype
        self.num_tiles = len(self.chunk_of_tile)

    def tile(self, index):
        """Return one tile [R, R], a read-only view of the memory map."""
        return self.chunks[self.chunk_of_tile[index]][self.row_in_chunk[index]]


def _view_pixels(chunk):
    """View an Arrow array of tiles as numpy [n, R, R] without a copy."""
    num, (height, width) = len(chunk), chunk.type.shape
    return (
        chunk.storage.flatten().flatten().to_numpy(zero_copy_only=True).reshape(num, height, width)
    )


class Tiles:
    """One side of the split: views of raw tiles, each tile under each symmetry.

    num_tiles, num_views, num_symmetries, resolution; rows: the `datasets.Dataset` of the tiles (tile, micrograph, row_px,
    col_px, pixel_size_nm, specimen, low, high); fingerprint: hash of content and recipe.
    view_id = tile_id * num_symmetries + symmetry; only a leaky split, which draws views and not tiles, numbers the views that
    it drew in rising order instead: `locate` tells the tile and the symmetry of any view.
    """

    def __init__(self, cut, views, symmetries="paper"):
        self.cut = cut
        self.symmetries = SYMMETRIES[symmetries]
        self.num_symmetries = len(self.symmetries)
        self.resolution = cut.resolution
        views = np.asarray(views, dtype=np.int64)
        self._tiles, local = np.unique(
            views // self.num_symmetries, return_inverse=True
        )  # global ids of our tiles
        self._views = local * self.num_symmetries + views % self.num_symmetries
        self.num_tiles, self.num_views = len(self._tiles), len(self._views)
        digest = hashlib.sha256(f"{cut.key}:{symmetries}:".encode())
        digest.update(views)
        self.fingerprint = digest.hexdigest()[:32]
        self._rows = None

    def __len__(self):
        return self.num_views

    @property
    def rows(self):
        if self._rows is None:
            everything = self.num_tiles == self.cut.num_tiles
            self._rows = self.cut.dataset if everything else self.cut.dataset.select(self._tiles)
        return self._rows

    def locate(self, view_ids):
        """Return (tile ids, symmetries) of views, two int64 arrays [B]."""
        return np.divmod(self._views[np.asarray(view_ids, dtype=np.int64)], self.num_symmetries)

    def raw(self, tile_ids):
        """Return tiles as recorded, uint8 or uint16 [B, R, R]."""
        return self._gather(np.asarray(tile_ids, dtype=np.int64), np.zeros(len(tile_ids), np.int64))

    def raw_views(self, view_ids):
        """Return views as recorded, uint8 or uint16 [B, R, R]."""
        return self._gather(*self.locate(view_ids))

    def batch(self, view_ids):
        """Return views as float32 [B, 1, R, R] in [-1, 1], scaled by the levels of their micrographs."""
        tile_ids, symmetry = self.locate(view_ids)
        rows = self._tiles[tile_ids]
        pixels = self._gather(tile_ids, symmetry)
        return from_uint(pixels, self.cut.low[rows], self.cut.high[rows]).unsqueeze(1)

    def _gather(self, tile_ids, symmetry):
        pixels = np.empty((len(tile_ids), self.resolution, self.resolution), self.cut.dtype)
        for out, row, each in zip(pixels, self._tiles[tile_ids].tolist(), symmetry.tolist()):
            out[...] = apply_symmetry(self.cut.tile(row), self.symmetries[each])
        return pixels
