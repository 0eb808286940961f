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
from em_data.micrograph import Defect
from em_data.split import group_micrographs
from em_data.tile_labels import TileLabels, turn_defect
from em_data.views import SYMMETRIES, apply_symmetry


class Cut:
    """All tiles of a source, memory-mapped from the folder that `em_data.cutting.cut` wrote.

    Attributes:
        key: Hash of the source's content and of the recipe (`em_data.cutting.make_cut_key`).
        micrographs: One dictionary per micrograph: the facts of `em_data.cutting.cut_micrograph`.
        problems: One sentence per image that cannot be used.
        labels: Names of images that look like labels and are not used.
        kinds: Kinds of the labelled defects, sorted; () if no micrograph has labels.
        class_names: Classes of the micrographs, sorted; () if none is known.
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
        self.kinds = tuple(sorted({k for m in self.micrographs for k in m["defects"] or ()}))
        self.class_names = tuple(sorted({m["class_name"] for m in self.micrographs} - {None}))
        num_bytes = facts["num_label_bytes"]
        self.tile_labels = num_bytes and TileLabels(folder / "labels.npz", num_bytes)
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
        kinds: Kinds of defects of the whole cut, sorted; () if nothing is labelled.
        class_names: Classes of the micrographs of the whole cut, sorted; () if none is known.
        micrograph_ids: int64 [n], sorted indices into `Cut.micrographs` of this side's tiles.
        fingerprint: Hash of the cut and of this side's views. `summary["fingerprint"]` is not
            this hash, but `Cut.key`.
    """

    def __init__(self, cut: Cut, views: Ids, symmetries: str = "paper"):
        self.cut = cut
        self.symmetries = SYMMETRIES[symmetries]
        self.num_symmetries = len(self.symmetries)
        self.resolution = cut.resolution
        self.kinds, self.class_names = cut.kinds, cut.class_names
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

    @cached_property
    def is_labelled(self) -> np.ndarray:
        """Whether each tile's micrograph has labels, bool [num_tiles]; the tile may have none."""
        is_labelled = np.array([each["defects"] is not None for each in self.cut.micrographs])
        return is_labelled[self.cut.micrograph_of_tile[self._tiles]]

    @cached_property
    def _classes(self):
        """Number of each tile's class, int64 [num_tiles]."""
        numbers = {name: i for i, name in enumerate(self.class_names)}
        classes = np.array([numbers.get(each["class_name"], -1) for each in self.cut.micrographs])
        return classes[self.cut.micrograph_of_tile[self._tiles]]

    def locate(self, view_ids: Ids) -> tuple[np.ndarray, np.ndarray]:
        """Return (tile ids, symmetries) of views, two int64 arrays [B]."""
        return np.divmod(self._views[np.asarray(view_ids, dtype=np.int64)], self.num_symmetries)

    def raw(self, tile_ids: Ids) -> np.ndarray:
        """Return tiles as recorded, uint8 or uint16 [B, R, R]."""
        return self._gather(np.asarray(tile_ids, dtype=np.int64), np.zeros(len(tile_ids), np.int64))

    def batch(self, view_ids: Ids) -> torch.Tensor:
        """Return views as float32 [B, 1, R, R] in [-1, 1], scaled by their micrographs' levels."""
        tile_ids, symmetry = self.locate(view_ids)
        cut_tile_ids = self._tiles[tile_ids]
        pixels = self._gather(tile_ids, symmetry)
        low, high = self.cut.low[cut_tile_ids], self.cut.high[cut_tile_ids]
        return from_uint(pixels, low, high).unsqueeze(1)

    def defects(self, view_id: int) -> list[Defect]:
        """Return the labelled defects of a view, in its pixels.

        Boxes lie inside the view. Masks are bool inside their boxes, or None if only the box is
        labelled. Diameters and lengths are those of the whole defect; metadata["is_cut_by_border"]
        tells whether a part of it lies outside.
        """
        if not self.cut.tile_labels:
            return []
        tile_ids, symmetry = self.locate([view_id])
        name = self.symmetries[symmetry[0]]
        defects = self.cut.tile_labels.defects(self._tiles[tile_ids[0]])
        return [turn_defect(each, name, self.resolution) for each in defects]

    def masks(self, view_ids: Ids) -> torch.Tensor:
        """Return float32 [B, K, R, R] of 0 and 1: where the defects of each kind are.

        The channels are `kinds`. A defect that is labelled by a box only fills its box. A view
        without labels has zeros; see `is_labelled`.
        """
        tile_ids, symmetry = self.locate(view_ids)
        shape = (len(self.kinds), self.resolution, self.resolution)
        masks = np.zeros((len(tile_ids), *shape), np.float32)
        if not self.cut.tile_labels:
            return torch.from_numpy(masks)
        drawn = np.zeros(shape, np.float32)
        for out, tile, each in zip(masks, self._tiles[tile_ids].tolist(), symmetry.tolist()):
            drawn[...] = 0
            self.cut.tile_labels.draw(tile, self.kinds, drawn)
            out[...] = apply_symmetry(drawn, self.symmetries[each])
        return torch.from_numpy(masks)

    def class_labels(self, view_ids: Ids) -> torch.Tensor | None:
        """Return int64 [B], indices into `class_names`; None if the data have no classes.

        A micrograph of unknown class beside others of known class has -1.
        """
        if not self.class_names:
            return None
        return torch.from_numpy(self._classes[self.locate(view_ids)[0]])

    def _gather(self, tile_ids, symmetry):
        pixels = np.empty((len(tile_ids), self.resolution, self.resolution), self.cut.dtype)
        for out, row, each in zip(pixels, self._tiles[tile_ids].tolist(), symmetry.tolist()):
            out[...] = apply_symmetry(self.cut.tile(row), self.symmetries[each])
        return pixels
