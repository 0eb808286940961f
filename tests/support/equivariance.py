"""How well a generator commutes with shifts and turns, in dB (StyleGAN3 paper, 2021, appendix E).

The generator's first signal is shifted or turned. The image is compared with the same shift or turn
of the original image, where both are known: EQ = 10 log10(peak^2 / E[difference^2]). The first
signal of StyleGAN3 is the Fourier features. That of StyleGAN2 is the learned constant,
interpolated bicubically as a periodic image.
"""

import math
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from em_stylegan.em_stylegan3_generator import design_radial_filter

LANCZOS_SIZE = 3  # zero crossings of the interpolation kernel on each side, as in the paper


@contextmanager
def transformed_input(generator, transform):
    """Evaluate the generator's first signal at transform (x, y, 1) within the context.

    transform [3, 3]: The canvas has width 1 and its origin in the middle; y points down.
    """
    network = generator.synthesis_network
    if hasattr(network, "input"):
        buffer = network.input.transform
        before = buffer.clone()
        buffer.copy_(transform.to(buffer) @ before)
        try:
            yield
        finally:
            buffer.copy_(before)
        return
    const = network.blocks[0].const if hasattr(network, "blocks") else network.const
    before = const.data
    size = before.shape[-1]
    grid = F.affine_grid(
        _in_grid_units(transform[:2]).to(before)[None], [1, 1, size, size], align_corners=False
    )
    # a periodic image: of three copies along each side, the grid sees the middle one
    const.data = F.grid_sample(
        before.repeat(1, 3, 3)[None], grid / 3, mode="bicubic", align_corners=False
    )[0]
    try:
        yield
    finally:
        const.data = before


def _in_grid_units(matrix):
    matrix = matrix.clone()
    matrix[:, 2] *= 2  # the grid's canvas goes from -1 to 1
    return matrix


def sample_image(images, transform, margin=0):
    """Sample images [B, C, R, R] at transform (x, y, 1) by Lanczos interpolation.

    Returns:
        Images [B, C, R, R], and a mask [R, R] of the pixels that are known: far enough from the
        border, by `margin` more pixels than the kernel needs.
    """
    size = images.shape[-1]
    position = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / size
    y, x = torch.meshgrid(position, position, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)]).reshape(3, -1)
    u, v = (transform.double() @ points)[:2] * size + (size - 1) / 2  # [R R], in pixels
    rows, columns = (
        _lanczos(axis[:, None] - torch.arange(size)).to(images) for axis in (v, u)
    )  # [R R, R]
    result = torch.einsum("pj,bcpj->bcp", columns, torch.matmul(rows, images))
    reach = LANCZOS_SIZE + margin
    known = (
        (u >= reach - 1) & (u <= size - reach) & (v >= reach - 1) & (v <= size - reach)
    ).reshape(size, size)
    return result.reshape(images.shape), known.to(images.device)


def _lanczos(x):
    x = x.round(decimals=9)  # a shift by whole pixels is exact
    return torch.sinc(x) * torch.sinc(x / LANCZOS_SIZE) * (x.abs() < LANCZOS_SIZE)


def _shift(tx, ty):
    return torch.tensor([[1.0, 0.0, -tx], [0.0, 1.0, -ty], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _turn(angle):
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


@torch.no_grad()
def _measure(generator, draw_transform, num_images, peak, seed, prepare, margin, class_labels):
    rng = torch.Generator().manual_seed(seed)
    device, resolution = generator.device, generator.config.resolution
    total = count = 0.0
    for i in range(num_images):
        z = torch.randn(1, generator.config.z_dim, generator=rng).to(device)
        labels = None if class_labels is None else class_labels[i : i + 1].to(device)
        ws = generator.mapping(z, labels)
        transform = draw_transform(rng, resolution)
        image = prepare(generator.synthesis(ws, "none").double())
        with transformed_input(generator, transform):
            changed = prepare(generator.synthesis(ws, "none").double())
        expected, known = sample_image(image, transform, margin)
        # what enters over the border is unknown in the changed image, too
        border = math.ceil(margin)
        if border:
            inner = torch.zeros_like(known)
            inner[border:-border, border:-border] = True
            known = known & inner
        difference = (changed - expected)[:, :, known]
        total += difference.square().sum().item()
        count += difference.numel()
    if count == 0:
        raise ValueError(
            f"At {resolution} pixels, no pixel is far enough from the border. Measure a generator "
            "of a larger resolution."
        )
    return 10 * math.log10(peak**2 / (total / count)) if total > 0 else math.inf


def translation_equivariance(
    generator,
    num_images=32,
    *,
    fractional=False,
    max_shift=0.125,
    peak=2.0,
    seed=0,
    class_labels=None,
):
    """Measure EQ-T in dB over `num_images` random images and shifts.

    Args:
        fractional: Shift by fractions of a pixel (EQ-T_frac) instead of whole pixels.
        max_shift: Shifts are uniform within this share of the image's side, along both axes.
        peak: Range of the images, 2 for [-1, 1].
        class_labels: Integers [num_images], for a generator with classes.
    """

    def draw(rng, resolution):
        shift = (torch.rand(2, generator=rng, dtype=torch.float64) * 2 - 1) * max_shift * resolution
        shift = shift if fractional else shift.round()
        return _shift(*(shift / resolution).tolist())

    return _measure(generator, draw, num_images, peak, seed, lambda image: image, 0, class_labels)


def rotation_equivariance(
    generator, num_images=32, *, max_angle=math.pi, peak=2.0, seed=0, class_labels=None
):
    """Measure EQ-R in dB over `num_images` random images and angles, uniform within `max_angle`.

    The corners of the square of frequencies turn out of it. So both images pass a low-pass filter
    that is the same in all directions and ends at the largest disc.
    """
    resolution = generator.config.resolution
    num_taps = 2 * LANCZOS_SIZE + 1
    taps = design_radial_filter(num_taps, 0.4 * resolution, 0.2 * resolution, resolution)
    taps = torch.from_numpy(np.ascontiguousarray(taps))

    def prepare(image):
        kernel = taps.to(image).expand(image.shape[1], 1, -1, -1)
        return F.conv2d(image, kernel, padding=LANCZOS_SIZE, groups=image.shape[1])

    def draw(rng, resolution):
        return _turn(float(torch.rand((), generator=rng, dtype=torch.float64) * 2 - 1) * max_angle)

    return _measure(generator, draw, num_images, peak, seed, prepare, LANCZOS_SIZE, class_labels)
