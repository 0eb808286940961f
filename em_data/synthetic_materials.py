"""Three synthetic "materials" that look different: micrographs with a class.

Each specimen is of one material, and the materials take turns: micrograph i is of material i
modulo 3, and micrographs 12 k + m, m + 3, m + 6 and m + 9 share a specimen of material m. The
pixel size is that of the standard micrographs (`em_data.synthetic_micrographs`), whose random
numbers are others for every seed.
"""

from dataclasses import dataclass, replace

import numpy as np

from em_data.micrograph import Micrograph
from em_data.synthetic_micrographs import (
    MICROGRAPHS_PER_SPECIMEN,
    PIXEL_SIZE_NM,
    Specimen,
    draw_micrograph,
    list_seeds,
)

MICROGRAPH, SPECIMEN = 4, 5  # streams of random numbers; the other sets have 0 to 3


@dataclass(frozen=True)
class Material:
    """What tells a material apart: typical values, which vary by about a tenth among specimens."""

    loops_per_um2: float
    loop_median_nm: float
    dots_per_um2: float
    lines_per_um2: float
    mottle: float
    dose: float
    contrast: float
    dot_contrast: float = 1.0


MATERIALS = {
    "coarse-loops": Material(
        loops_per_um2=340,
        loop_median_nm=31,
        dots_per_um2=60,
        lines_per_um2=3,
        mottle=0.05,
        dose=150,
        contrast=1.2,
    ),
    "fine-loops": Material(
        loops_per_um2=1900,
        loop_median_nm=11.5,
        dots_per_um2=1200,
        lines_per_um2=3,
        mottle=0.045,
        dose=120,
        contrast=1.15,
    ),
    "lines": Material(
        loops_per_um2=25,
        loop_median_nm=18,
        dots_per_um2=500,  # cavities: bright
        lines_per_um2=110,
        mottle=0.11,
        dose=110,
        contrast=1.3,
        dot_contrast=-1.0,
    ),
}


def synthesise_materials(num, seed=0, size=512):
    """Iterate over `num` labelled micrographs; micrograph i has seed 1,000,000 seed + i."""
    return (synthesise_material(each, size) for each in list_seeds(num, seed))


def synthesise_material(seed, size=512) -> Micrograph:
    """Draw one labelled micrograph, uint8 [size, size], whose class is its material."""
    if seed < 0 or size < 16:
        raise ValueError(
            f"a synthetic micrograph needs seed >= 0 and size >= 16 pixels; got {seed} and {size}."
        )
    names = list(MATERIALS)
    row, material = divmod(seed, len(names))
    specimen = draw_specimen(row // MICROGRAPHS_PER_SPECIMEN, names[material])
    rng = np.random.default_rng([seed, MICROGRAPH])
    name = f"synthetic-materials-{seed:09d}.png"
    micrograph = draw_micrograph(rng, specimen, size, PIXEL_SIZE_NM, name=name, seed=seed)
    micrograph.class_name = names[material]
    return micrograph


def draw_specimen(number, class_name) -> Specimen:
    """Draw the specimen of a material with this number, from 0."""
    material = MATERIALS[class_name]
    index = list(MATERIALS).index(class_name)
    rng = np.random.default_rng([number, index, SPECIMEN])

    def vary(value, spread=0.1):
        return float(value * np.exp(rng.normal(0, spread)))

    # rotation, tilt and what else says nothing of the material, as in the standard set
    standard = Specimen.from_seed(int(rng.integers(2**31)))
    return replace(
        standard,
        name=f"{class_name}-specimen-{number:06d}",
        loops_per_um2=vary(material.loops_per_um2),
        loop_median_nm=vary(material.loop_median_nm, 0.04),
        dots_per_um2=vary(material.dots_per_um2),
        lines_per_um2=vary(material.lines_per_um2),
        mottle=vary(material.mottle),
        dose=vary(material.dose),
        contrast=vary(material.contrast, 0.05),
        dot_contrast=material.dot_contrast,
    )
