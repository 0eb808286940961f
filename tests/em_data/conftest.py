import numpy as np
import pytest

from em_data import DataConfig, Tiles
from em_data.cutting import cut
from em_data.sources.base import Entry, Source
from em_data.tiles import Cut
from em_data.views import SYMMETRIES


@pytest.fixture
def config(tmp_path):
    """A small recipe with a cache of its own; `config(symmetries="d4")` changes it."""

    def make(**changes):
        return DataConfig(**{"resolution": 16, "cache_dir": str(tmp_path / ".cache"), **changes})

    return make


@pytest.fixture
def noise():
    """Micrographs of noise: `noise(seed, shape, dtype)`."""

    def make(seed=0, shape=(32, 48), dtype=np.uint8):
        return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)

    return make


@pytest.fixture
def source_of():
    """A source of given micrographs, without files."""

    def make(micrographs):
        entries = [Entry(m.name, f"key of {m.name}", lambda m=m: [m]) for m in micrographs]
        return Source("given", entries, [])

    return make


@pytest.fixture
def tiles_of(config, source_of, tmp_path):
    """All views of given micrographs, cut into tmp_path / "cut"."""

    def make(micrographs, symmetries="none", **changes):
        cut(source_of(micrographs), config(**changes), tmp_path / "cut")
        made = Cut(tmp_path / "cut")
        return Tiles(made, np.arange(made.num_tiles * len(SYMMETRIES[symmetries])), symmetries)

    return make
