"""Tiles and their views: a memory-mapped data set and an index."""

import hashlib
import json
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from em_data.images import Ids
from em_data.intensity import from_uint
from em_data.split import group_micrographs
from em_data.views import SYMMETRIES, apply_symmetry


class Cut:
    """All tiles of a source, memory-mapped from the folder that `em_data.cutting.cut` wrote.

    Attributes:
        key: Hash of the source's content and of the recipe (`em_data.cutting.make_cut_key`).
        micrographs: One dictionary per micrograph: the facts of `em_data.cutting.cut_micrograph`.
        problems: One sentence per image that cannot be used.
        labels: Names of images that look like labels and are not used.
        near_copies: Pairs of indices of micrographs that show the same scene; None if the
            micrographs were not compared.
        dataset: `datasets.Dataset` with one row per tile.
        num_tiles: Number of tiles.
        resolution: Side of a tile in pixels.
        dtype: Type of the tiles: uint8 or uint16.
        chunks: Read-only arrays [n, R, R] of that type, grey levels as stored.
        starts: Number of the first tile of each chunk, and `num_tiles` at the end.
        low, high: int32 [num_tiles], grey levels as stored that become -1 and 1.
        micrograph_of_tile: int32 [num_tiles], index into `micrographs`.
    """

    def __init__(self, folder: str | Path):
        import datasets

        folder = Path(folder)
        self.key = folder.name
        facts = json.loads((folder / "cut.json").read_text())
        self.micrographs, self.problems = facts["micrographs"], facts["problems"]
        self.labels, self.near_copies = facts["labels"], facts["near_copies"]
        path = folder / "tiles.arrow"
        if path.stat().st_size != facts["num_bytes"]:
            raise OSError(f"{path} has {path.stat().st_size} bytes, not {facts['num_bytes']}")
        self.dataset = datasets.Dataset.from_file(str(path))
        table, tile = self.dataset.data.table, self.dataset.features["tile"]
        self.num_tiles, self.resolution = len(table), tile.shape[0]
        self.dtype = np.dtype(tile.dtype)
        self.chunks = [chunk.to_numpy() for chunk in table.column("tile").chunks]
        self.starts = list(accumulate(map(len, self.chunks), initial=0))
        self.low, self.high, self.micrograph_of_tile = (
            table.column(name).to_numpy() for name in ("low", "high", "micrograph_index")
        )

    def tile(self, index: int) -> np.ndarray:
        """Return one tile [R, R] as stored, a read-only view of the memory map."""
        chunk = bisect_right(self.starts, index) - 1
        return self.chunks[chunk][index - self.starts[chunk]]


class Tiles:
    """One side of the split: views of tiles.

    A view is a tile under a symmetry: view_id = tile_id * num_symmetries + symmetry. Only in a
    leaky split, which draws views instead of tiles, views are numbered in rising order without
    gaps; `locate` returns the tile and the symmetry of any view.

    The argument `views` holds ids in the whole cut. All methods take ids in this side: 0 to
    num_views - 1, or 0 to num_tiles - 1.

    Attributes:
        num_tiles, num_views, num_symmetries, resolution: Numbers.
        rows: `datasets.Dataset` with one row per tile: tile, micrograph, micrograph_index, row_px,
            col_px, pixel_size_nm, specimen, low, high.
        micrograph_ids: int64 [n], sorted indices into `Cut.micrographs` of this side's tiles.
        fingerprint: Hash of the cut and of this side's views. `summary["fingerprint"]` is not
            this hash, but `Cut.key`.
    """

    def __init__(self, cut: Cut, views: Ids, symmetries: str = "paper"):
        self.cut = cut
        self.symmetries = SYMMETRIES[symmetries]
        self.num_symmetries = len(self.symmetries)
        self.resolution = cut.resolution
        views = np.asarray(views, dtype=np.int64)
        # self._tiles: number in the cut of each of our tiles
        self._tiles, local = np.unique(views // self.num_symmetries, return_inverse=True)
        self._views = local * self.num_symmetries + views % self.num_symmetries
        self.num_tiles, self.num_views = len(self._tiles), len(self._views)
        self.micrograph_ids = np.unique(cut.micrograph_of_tile[self._tiles]).astype(np.int64)
        digest = hashlib.sha256(f"{cut.key}:{symmetries}:".encode())
        digest.update(views.tobytes())
        self.fingerprint = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return self.num_views

    @cached_property
    def rows(self) -> Any:
        is_whole = self.num_tiles == self.cut.num_tiles
        return self.cut.dataset if is_whole else self.cut.dataset.select(self._tiles)

    @cached_property
    def groups(self) -> np.ndarray:
        """Each tile's micrograph [num_tiles]; frames of a stack and near copies share a name."""
        names = group_micrographs(self.cut.micrographs, "micrograph", self.cut.near_copies or ())
        return np.array(names)[self.cut.micrograph_of_tile[self._tiles]]

    def locate(self, view_ids: Ids) -> tuple[np.ndarray, np.ndarray]:
        """Return (tile ids, symmetries) of views, two int64 arrays [B]."""
        return np.divmod(self._views[np.asarray(view_ids, dtype=np.int64)], self.num_symmetries)

    def raw(self, tile_ids: Ids) -> np.ndarray:
        """Return tiles as recorded, uint8 or uint16 [B, R, R]."""
        return self._gather(np.asarray(tile_ids, dtype=np.int64), np.zeros(len(tile_ids), np.int64))

    def raw_views(self, view_ids: Ids) -> np.ndarray:
        """Return views as recorded, uint8 or uint16 [B, R, R]."""
        return self._gather(*self.locate(view_ids))

    def batch(self, view_ids: Ids) -> torch.Tensor:
        """Return views as float32 [B, 1, R, R] in [-1, 1], scaled by their micrographs' levels."""
        tile_ids, symmetry = self.locate(view_ids)
        cut_tile_ids = self._tiles[tile_ids]
        pixels = self._gather(tile_ids, symmetry)
        low, high = self.cut.low[cut_tile_ids], self.cut.high[cut_tile_ids]
        return from_uint(pixels, low, high).unsqueeze(1)

    def _gather(self, tile_ids, symmetry):
        pixels = np.empty((len(tile_ids), self.resolution, self.resolution), self.cut.dtype)
        for out, row, each in zip(pixels, self._tiles[tile_ids].tolist(), symmetry.tolist()):
            out[...] = apply_symmetry(self.cut.tile(row), self.symmetries[each])
        return pixels
