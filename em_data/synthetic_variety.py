"""A wide variety of synthetic micrographs: the data that the models in the box are trained on.

Each micrograph has a specimen, an imaging condition and a pixel size of its own. The standard
micrographs (`em_data.synthetic_micrographs`) lie well inside these ranges. The random numbers are
different from theirs for every seed, so that no micrograph of one set is in the other.
"""

import numpy as np

from em_data.micrograph import Micrograph
from em_data.synthetic_imaging import Display
from em_data.synthetic_micrographs import Specimen, draw_micrograph, list_seeds

SPECIMEN, MICROGRAPH = 2, 3  # streams of random numbers; the standard micrographs have 1 and 0


def synthesise_varied_micrographs(num, seed=0, size=512):
    """Iterate over `num` labelled micrographs; micrograph i has seed 1,000,000 seed + i."""
    return (synthesise_varied_micrograph(each, size) for each in list_seeds(num, seed))


def synthesise_varied_micrograph(seed, size=512) -> Micrograph:
    """Draw one labelled micrograph, uint8 [size, size], of a specimen of its own."""
    if seed < 0 or size < 16:
        raise ValueError(
            f"a synthetic micrograph needs seed >= 0 and size >= 16 pixels; got {seed} and {size}."
        )
    specimen, pixel_size_nm = draw_specimen(seed)
    rng = np.random.default_rng([seed, MICROGRAPH])
    name = f"synthetic-varied-{seed:09d}.png"
    return draw_micrograph(rng, specimen, size, pixel_size_nm, name=name, seed=seed)


def draw_specimen(seed) -> tuple[Specimen, float]:
    """Draw the specimen with this number and the pixel size of its micrograph in nm.

    Sizes and numbers are drawn per pixel, so that a tile shows about as much at every pixel size.
    """
    rng = np.random.default_rng([seed, SPECIMEN])
    pixel_size_nm = _log_uniform(rng, 0.5, 2.0)
    pixel_um2 = (pixel_size_nm / 1000) ** 2
    rotation = rng.uniform(0, np.pi)
    loop_median_px = _log_uniform(rng, 10, 40)
    covered = _log_uniform(rng, 0.05, 0.35)  # share of the area inside loops
    is_bright = rng.random() < 0.25  # dots: cavities rather than dark clusters
    specimen = Specimen(
        name=f"synthetic-varied-specimen-{seed:06d}",
        beam=tuple(_draw_beam(rng).tolist()),
        rotation=float(rotation),
        g_angle=float(rotation + rng.integers(4) * np.pi / 4 + rng.normal(0, 0.05)),
        loops_per_um2=covered / (np.pi / 4 * loop_median_px**2 * pixel_um2),
        fraction_100=float(rng.uniform(0, 1)),
        loop_median_nm=loop_median_px * pixel_size_nm,
        loop_spread=float(rng.uniform(0.1, 0.4)),
        dots_per_um2=_log_uniform(rng, 3e-5, 2e-3) / pixel_um2,
        dot_median_nm=_log_uniform(rng, 2.5, 10) * pixel_size_nm,
        dot_spread=float(rng.uniform(0.15, 0.4)),
        lines_per_um2=_log_uniform(rng, 1e-6, 4e-5) / pixel_um2,
        thickness=float(rng.uniform(1.5, 5)),
        mottle=_log_uniform(rng, 0.02, 0.2),
        dose=_log_uniform(rng, 15, 1500),
        contrast=_log_uniform(rng, 0.6, 1.8),
        dot_contrast=(-1 if is_bright else 1) * float(rng.uniform(0.6, 1.6)),
        display=_draw_display(rng),
    )
    return specimen, pixel_size_nm


def _draw_beam(rng):
    """Draw the direction of view [3]: close to [100] as in the standard set, or any."""
    if rng.random() < 0.5:
        return np.array([1.0, *np.tan(np.deg2rad(rng.normal(0, 2.5, size=2)))])
    beam = rng.standard_normal(3)
    return beam / np.linalg.norm(beam)


def _draw_display(rng):
    range_used = rng.uniform(90, 237)
    black = rng.uniform(5, 247 - range_used)
    gamma = _log_uniform(rng, 0.75, 1.33)
    return Display(black, black + range_used, gamma, is_inverted=bool(rng.random() < 0.12))


def _log_uniform(rng, low, high):
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
