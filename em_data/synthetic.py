"""Synthetic STEM bright-field micrographs of irradiated FeCrAl, every defect labelled: data that needs no download.

Open dislocation loops of the two families of a body-centred cubic crystal (a0<100> and a0/2<111>) seen close to [100],
black dots and dislocation lines, over bend contours, a thickness wedge and a mottled surface; then the recording: probe,
scan jitter, Poisson counts, detector. Four micrographs in a row share a specimen (rotation, tilt, loop statistics), so
that a split by specimen means something. A picture is a pure function of its arguments.

    python -m em_data.synthetic --num 16 --out DIR
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from em_data.labels import write_labelled
from em_data.micrograph import Defect, Micrograph
from em_data.synthetic_defects import (
    NORMALS_100,
    NORMALS_111,
    draw_dot,
    draw_line,
    draw_loop,
    project_loop,
)
from em_data.synthetic_imaging import make_background, record

MICROGRAPHS_PER_SPECIMEN = 4
PIXEL_SIZE_NM = 1.0  # a median loop is 20 pixels across, and 64 x 64 pixels hold two of them
_SEED_STRIDE = 1_000_000  # micrograph seeds that belong to one seed of synthesise_micrographs


@dataclass(frozen=True)
class Specimen:
    """What the micrographs of one specimen share; `Specimen.from_seed` draws one.

    beam: direction of view in crystal axes. rotation: radians, of [010] from the image's x axis.
    g_angle: radians, of the strongest diffraction vector in the image.
    loops_per_um2, dots_per_um2, lines_per_um2: projected number densities.
    fraction_100: share of a0<100> among the loops.
    loop_median_nm, loop_spread, dot_median_nm, dot_spread: log-normal diameters, median and standard deviation of the log.
    thickness: foil thickness in extinction lengths. mottle: standard deviation of the surface's log-transmission.
    dose: mean electrons per pixel.
    """

    name: str = "synthetic"
    beam: tuple[float, float, float] = (1.0, 0.0, 0.0)
    rotation: float = 0.0
    g_angle: float = 0.0
    loops_per_um2: float = 480.0
    fraction_100: float = 0.45
    loop_median_nm: float = 20.0
    loop_spread: float = 0.26
    dots_per_um2: float = 420.0
    dot_median_nm: float = 4.5
    dot_spread: float = 0.3
    lines_per_um2: float = 11.0
    thickness: float = 3.0
    mottle: float = 0.05
    dose: float = 130.0

    @classmethod
    def from_seed(cls, seed):
        """The specimen with this number, a whole number from 0."""
        rng = np.random.default_rng([seed, 1])
        rotation = rng.uniform(0, np.pi / 2)
        tilt = np.deg2rad(
            rng.normal(0, 2.5, size=2)
        )  # the operator comes within a few degrees of the zone axis
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


def synthesise_micrograph(seed, size=512, pixel_size_nm=PIXEL_SIZE_NM, *, specimen=None):
    """One labelled micrograph.

    seed: whole number from 0; seeds 4 k to 4 k + 3 share a specimen. size: pixels. specimen: a Specimen to look at
    instead of the seed's own. Returns a Micrograph: uint8 [size, size], with a Defect for all that is drawn, masks inside
    their boxes, centres, angles and axis ratios in the metadata. Defects cut by the border are labelled as far as seen.
    """
    if seed < 0 or size < 16 or not pixel_size_nm > 0:
        raise ValueError(
            f"a synthetic micrograph needs seed >= 0, size >= 16 pixels and pixel_size_nm > 0; "
            f"got {seed}, {size} and {pixel_size_nm}"
        )
    specimen = specimen or Specimen.from_seed(seed // MICROGRAPHS_PER_SPECIMEN)
    rng = np.random.default_rng([seed, 0])
    log_transmission, visibility = make_background(rng, specimen, size, pixel_size_nm)
    contrast = np.zeros((size, size), dtype=np.float32)
    drawn = _draw_defects(rng, specimen, size, pixel_size_nm)
    defects = [
        _place(contrast, kind, center, metadata, drawing)
        for kind, center, metadata, drawing in drawn
    ]
    defects = [defect for defect in defects if defect is not None]
    reach = (
        2 * round(4.3 / pixel_size_nm) + 1
    )  # two boxes of 8.6 nm are nearly a Gaussian of 3.5 nm
    contrast += 0.3 * ndimage.uniform_filter(
        ndimage.uniform_filter(contrast, reach), reach
    )  # the far strain field
    image, dose = record(
        rng, np.exp(log_transmission - visibility * contrast), specimen.dose, pixel_size_nm
    )
    metadata = {
        "seed": seed,
        "electrons_per_pixel": round(dose, 2),
        "beam": list(specimen.beam),
        "notices": [],
    }
    return Micrograph(
        image, f"synthetic-{seed:09d}.png", pixel_size_nm, specimen.name, metadata, defects
    )


def synthesise_micrographs(num, seed=0, size=512, pixel_size_nm=PIXEL_SIZE_NM):
    """`num` labelled micrographs, four to a specimen: micrograph i has the seed 1,000,000 seed + i; an iterator."""
    if not 0 < num <= _SEED_STRIDE:
        raise ValueError(
            f"the number of synthetic micrographs lies in 1..{_SEED_STRIDE}, not {num}"
        )
    return (synthesise_micrograph(seed * _SEED_STRIDE + i, size, pixel_size_nm) for i in range(num))


def _draw_defects(rng, specimen, size, pixel_size_nm):
    """Yield (kind, centre in pixels, metadata, Drawing) of every defect: lines first, loops above them, dots last."""
    margin_nm = 2 * specimen.loop_median_nm  # defects just outside still reach into the picture
    side_nm = size * pixel_size_nm + 2 * margin_nm
    area_um2 = (side_nm / 1000) ** 2

    for _ in range(rng.poisson(specimen.lines_per_um2 * area_um2)):
        start = (rng.uniform(0, side_nm, size=2) - margin_nm) / pixel_size_nm - 0.5
        length = float(np.clip(rng.lognormal(np.log(170), 0.6), 40, 900))
        direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.6)
        drawing = draw_line(
            rng,
            start,
            length_nm=length,
            direction=direction,
            strength=strength,
            pixel_size_nm=pixel_size_nm,
        )
        yield "line", start, drawing.metadata, drawing

    num_loops = rng.poisson(specimen.loops_per_um2 * area_um2)
    diameters = rng.lognormal(np.log(specimen.loop_median_nm), specimen.loop_spread, size=num_loops)
    centers = _spread_out(rng, diameters, side_nm)
    shapes = {
        kind: [project_loop(normal, specimen.beam, specimen.rotation) for normal in normals]
        for kind, normals in (("loop_100", NORMALS_100), ("loop_111", NORMALS_111))
    }
    micrograph_strength = rng.uniform(0.85, 1.15)
    for (x, y), diameter in zip(centers.tolist(), diameters.tolist()):
        kind = "loop_100" if rng.random() < specimen.fraction_100 else "loop_111"
        axis_ratio, angle = shapes[kind][rng.integers(len(shapes[kind]))]
        center = ((x - margin_nm) / pixel_size_nm - 0.5, (y - margin_nm) / pixel_size_nm - 0.5)
        strength = micrograph_strength * float(np.clip(rng.lognormal(np.log(0.8), 0.24), 0.4, 1.3))
        drawing = draw_loop(
            rng,
            center,
            diameter_nm=diameter,
            axis_ratio=axis_ratio,
            angle=angle,
            g_angle=specimen.g_angle,
            strength=strength,
            pixel_size_nm=pixel_size_nm,
        )
        metadata = {
            "diameter_nm": diameter,
            "axis_ratio": axis_ratio,
            "angle": angle,
            "strength": strength,
        }
        yield kind, center, metadata | drawing.metadata, drawing

    num_dots = rng.poisson(specimen.dots_per_um2 * area_um2)
    diameters = rng.lognormal(np.log(specimen.dot_median_nm), specimen.dot_spread, size=num_dots)
    for diameter in diameters.tolist():
        center = (rng.uniform(0, side_nm, size=2) - margin_nm) / pixel_size_nm - 0.5
        strength = rng.uniform(0.25, 0.65)
        drawing = draw_dot(
            rng,
            center,
            diameter_nm=diameter,
            g_angle=specimen.g_angle,
            strength=strength,
            pixel_size_nm=pixel_size_nm,
        )
        yield "dot", center, {"diameter_nm": diameter, "strength": strength}, drawing


def _spread_out(rng, diameters, side_nm):
    """Centres [n, 2] in a square, uniform, but the first of six tries that has room: loops that touch tend to coalesce.

    Distances are periodic, so that no part of the square is preferred.
    """
    centers = np.empty((len(diameters), 2))
    tries = rng.uniform(0, side_nm, size=(len(diameters), 6, 2))
    for i, candidates in enumerate(tries):
        apart = np.abs(candidates[:, None] - centers[None, :i])
        distance = np.linalg.norm(np.minimum(apart, side_nm - apart), axis=-1)  # [6, i]
        room = (distance - 0.5 * (diameters[i] + diameters[None, :i])).min(
            axis=1, initial=np.inf
        )  # [6]
        free = np.flatnonzero(room > 0.15 * diameters[i])
        centers[i] = candidates[free[0] if len(free) else np.argmax(room)]
    return centers


def _place(canvas, kind, center, metadata, drawing):
    """Add a drawing's contrast to the canvas, in place, and return its Defect; None where it is out of the picture."""
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


def main(arguments=None):
    """Write synthetic micrographs with their masks, COCO labels and a contact sheet: the command of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m em_data.synthetic", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--num", type=int, default=16, help="micrographs to make (16)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write to; made if missing"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=512, help="side in pixels (512)")
    parser.add_argument(
        "--pixel-size-nm",
        type=float,
        default=PIXEL_SIZE_NM,
        help=f"nm per pixel ({PIXEL_SIZE_NM:g})",
    )
    args = parser.parse_args(arguments)
    try:
        micrographs = list(
            synthesise_micrographs(args.num, args.seed, args.size, args.pixel_size_nm)
        )
        write_labelled(micrographs, args.out)
    except ValueError as error:
        parser.error(str(error))
    num_defects = sum(len(micrograph.defects) for micrograph in micrographs)
    print(
        f"{args.out}: {args.num} micrographs in images/, {num_defects} labelled defects in labels/ and masks/"
    )


if __name__ == "__main__":
    main()
