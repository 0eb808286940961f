"""Augmentation of labelled images: flips and turns, or strong classical augmentation."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from em_data.views import SYMMETRIES, apply_symmetry
from em_evaluation.detector.labelled import Instance

MOST_PASTED = 3  # instances per crop
TRIES = 4  # places that are tried for an instance
SHARE = 0.5  # of the crops that each operation of the strong augmentation changes


def turn(channels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return channels [C, H, W] under one of the eight symmetries of the square."""
    symmetries = SYMMETRIES["d4"]
    return apply_symmetry(channels, symmetries[rng.integers(len(symmetries))])


def paste(crop: np.ndarray, instances: list[Instance], rng: np.random.Generator) -> None:
    """Paste up to MOST_PASTED instances into a crop [1 + 2 K, H, W] in place.

    The crop holds grey levels, masks and cores. Instances are turned and keep clear of what is
    there. Their contrast is added to the local level of the ground.
    """
    if not instances:
        return
    num_kinds, (height, width) = (len(crop) - 1) // 2, crop.shape[1:]
    for _ in range(rng.integers(MOST_PASTED + 1)):
        instance = instances[rng.integers(len(instances))]
        stack = np.stack([instance.contrast, instance.mask, instance.core, instance.weight])
        contrast, mask, core, weight = turn(stack, rng)
        h, w = mask.shape
        if h > height or w > width:
            continue
        for _ in range(TRIES):
            y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
            target = crop[:, y : y + h, x : x + w]
            if not target[1 : 1 + num_kinds, mask > 0].any():
                ground = np.median(target[0])
                level = ground + contrast * rng.uniform(0.8, 1.2)
                target[0] += weight * (level - target[0])
                target[1 + instance.kind][mask > 0] = 1
                target[1 + num_kinds + instance.kind][core > 0] = 1
                break


def distort(batch: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Scale, turn and bend half of the crops [B, 1 + 2 K, H, W]; masks stay 0 and 1."""
    chosen = torch.rand(len(batch), generator=rng) < SHARE
    num, (height, width) = int(chosen.sum()), batch.shape[2:]
    if num == 0:
        return batch
    angle = (torch.rand(num, generator=rng) - 0.5) * math.pi / 6
    scale = torch.exp((torch.rand(num, 2, generator=rng) - 0.5) * 0.5)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [cos * scale[:, 0], -sin * scale[:, 1], sin * scale[:, 0], cos * scale[:, 1]]
    matrix = F.pad(torch.stack(rows, 1).reshape(num, 2, 2), (0, 1))
    grid = F.affine_grid(matrix, [num, 1, height, width], align_corners=False)
    bend = torch.randn(num, 2, 5, 5, generator=rng) * (2.5 / max(height, width))
    bend = F.interpolate(bend, (height, width), mode="bicubic", align_corners=False)
    moved = F.grid_sample(
        batch[chosen], grid + bend.permute(0, 2, 3, 1), padding_mode="reflection",
        align_corners=False,
    )  # fmt: skip
    moved[:, 1:] = (moved[:, 1:] > 0.5).to(batch.dtype)
    batch = batch.clone()
    batch[chosen] = moved
    return batch


def change_levels(levels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Change contrast, brightness, shading, sharpness and noise of grey levels [B, 1, H, W]."""
    num, _, height, width = levels.shape

    def draw(low, high):
        return low + (high - low) * torch.rand(num, 1, 1, 1, generator=rng)

    def for_half(before, after):
        return torch.where(draw(0, 1) < SHARE, after, before)

    levels = for_half(levels, levels * torch.exp(draw(-0.35, 0.35)) + draw(-0.4, 0.4))
    shading = torch.randn(num, 1, 3, 3, generator=rng) * 0.35
    shading = F.interpolate(shading, (height, width), mode="bicubic", align_corners=False)
    levels = for_half(levels, levels + shading)
    levels = for_half(levels, _blur(levels, draw(0.4, 1.2)))
    noise = torch.randn(levels.shape, generator=rng)
    return for_half(levels, levels + noise * draw(0.05, 0.5))


def _blur(levels, sigma):
    """Blur each image [B, 1, H, W] with a Gaussian of its own deviation [B, 1, 1, 1] in pixels."""
    num = len(levels)
    offsets = torch.arange(-3, 4, dtype=levels.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.reshape(num, 1)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    stack = F.pad(levels.transpose(0, 1), (3, 3, 3, 3), mode="reflect")
    stack = F.conv2d(stack, kernel.reshape(num, 1, 1, 7), groups=num)
    return F.conv2d(stack, kernel.reshape(num, 1, 7, 1), groups=num).transpose(0, 1)
