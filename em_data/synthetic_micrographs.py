"""Synthetic STEM bright-field micrographs of irradiated FeCrAl with every defect labelled.

They need no download. Open dislocation loops of the two families of a body-centred cubic crystal
(a0<100> and a0/2<111>), seen close to [100], black dots and dislocation lines lie over bend
contours, a thickness wedge and a mottled surface. Then the micrograph is recorded: probe, scan
jitter, Poisson counts, detector. Four micrographs in a row share a specimen (rotation, tilt,
statistics of loops). A micrograph depends only on its arguments.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from em_data.micrograph import Defect, Micrograph
from em_data.synthetic_defects import (
    NORMALS_100,
    NORMALS_111,
    draw_dot,
    draw_line,
    draw_loop,
    project_loop,
)
from em_data.synthetic_imaging import Display, make_background, record

MICROGRAPHS_PER_SPECIMEN = 4
PIXEL_SIZE_NM = 1.0  # a median loop is 20 pixels across, and 64 x 64 pixels hold two of them
SEEDS_PER_SEED = 1_000_000  # seeds of single micrographs per seed of `synthesise_micrographs`


@dataclass(frozen=True)
class Specimen:
    """What the micrographs of one specimen share. Diameters are log-normal."""

    name: str = "synthetic"
    beam: tuple[float, float, float] = (1.0, 0.0, 0.0)  # direction of view in crystal axes
    rotation: float = 0.0  # of [010] from the image's x axis, radians
    g_angle: float = 0.0  # of the strongest diffraction vector in the image, radians
    loops_per_um2: float = 480.0  # projected number density, as that of dots and lines
    fraction_100: float = 0.45  # share of a0<100> among the loops
    loop_median_nm: float = 20.0
    loop_spread: float = 0.26  # standard deviation of the log of the diameter
    dots_per_um2: float = 420.0
    dot_median_nm: float = 4.5
    dot_spread: float = 0.3
    lines_per_um2: float = 11.0
    thickness: float = 3.0  # of the foil, in extinction lengths
    mottle: float = 0.05  # standard deviation of the surface's log-transmission
    dose: float = 130.0  # mean electrons per pixel
    contrast: float = 1.0  # factor of the contrast of all defects
    dot_contrast: float = 1.0  # factor of the contrast of dots; if negative, dots are bright
    display: Display | None = None  # brightness and contrast; None draws them for each micrograph

    @classmethod
    def from_seed(cls, seed):
        """Draw the specimen with this number, an integer from 0."""
        rng = np.random.default_rng([seed, 1])
        rotation = rng.uniform(0, np.pi / 2)
        # the operator comes within a few degrees of the zone axis
        tilt = np.deg2rad(rng.normal(0, 2.5, size=2))
        return cls(
            name=f"synthetic-specimen-{seed:06d}",
            beam=(1.0, float(np.tan(tilt[0])), float(np.tan(tilt[1]))),
            rotation=float(rotation),
            g_angle=float(rotation + rng.integers(4) * np.pi / 4 + rng.normal(0, 0.05)),
            loops_per_um2=float(rng.uniform(380, 580)),
            fraction_100=float(rng.uniform(0.25, 0.6)),
            loop_median_nm=float(rng.uniform(18.5, 22.0)),
            loop_spread=float(rng.uniform(0.2, 0.3)),
            dots_per_um2=float(rng.uniform(150, 800)),
            dot_median_nm=float(rng.uniform(3.8, 5.5)),
            dot_spread=float(rng.uniform(0.2, 0.35)),
            lines_per_um2=float(rng.uniform(5, 18)),
            thickness=float(rng.uniform(2.2, 4.0)),
            mottle=float(rng.uniform(0.045, 0.075)),
            dose=float(rng.uniform(80, 190)),
        )


def synthesise_micrographs(num, seed=0, size=512, pixel_size_nm=PIXEL_SIZE_NM):
    """Iterate over `num` labelled micrographs, see `list_seeds`."""
    seeds = list_seeds(num, seed)
    return (synthesise_micrograph(each, size, pixel_size_nm) for each in seeds)


def list_seeds(num, seed) -> range:
    """Return the seeds of `num` micrographs; micrograph i has seed 1,000,000 seed + i."""
    if not 0 < num <= SEEDS_PER_SEED:
        raise ValueError(
            f"the number of synthetic micrographs is {num}, but must be 1 to {SEEDS_PER_SEED}."
        )
    return range(seed * SEEDS_PER_SEED, seed * SEEDS_PER_SEED + num)


def synthesise_micrograph(seed, size=512, pixel_size_nm=PIXEL_SIZE_NM, *, specimen=None):
    """Draw one labelled micrograph, uint8 [size, size].

    It has a `Defect` for everything drawn: masks inside their boxes; centres, angles and axis
    ratios as metadata. Of defects cut by the border, the visible part is labelled. Seeds 4 k to
    4 k + 3 share a specimen, unless `specimen` is given.
    """
    if seed < 0 or size < 16 or not pixel_size_nm > 0:
        raise ValueError(
            f"a synthetic micrograph needs seed >= 0, size >= 16 pixels and pixel_size_nm > 0; "
            f"got {seed}, {size} and {pixel_size_nm}."
        )
    specimen = specimen or Specimen.from_seed(seed // MICROGRAPHS_PER_SPECIMEN)
    rng = np.random.default_rng([seed, 0])
    name = f"synthetic-{seed:09d}.png"
    return draw_micrograph(rng, specimen, size, pixel_size_nm, name=name, seed=seed)


def draw_micrograph(rng, specimen, size, pixel_size_nm, *, name, seed):
    """Draw a micrograph of a specimen with random numbers of `rng`; it states its seed."""
    log_transmission, visibility = make_background(rng, specimen, size, pixel_size_nm)
    contrast, defects = draw_defects(rng, specimen, size, pixel_size_nm)
    transmission = np.exp(log_transmission - visibility * specimen.contrast * contrast)
    image, dose = record(rng, transmission, specimen.dose, pixel_size_nm, specimen.display)
    return Micrograph(
        image,
        name=name,
        pixel_size_nm=pixel_size_nm,
        specimen=specimen.name,
        metadata={
            "seed": seed,
            "electrons_per_pixel": round(dose, 2),
            "beam": list(specimen.beam),
            "notices": [],
        },
        defects=defects,
    )


def draw_defects(rng, specimen, size, pixel_size_nm):
    """Draw all defects of a micrograph.

    Returns:
        Their contrast, float32 [size, size], which is subtracted from the log-transmission, and a
        list of `Defect`.
    """
    contrast = np.zeros((size, size), dtype=np.float32)
    drawn = _list_drawings(rng, specimen, size, pixel_size_nm)
    defects = [_place(contrast, *each) for each in drawn]
    # the far strain field: two boxes of 8.6 nm are nearly a Gaussian of 3.5 nm
    reach = 2 * round(4.3 / pixel_size_nm) + 1
    contrast += 0.3 * ndimage.uniform_filter(ndimage.uniform_filter(contrast, reach), reach)
    return contrast, [defect for defect in defects if defect is not None]


def _list_drawings(rng, specimen, size, pixel_size_nm):
    """Yield (kind, centre in pixels, metadata, Drawing) of each defect; later ones lie on top."""
    margin_nm = 2 * specimen.loop_median_nm  # what is just outside the picture reaches into it
    side_nm = size * pixel_size_nm + 2 * margin_nm
    area_um2 = (side_nm / 1000) ** 2

    for _ in range(rng.poisson(specimen.lines_per_um2 * area_um2)):
        start = (rng.uniform(0, side_nm, size=2) - margin_nm) / pixel_size_nm - 0.5
        drawing = draw_line(
            rng,
            start,
            length_nm=float(np.clip(rng.lognormal(np.log(170), 0.6), 40, 900)),
            direction=rng.uniform(0, 2 * np.pi),
            strength=rng.uniform(0.3, 0.6),
            pixel_size_nm=pixel_size_nm,
        )
        yield "line", start, drawing.metadata, drawing

    in_picture = {"g_angle": specimen.g_angle, "pixel_size_nm": pixel_size_nm}
    num_loops = rng.poisson(specimen.loops_per_um2 * area_um2)
    diameters = rng.lognormal(np.log(specimen.loop_median_nm), specimen.loop_spread, size=num_loops)
    centers = (_spread_out(rng, diameters, side_nm) - margin_nm) / pixel_size_nm - 0.5
    shapes = {
        kind: [project_loop(normal, specimen.beam, specimen.rotation) for normal in normals]
        for kind, normals in (("loop_100", NORMALS_100), ("loop_111", NORMALS_111))
    }
    micrograph_strength = rng.uniform(0.85, 1.15)
    for center, diameter in zip(centers.tolist(), diameters.tolist()):
        kind = "loop_100" if rng.random() < specimen.fraction_100 else "loop_111"
        axis_ratio, angle = shapes[kind][rng.integers(len(shapes[kind]))]
        strength = micrograph_strength * float(np.clip(rng.lognormal(np.log(0.8), 0.24), 0.4, 1.3))
        known = {"diameter_nm": diameter, "axis_ratio": axis_ratio, "angle": angle}
        known["strength"] = strength
        drawing = draw_loop(rng, center, **known, **in_picture)
        yield kind, center, known | drawing.metadata, drawing

    num_dots = rng.poisson(specimen.dots_per_um2 * area_um2)
    diameters = rng.lognormal(np.log(specimen.dot_median_nm), specimen.dot_spread, size=num_dots)
    for diameter in diameters.tolist():
        center = (rng.uniform(0, side_nm, size=2) - margin_nm) / pixel_size_nm - 0.5
        strength = rng.uniform(0.25, 0.65) * specimen.dot_contrast
        known = {"diameter_nm": diameter, "strength": strength}
        yield "dot", center, known, draw_dot(rng, center, **known, **in_picture)


def _spread_out(rng, diameters, side_nm):
    """Draw centres [n, 2] in a square so that loops keep apart: touching loops tend to coalesce.

    Each centre is the first of six uniform tries that has room. Distances are periodic, so that no
    part of the square is preferred.
    """
    centers = np.empty((len(diameters), 2))
    tries = rng.uniform(0, side_nm, size=(len(diameters), 6, 2))
    for i, candidates in enumerate(tries):
        apart = np.abs(candidates[:, None] - centers[None, :i])
        distance = np.linalg.norm(np.minimum(apart, side_nm - apart), axis=-1)  # [6, i]
        room = distance - 0.5 * (diameters[i] + diameters[None, :i])  # [6, i]
        room = room.min(axis=1, initial=np.inf)  # [6]
        free = np.flatnonzero(room > 0.15 * diameters[i])
        centers[i] = candidates[free[0] if len(free) else np.argmax(room)]
    return centers


def _place(canvas, kind, center, metadata, drawing):
    """Add a drawing to the canvas in place; return its defect, or None if it is outside."""
    size = canvas.shape[0]
    (x0, y0), (height, width) = drawing.origin, drawing.contrast.shape
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x0 + width, size), min(y0 + height, size)
    if left >= right or top >= bottom:
        return None
    seen = np.s_[top - y0 : bottom - y0, left - x0 : right - x0]
    canvas[top:bottom, left:right] += drawing.contrast[seen]
    mask = drawing.mask[seen]
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return None
    box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
    numbers = {key: float(value) for key, value in metadata.items()}
    return Defect(
        kind=kind,
        box_px=tuple(int(edge) for edge in box),
        mask=mask,
        diameter_nm=numbers.pop("diameter_nm", None),
        length_nm=numbers.pop("length_nm", None),
        metadata={
            "center_px": (float(center[0]), float(center[1])),
            "is_cut_by_border": bool(np.count_nonzero(mask) < np.count_nonzero(drawing.mask)),
            **numbers,
        },
    )
