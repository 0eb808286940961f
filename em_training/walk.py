"""A smooth closed path through given points, for videos of what a model has learned."""

import torch


def walk(keys: torch.Tensor, frames_per_key: int) -> torch.Tensor:
    """Return a closed, smooth path [K frames_per_key, ...] through keys [K, ...].

    It is the cubic of Catmull and Rom (1974): it passes key i at frame i * frames_per_key, and its
    velocity there is half the difference of the neighbouring keys.
    """
    t = torch.arange(frames_per_key, dtype=keys.dtype) / frames_per_key
    t = t.to(keys.device).reshape(1, -1, *[1] * (keys.ndim - 1))
    before, start, end, after = (keys.roll(shift, dims=0).unsqueeze(1) for shift in (1, 0, -1, -2))
    path = start + t / 2 * (
        end
        - before
        + t * (2 * before - 5 * start + 4 * end - after + t * (3 * (start - end) + after - before))
    )
    return path.flatten(0, 1)


def walk_noise(keys: torch.Tensor, frames_per_key: int) -> torch.Tensor:
    """Return a closed path [K frames_per_key, ...] through normal noise keys [K, ...].

    Every frame is normal noise of unit variance. A frame of `walk` is a sum of the keys with
    weights a. The sum of independent normal keys has the variance sum a², so the weights are
    divided by its root.
    """
    weights = walk(torch.eye(len(keys)), frames_per_key)  # [K frames_per_key, K]
    weights = weights / weights.norm(dim=1, keepdim=True)
    return torch.einsum("fk,k...->f...", weights, keys)
