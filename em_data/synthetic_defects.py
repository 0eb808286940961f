"""Radiation defects as a bright-field detector sees them: loops, black dots, dislocation lines.

Each function draws one defect in a window of its own and returns a `Drawing`. Lengths are nm until
the last moment, so that a defect has the same shape at every pixel size.
"""

from dataclasses import dataclass, field
from math import cos, hypot, pi, sin

import numpy as np
from scipy import ndimage

# habit planes of a0<100> and a0/2<111> loops: a pure edge loop is normal to its Burgers vector
NORMALS_100 = np.eye(3)
NORMALS_111 = np.array([[1, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1]]) / np.sqrt(3)


@dataclass(eq=False)
class Drawing:
    """A defect in its own window."""

    origin: tuple[int, int]  # (x, y) of the first pixel in the micrograph; it may be outside
    contrast: np.ndarray  # float32 [h, w], subtracted from the log intensity: positive is dark
    mask: np.ndarray  # bool [h, w], the pixels of the defect
    metadata: dict = field(default_factory=dict)


def project_loop(normal, beam, rotation):
    """Return (axis_ratio, angle) of a circular loop seen along the beam.

    The axis ratio is minor over major axis, |n . z|. The angle is that of the major axis from x
    towards y, in [0, pi); a face-on loop gets `rotation`, the angle of the projected [010] axis
    ([001] if the beam is along [010]). The vectors are in crystal axes, of any length.
    """
    normal = np.asarray(normal, dtype=float) / np.linalg.norm(normal)
    beam = np.asarray(beam, dtype=float) / np.linalg.norm(beam)
    reference = np.array([0.0, 1.0, 0.0]) if abs(beam[1]) < 0.9 else np.array([0.0, 0.0, 1.0])
    e1 = reference - beam * (reference @ beam)
    e1 /= np.linalg.norm(e1)
    e2 = np.cross(beam, e1)
    across = np.array([normal @ e1, normal @ e2])
    axis_ratio = min(1.0, abs(float(normal @ beam)))
    angle = rotation
    if np.hypot(*across) > 1e-9:
        angle = rotation + np.arctan2(across[1], across[0]) + pi / 2
    return axis_ratio, float(angle % pi)


def _window(center_px, reach_px):
    """Return the origin of a window around a centre, and offsets dx [1, w], dy [h, 1] from it."""
    (x, y), (reach_x, reach_y) = center_px, reach_px
    x0, y0 = int(np.floor(x - reach_x)), int(np.floor(y - reach_y))
    x1, y1 = int(np.ceil(x + reach_x)) + 1, int(np.ceil(y + reach_y)) + 1
    dx = (np.arange(x0, x1) - x).astype(np.float32)[None, :]
    dy = (np.arange(y0, y1) - y).astype(np.float32)[:, None]
    return (x0, y0), dx, dy


def draw_loop(rng, center_px, *, diameter_nm, axis_ratio, angle, g_angle, strength, pixel_size_nm):
    """Draw an open elliptical dislocation loop.

    The core is a dark line along the ellipse. Its contrast follows cos^2 of the angle to the
    diffraction vector, so that two stretches of the ring are faint (g.b vanishes). A weaker second
    line inside is the double image of a dislocation near its Bragg condition. The enclosed area is
    a little brighter than the matrix. Angles are in radians, from x towards y.
    """
    # half width of the dark line, nm
    core = min(2.4, rng.lognormal(0.2, 0.22)) * (diameter_nm / 22) ** 0.25
    a = diameter_nm / 2
    b = hypot(a * axis_ratio, 0.8 * core)  # an edge-on loop keeps the width of its strain field
    # Python numbers: numpy's float64 scalars would double the width of the arrays
    c, s = cos(angle), sin(angle)
    w = rng.normal(0, 0.028, size=4).tolist()  # unevenness of the outline
    swell = 1 + hypot(w[0], w[1]) + hypot(w[2], w[3])
    reach = [
        (4 * core + swell * hypot(*sides)) / pixel_size_nm
        for sides in ((a * c, b * s), (a * s, b * c))
    ]
    origin, dx, dy = _window(center_px, reach)

    # coordinates in which the ellipse is the unit circle, and a radius of 1 on its uneven outline
    unit_a, unit_b = pixel_size_nm / a, pixel_size_nm / b
    along = dx * (c * unit_a) + dy * (s * unit_a)  # [h, w]
    across = dy * (c * unit_b) - dx * (s * unit_b)  # [h, w]
    radius = np.sqrt(along**2 + across**2 + 1e-6)
    cos1, sin1 = along / radius, across / radius
    cos2, sin2 = 1 - 2 * sin1**2, 2 * cos1 * sin1
    cos3, sin3 = cos2 * cos1 - sin2 * sin1, sin2 * cos1 + cos2 * sin1
    radius /= 1 + w[0] * cos3 + w[1] * sin3 + w[2] * cos2 + w[3] * sin2

    # distance to the ring in half widths of the dark line: to first order outside; inside at most
    # the half chord of a thin ellipse
    slope = np.sqrt((along / a) ** 2 + (across / b) ** 2 + 1e-6 / b**2)
    chord = b * np.sqrt(np.maximum(1 - radius**2, 0))
    distance = np.maximum((radius - 1) * radius / slope, -chord) / core

    floor = rng.uniform(0.22, 0.6)
    phase = 2 * (g_angle - angle) + rng.normal(0, 0.25)
    lopsided = rng.normal(0, 0.18)  # one side of the loop is nearer to the surface
    along_ring = (
        floor + (1 - floor) * 0.5 * (1 + cos2 * cos(phase) + sin2 * sin(phase)) + lopsided * cos1
    )
    wiggle = rng.uniform(0, 0.16)  # oscillation with depth along an inclined loop
    along_ring = np.maximum(along_ring + wiggle * (1 - 2 * sin2**2), 0.08)

    second = rng.uniform(0.15, 0.6) * min(1.0, max(0.0, (b - 2 * core) / (3 * core)))
    gap = rng.uniform(2.2, 3.0)
    ring = np.exp(-0.5 * distance**2) + second * np.exp(-0.62 * (distance + gap) ** 2)
    glow = rng.uniform(0.02, 0.17) * min(1.0, b / (3 * core))
    inner = np.minimum(np.maximum(distance * -0.4, 0), 1)
    halo = rng.uniform(0, 0.14) * np.exp(-0.78 * (distance - 2.4) ** 2)
    contrast = strength * (ring * along_ring - glow * inner * (1 - ring) - halo)
    mask = distance <= 1
    return Drawing(origin, contrast, mask, {"minor_diameter_nm": round(2 * b, 3)})


def draw_dot(rng, center_px, *, diameter_nm, g_angle, strength, pixel_size_nm):
    """Draw a black dot: a small dark cluster with a faint bright lobe along the vector g."""
    sigma = diameter_nm / 2.6  # the dark spot falls to about 0.4 of its depth at its edge
    stretch = rng.uniform(0.8, 1.25)
    tilt = rng.uniform(0, pi)
    origin, dx, dy = _window(center_px, [max(2.0, 4 * sigma / pixel_size_nm)] * 2)
    unit = pixel_size_nm / sigma
    u = dx * (cos(tilt) * unit / stretch) + dy * (sin(tilt) * unit / stretch)  # [h, w]
    v = dy * (cos(tilt) * unit * stretch) - dx * (sin(tilt) * unit * stretch)  # [h, w]
    along_g = dx * (cos(g_angle) * unit) + dy * (sin(g_angle) * unit)  # [h, w]
    square = u**2 + v**2
    lobe = rng.normal(0, 0.22)
    contrast = strength * (np.exp(-0.5 * square) + lobe * along_g * np.exp(-0.35 * square))
    mask = square <= 1.3**2
    if not mask.any():  # smaller than a pixel: the nearest one
        mask = (np.abs(dx) <= 0.5) & (np.abs(dy) <= 0.5)
    return Drawing(origin, contrast, mask)


def draw_line(rng, start_px, *, length_nm, direction, strength, pixel_size_nm):
    """Draw a dislocation line: wavy, its contrast oscillates with depth and fades at its ends.

    Points along the path, a third of a pixel (or of the line's half width) apart, are added to the
    pixels around them with bilinear weights and blurred to the line's width.
    """
    sigma = rng.uniform(1.3, 2.0)  # nm
    step = min(pixel_size_nm, sigma) / 3
    s = np.arange(max(8, int(length_nm / step))) * step  # [n] arc length, nm
    heading = np.full_like(s, direction)
    for wavelength in (1.2 * length_nm, 140.0, 45.0):
        heading += rng.normal(0, 0.3) * np.sin(
            2 * np.pi * s / (wavelength * rng.uniform(0.7, 1.4)) + rng.uniform(0, 6.28)
        )
    x = start_px[0] + np.cumsum(np.cos(heading)) * step / pixel_size_nm
    y = start_px[1] + np.cumsum(np.sin(heading)) * step / pixel_size_nm

    depth = s / s[-1]
    beats = 0.5 + 0.5 * np.cos(2 * np.pi * s / rng.uniform(14, 32) + rng.uniform(0, 6.28))
    near_surface = np.exp(-depth / 0.22) + np.exp(-(1 - depth) / 0.22)  # no beats in mid foil
    fade = np.minimum(1, 12 * np.minimum(depth, 1 - depth) + 0.3)
    weight = (1 - 0.75 * np.minimum(near_surface, 1) * beats) * fade

    pad = int(np.ceil(4 * sigma / pixel_size_nm)) + 1
    x0, y0 = int(np.floor(x.min())) - pad, int(np.floor(y.min())) - pad
    width, height = int(np.floor(x.max())) + pad + 2 - x0, int(np.floor(y.max())) + pad + 2 - y0
    ix, iy = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = x - ix, y - iy
    planes = []
    for values in (weight, np.ones_like(s)):
        plane = np.zeros(height * width)
        for ox, wx in ((0, 1 - fx), (1, fx)):
            for oy, wy in ((0, 1 - fy), (1, fy)):
                at = (iy - y0 + oy) * width + ix - x0 + ox
                plane += np.bincount(at, values * wx * wy, minlength=height * width)
        planes.append(plane.reshape(height, width))
    sigma_px = sigma / pixel_size_nm
    blurred = ndimage.gaussian_filter(
        np.stack(planes).astype(np.float32), (0, sigma_px, sigma_px), truncate=3.5
    )
    # a straight line of weight 1 gets peak 1
    blurred *= np.float32(np.sqrt(2 * np.pi) * sigma * step / pixel_size_nm**2)
    metadata = {"length_nm": round(float(s[-1]), 3)}
    return Drawing((x0, y0), strength * blurred[0], blurred[1] > 0.35, metadata)
