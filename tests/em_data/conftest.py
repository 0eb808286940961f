import numpy as np
import pytest

from em_data import DataConfig
from em_data.sources.base import Entry, Source


@pytest.fixture
def config(tmp_path):
    """A small recipe with a cache of its own; `config(symmetries="d4")` changes it."""

    def make(**changes):
        return DataConfig(**{"resolution": 16, "cache_dir": str(tmp_path / "cache"), **changes})

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
        entries = [
            Entry(each.name, f"key of {each.name}", lambda each=each: each) for each in micrographs
        ]
        return Source("given", entries, [])

    return make
