"""Synthetic micrographs as a source."""

import hashlib
from collections.abc import Callable
from functools import partial

from em_data.micrograph import Micrograph
from em_data.sources.base import Entry, Source
from em_data.synthetic_materials import synthesise_material
from em_data.synthetic_micrographs import list_seeds, synthesise_micrograph
from em_data.synthetic_other import synthesise_other_micrograph
from em_data.synthetic_variety import synthesise_varied_micrograph

# name -> (function that draws one, prefix of the micrographs' names, default number)
SYNTHETIC: dict[str, tuple[Callable[..., Micrograph], str, int]] = {
    "synthetic": (synthesise_micrograph, "synthetic", 48),
    "synthetic-varied": (synthesise_varied_micrograph, "varied", 400),
    "synthetic-materials": (synthesise_material, "materials", 48),
    "synthetic-other": (synthesise_other_micrograph, "other", 48),
}


def open_synthetic(name, config) -> Source:
    """List synthetic micrographs: `num_synthetic` of `micrograph_size`, drawn with `seed`."""
    synthesise, prefix, default_num = SYNTHETIC[name]
    num = config.num_synthetic or config.num_micrographs or default_num
    size = config.micrograph_size
    # the content depends on the code that draws, so its hash is that of a small drawing
    sample = hashlib.blake2b(synthesise(0, size=64).image.tobytes(), digest_size=8).hexdigest()
    entries = [
        Entry(
            name=f"{prefix}_{i:05d}",
            key=f"{sample}-{config.seed}-{size}-{i}-of-{num}",
            frames=partial(_draw, synthesise, seed, size, f"{prefix}_{i:05d}"),
        )
        for i, seed in enumerate(list_seeds(num, config.seed))
    ]
    return Source(name, entries, [])


def _draw(synthesise, seed, size, name):
    micrograph = synthesise(seed, size)
    micrograph.name = name
    yield micrograph
