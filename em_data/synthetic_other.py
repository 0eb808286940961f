"""Synthetic micrographs of another microscope: the same defects, imaged in another way.

They are to the standard ones (`em_data.synthetic_micrographs`) what a user's micrographs are to a
simulator: the kinds, sizes and numbers of defects are drawn alike, and the true masks are known,
but the picture is another one. A conventional TEM with a camera replaces the scanning one.

- background: no bend contours, but an uneven illumination, a slow gradient of thickness and a fine
  amorphous surface with patches of contamination;
- contrast: a part of that of the standard ones, uneven, with bright fringes of defocus around all
  dark lines;
- blur: that of the lens and, of the noise too, that of the camera;
- noise: fewer electrons, whose noise is correlated over some pixels, and noise of the readout;
- grey levels: a part of the scale, with another gamma.
"""

from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage

from em_data.micrograph import Micrograph
from em_data.synthetic_micrographs import (
    MICROGRAPHS_PER_SPECIMEN,
    PIXEL_SIZE_NM,
    Specimen,
    draw_defects,
    list_seeds,
)

SESSION, MICROGRAPH = 7, 6  # streams of random numbers; the other sets have 0 to 5
SPECIMENS_APART = 500_000_000  # between numbers of specimens of this set and of the standard one


@dataclass(frozen=True)
class Session:
    """Settings of the microscope, which the micrographs of one specimen share. Lengths are nm."""

    visibility: float  # factor of the contrast of all defects
    fringe: float  # strength of the bright fringes of defocus
    fringe_nm: float  # their reach
    blur_nm: float  # of the lens
    camera_px: float  # blur of the camera, which also correlates the noise
    dose: float  # mean electrons per pixel
    readout: float  # deviation of the noise of the readout, in electrons
    grain: float  # deviation of the amorphous surface's log-transmission
    patches: float  # that of the contamination
    shade: float  # fall of the illumination from the beam's centre to the corner
    black: float  # grey level of the darkest pixels
    white: float  # that of the brightest ones
    gamma: float  # exponent of the scaled counts

    @classmethod
    def from_seed(cls, seed):
        """Draw the session with this number, an integer from 0."""
        rng = np.random.default_rng([seed, SESSION])
        return cls(
            visibility=float(rng.uniform(0.6, 0.9)),
            fringe=float(rng.uniform(0.5, 0.9)),
            fringe_nm=float(rng.uniform(2.0, 3.0)),
            blur_nm=float(rng.uniform(1.0, 1.4)),
            camera_px=float(rng.uniform(1.2, 1.5)),
            dose=float(rng.uniform(12, 25)),
            readout=float(rng.uniform(0.2, 0.5)),
            grain=float(rng.uniform(0.05, 0.09)),
            patches=float(rng.uniform(0.03, 0.07)),
            shade=float(rng.uniform(0.15, 0.45)),
            black=float(rng.uniform(30, 60)),
            white=float(rng.uniform(185, 225)),
            gamma=float(rng.uniform(0.75, 0.95)),
        )


def synthesise_other_micrographs(num, seed=0, size=512, pixel_size_nm=PIXEL_SIZE_NM):
    """Iterate over `num` labelled micrographs; micrograph i has seed 1,000,000 seed + i."""
    seeds = list_seeds(num, seed)
    return (synthesise_other_micrograph(each, size, pixel_size_nm) for each in seeds)


def synthesise_other_micrograph(seed, size=512, pixel_size_nm=PIXEL_SIZE_NM) -> Micrograph:
    """Draw one labelled micrograph, uint8 [size, size]; seeds 4 k to 4 k + 3 share a specimen."""
    if seed < 0 or size < 16 or not pixel_size_nm > 0:
        raise ValueError(
            f"a synthetic micrograph needs seed >= 0, size >= 16 pixels and pixel_size_nm > 0; "
            f"got {seed}, {size} and {pixel_size_nm}."
        )
    number = seed // MICROGRAPHS_PER_SPECIMEN
    specimen, session = Specimen.from_seed(SPECIMENS_APART + number), Session.from_seed(number)
    rng = np.random.default_rng([seed, MICROGRAPH])
    background = make_other_background(rng, session, size, pixel_size_nm)
    contrast, defects = draw_defects(rng, specimen, size, pixel_size_nm)
    uneven = 1 + 0.25 * make_texture(rng, size, pixel_size_nm, 60, 300)
    image = record_with_camera(
        rng, np.exp(background - session.visibility * uneven * contrast), session, pixel_size_nm
    )
    return Micrograph(
        image,
        name=f"synthetic-other-{seed:09d}.png",
        pixel_size_nm=pixel_size_nm,
        specimen=f"synthetic-other-specimen-{number:06d}",
        metadata={"seed": seed, "beam": list(specimen.beam), "notices": []},
        defects=defects,
    )


def make_other_background(rng, session, size, pixel_size_nm):
    """Draw the log of the illuminated foil without defects, float32 [size, size]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x, y = axis[None, :], axis[:, None]  # -0.5 to 0.5
    centre, slope = rng.uniform(-0.4, 0.4, size=2), rng.normal(0, 0.12, size=2)
    illumination = -session.shade * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2)
    wedge = slope[0] * x + slope[1] * y
    grain = session.grain * make_texture(rng, size, pixel_size_nm, 1.6, 7)
    # contamination lies in patches: only the highest parts of a smooth field
    patches = np.maximum(make_texture(rng, size, pixel_size_nm, 18, 90) - 0.8, 0)
    return (illumination + wedge + grain - 2 * session.patches * patches).astype(np.float32)


def make_texture(rng, size, pixel_size_nm, smallest_nm, largest_nm):
    """Draw a Gaussian field of variance 1 with details between two lengths, float32 [size, size].

    It is the difference of two blurs of white noise.
    """
    side = fft.next_fast_len(size + int(largest_nm / pixel_size_nm))  # the transform is periodic
    white = rng.standard_normal((side, side), dtype=np.float32)
    square = fft.fftfreq(side, pixel_size_nm)[:, None] ** 2 + fft.rfftfreq(side, pixel_size_nm) ** 2
    fine, coarse = (
        np.exp(-2 * (np.pi * nm / 2.5) ** 2 * square) for nm in (smallest_nm, largest_nm)
    )
    field = fft.irfft2(fft.rfft2(white) * (fine - coarse).astype(np.float32), s=(side, side))
    return (field / field.std())[:size, :size]


def record_with_camera(rng, transmission, session, pixel_size_nm):
    """Record a transmission map [size, size] out of focus and with a camera; uint8 [size, size]."""
    around = ndimage.gaussian_filter(transmission, session.fringe_nm / pixel_size_nm)
    image = transmission + session.fringe * (transmission - around)
    image = ndimage.gaussian_filter(image, session.blur_nm / pixel_size_nm)
    counts = rng.poisson(np.maximum(image, 0) * (session.dose / image.mean())).astype(np.float32)
    counts = ndimage.gaussian_filter(counts, session.camera_px)
    counts += rng.normal(0, session.readout, size=counts.shape).astype(np.float32)
    low, high = np.quantile(counts, (0.0002, 0.9998))
    scaled = ((counts - low) / (high - low)).clip(0, 1) ** session.gamma
    grey = session.black + (session.white - session.black) * scaled
    return np.rint(grey).astype(np.uint8)
