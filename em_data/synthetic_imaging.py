"""The foil behind the defects, and how a scanning microscope records it."""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from scipy import fft, ndimage, signal


def make_background(rng, specimen, size, pixel_size_nm):
    """Draw the foil without defects.

    It is a bent wedge in two beams: 1 - A sin^2(pi t sqrt(1 + w^2)) / (1 + w^2). The deviation w is
    a smooth function of position, with a bend contour where it vanishes. The thickness t, in
    extinction lengths, is a wedge, and the fringes are damped with t. The surface is mottled:
    Gaussian noise with a power-law spectrum between 8 and 120 nm. Defects show best near the
    contour.

    Returns:
        The log-transmission, and how well defects show, both float32 [size, size].
    """
    field_nm = size * pixel_size_nm
    axis = ((np.arange(size) + 0.5) * pixel_size_nm).astype(np.float32) - np.float32(field_nm / 2)
    x, y = axis[None, :], axis[:, None]  # nm from the centre

    direction, wedge = rng.uniform(0, 2 * pi), rng.uniform(0, 2 * pi)
    along = x * cos(direction) + y * sin(direction)
    across = y * cos(direction) - x * sin(direction)
    width = rng.uniform(70, 200)  # nm over which w grows by 1
    place = rng.uniform(-0.9, 0.9) * max(field_nm, 400) / 2
    bow = rng.normal(0, 0.35) / 400
    waves = np.sin(across / rng.uniform(60, 140) + rng.uniform(0, 6.28)) * rng.uniform(0, 0.5)
    w = (along - place + bow * across**2) / width + waves
    steepness = rng.uniform(0.05, 0.25) / 500
    t = specimen.thickness * (1 + steepness * (x * cos(wedge) + y * sin(wedge)))
    effective = np.sqrt(1 + w**2)
    fringes = 0.5 - 0.5 * np.exp(-0.25 * t * effective) * np.cos(2 * pi * t * effective)
    depth = rng.uniform(0.2, 0.42)
    log_transmission = np.log(1 - depth * fringes / effective**2) - 0.3 * t
    surface, unevenness = _mottle(rng, size, pixel_size_nm)
    log_transmission += specimen.mottle * surface
    visibility = (0.88 + 0.3 / effective**2) * np.exp(0.2 * unevenness)
    return log_transmission, visibility


@lru_cache(maxsize=4)
def _mottle_amplitude(side, pixel_size_nm):
    """Return f^-0.9 from 1/120 to 1/8 per nm, float32 [side, side], for fields of variance 1."""
    f_squared = (fft.fftfreq(side, pixel_size_nm) ** 2).astype(np.float32)
    f_squared = f_squared[:, None] + f_squared[None, :]
    amplitude = (f_squared + 1 / 120**2) ** -0.45 * np.exp(-0.5 * 8**2 * f_squared)
    amplitude[0, 0] = 0
    return amplitude * float(side / np.sqrt((amplitude**2).mean()))


def _mottle(rng, size, pixel_size_nm):
    """Draw two independent stationary Gaussian fields of variance 1, float32 [2, size, size]."""
    # the transform is periodic, the picture is not
    side = fft.next_fast_len(size + int(30 / pixel_size_nm))
    white = rng.standard_normal((side, side, 2), dtype=np.float32).view(np.complex64)[..., 0]
    fields = fft.ifft2(white * _mottle_amplitude(side, pixel_size_nm))[:size, :size]
    return np.stack([fields.real, fields.imag])


def expose(rng, transmission, dose):
    """Draw electron counts: Poisson with mean dose * transmission / mean(transmission), float32."""
    return rng.poisson(transmission * (dose / transmission.mean())).astype(np.float32)


@dataclass(frozen=True)
class Display:
    """The operator's settings of brightness and contrast."""

    black: float  # grey level of the darkest pixels
    white: float  # grey level of the brightest pixels
    gamma: float = 1.0  # exponent of the scaled counts
    is_inverted: bool = False  # bright defects on a dark foil, as in dark field

    @classmethod
    def draw(cls, rng):
        """Draw settings that use the whole scale."""
        return cls(rng.uniform(5, 18), rng.uniform(205, 242))

    def to_grey(self, counts):
        """Return uint8 of counts; all but 4 in 10,000 pixels lie between black and white."""
        low, high = np.quantile(counts, (0.0002, 0.9998))
        scaled = (counts - low) / (high - low)
        if self.is_inverted:
            scaled = 1 - scaled
        if self.gamma != 1:
            scaled = scaled.clip(0, 1) ** self.gamma
        grey = self.black + (self.white - self.black) * scaled
        return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def record(rng, transmission, dose, pixel_size_nm, display=None):
    """Record a transmission map [size, size]; return uint8 [size, size] and electrons per pixel.

    In the order of the instrument: finite probe, line-to-line jitter and emission noise of the
    scan, Poisson counts, the detector's afterglow along the fast axis, and the operator's
    brightness and contrast, a `Display`, which is drawn if it is None.
    """
    size = transmission.shape[0]
    probe_px = rng.uniform(0.5, 0.8) / pixel_size_nm
    image = ndimage.gaussian_filter(transmission, probe_px, mode="nearest", truncate=3.0)

    # each line starts off by less than a pixel, and the offset wanders
    offset = signal.lfilter([1], [1, -0.6], rng.normal(0, rng.uniform(0.08, 0.25), size=size))
    offset = offset.clip(-1, 1).astype(np.float32)[:, None]  # [size, 1] pixels
    padded = np.pad(image, ((0, 0), (1, 1)), mode="edge")
    image = (
        (1 - abs(offset)) * image
        + offset.clip(0) * padded[:, 2:]
        - offset.clip(None, 0) * padded[:, :-2]
    )

    line_gain = rng.normal(0, rng.uniform(0.002, 0.007), size=(size, 1))
    white = rng.standard_normal(size * size, dtype=np.float32)
    emission = signal.lfilter([0.14], [1, -0.99], white)  # variance 1
    emission = emission.astype(np.float32).reshape(size, size) * rng.uniform(0.003, 0.009)
    image *= emission + (1 + line_gain).astype(np.float32)

    dose = dose * rng.uniform(0.85, 1.15)
    counts = expose(rng, np.maximum(image, 1e-6), dose)
    counts = ndimage.gaussian_filter(
        counts, (rng.uniform(0.4, 0.6), rng.uniform(0.5, 0.7)), truncate=3.0
    )

    display = display or Display.draw(rng)
    return display.to_grey(counts), float(dose)
