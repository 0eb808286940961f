"""Images larger than a tile, from overlapping windows. A part of the published pipeline."""

import math

import torch

MAX_PIXELS = 2**26  # of one image: 8192 x 8192, which take about 2 GB of memory
# from this number on, every row of a batch is computed alike, bit for bit (seen with oneDNN, MKL)
EXACT_BATCH = 16


def find_nearest_size(size, tile, factors) -> list[int]:
    """Return the possible [height, width] nearest to `size`, see `find_latent_size`."""
    sides = [max(least, round(n / f) * f) for n, least, f in zip(size, tile, factors)]
    if math.prod(sides) > MAX_PIXELS:
        shrink = math.sqrt(MAX_PIXELS / math.prod(sides))
        sides = [max(least, int(n * shrink / f) * f) for n, least, f in zip(sides, tile, factors)]
        most = MAX_PIXELS // min(sides)  # one side may be at its least
        sides = [min(n, most // f * f) for n, f in zip(sides, factors)]
    return sides


def place_windows(length: int, window: int, shift: float = 0.0) -> list[int]:
    """Return where windows start that cover `length` and overlap by at least half.

    shift: share of the distance between two windows by which the grid is shifted, from 0 to 1.
    """
    step = max(1, window // 2)
    starts = range(-int(shift * step), length - window + step, step)
    return sorted({min(max(start, 0), length - window) for start in starts})


def blend_windows(function, inputs, windows, size, batch_size, *conditions):
    """Apply a function of tiles to inputs [B, C, H, W] window by window and blend the results.

    The weight of a window is a product of squared sines, divided by the sum over all windows.
    Batches are filled up to `EXACT_BATCH` if `batch_size` allows it, so that an image does not
    depend on the other ones.

    Args:
        function: Tiles [N, C, h, w] and conditions [N, ...] -> float32 [N, K, h f, w f].
        windows: Of each image, where windows start in rows and in columns.
        size: (h, w).
        conditions: Tensors [B, ...]; a tile gets the row of its image.

    Returns:
        Float32 [B, K, H f, W f].
    """
    (height, width), outputs = size, None
    jobs = [(i, y, x) for i, (rows, columns) in enumerate(windows) for y in rows for x in columns]
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        padded = part + part[-1:] * (min(batch_size, EXACT_BATCH) - len(part))
        tiles = [inputs[i, :, y : y + height, x : x + width] for i, y, x in padded]
        images = [i for i, _, _ in padded]
        results = function(torch.stack(tiles), *(each[images] for each in conditions))
        if outputs is None:
            factor = results.shape[-1] // width
            sides = [n * factor for n in inputs.shape[-2:]]
            outputs = results.new_zeros(len(inputs), results.shape[1], *sides)
            weights = [
                [
                    weigh_windows(starts, n, side, factor, results.device)
                    for starts, n, side in zip(each, inputs.shape[-2:], size)
                ]
                for each in windows
            ]
        for result, (i, y, x) in zip(results, part):
            down, across = weights[i][0][y], weights[i][1][x]
            place = outputs[i, :, y * factor :, x * factor :][:, : len(down), : len(across)]
            place += result * down[:, None] * across
    return outputs


def weigh_windows(starts, length, window, factor, device):
    """Return {start: weights [window factor]} of windows along one side; their sum is 1."""
    length, window = length * factor, window * factor
    bump = torch.sin((torch.arange(window, dtype=torch.float64) + 0.5) * (math.pi / window)) ** 2
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start * factor :][:window] += bump
    weights = {start: bump / total[start * factor :][:window] for start in starts}
    return {start: each.float().to(device) for start, each in weights.items()}
