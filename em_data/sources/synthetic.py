"""Synthetic micrographs as a source."""

import hashlib
from functools import partial

from em_data.sources.base import Entry, Source
from em_data.synthetic_micrographs import list_seeds, synthesise_micrograph

DEFAULT_NUM_MICROGRAPHS = 48


def open_synthetic(config) -> Source:
    """List synthetic micrographs: `num_micrographs` of `micrograph_size`, drawn with `seed`."""
    num, size = config.num_micrographs or DEFAULT_NUM_MICROGRAPHS, config.micrograph_size
    # the content depends on the code that draws, so its hash is that of a small drawing
    sample = hashlib.blake2b(synthesise_micrograph(0, size=64).image, digest_size=8).hexdigest()
    entries = [
        Entry(
            name=f"synthetic_{i:05d}",
            key=f"{sample}-{config.seed}-{size}-{i}-of-{num}",
            frames=partial(_draw, seed, size, f"synthetic_{i:05d}"),
        )
        for i, seed in enumerate(list_seeds(num, config.seed))
    ]
    return Source("synthetic", entries, [])


def _draw(seed, size, name):
    micrograph = synthesise_micrograph(seed, size)
    micrograph.name = name
    yield micrograph
