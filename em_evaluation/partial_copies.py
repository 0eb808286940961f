"""Partial copies: is one half of a generated image that of a training tile?

Each half of each training tile is searched in the images, under the eight symmetries, give or take
a few pixels. Matrix products over averaged halves name candidates, and the correlation of the
pixels decides. The false alarms are counted on held-out tiles.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from em_data.views import ELEMENTS, apply_symmetry
from em_evaluation.interval import to_json
from em_evaluation.memorisation import share_interval
from em_evaluation.nearest import SMOOTHING_PX, TileReader, _average, _standardise

WORKING_SIDE = 64  # larger images are averaged down to at least this side
LEAST_SIDE = 48
MARGIN = 4  # working pixels: how far a half may have moved; its edge is not compared
PARTIAL_RATIO = 0.6  # of the median distance of held-out tiles, below which it is a copy
NUM_PAIRS = 1_000_000  # pairs of image and training tile in each set, which bounds the time
FEWEST = 50  # images of each set, however many training tiles there are
NUM_CANDIDATES = 16
BLOCK = 8  # images compared with all training tiles at once


@dataclass(frozen=True)
class NearestHalf:
    """The nearest half of a training tile for each image.

    distance: root of 2 (1 - correlation), from 0 to 2 [N]. tile: the training tile's number [N].
    symmetry: index into ELEMENTS of what turns the image into the tile's frame [N]. half: 0 top,
    1 bottom, 2 left, 3 right of the tile [N].
    """

    distance: np.ndarray
    tile: np.ndarray
    symmetry: np.ndarray
    half: np.ndarray


def measure_partial_copies(generated, held_out, train, *, log=print) -> dict | None:
    """Count the images of each set that share one half with a training tile.

    Whole copies count, too. Of each set, the first images are searched, as many as `NUM_PAIRS`
    allows. generated: name -> ImageSet. held_out: sets the scale and shows the false alarms. train:
    `Tiles`. Returns JSON values, or None for images below 48 pixels.
    """
    if min(held_out.resolution) < LEAST_SIDE or held_out.resolution[0] != held_out.resolution[1]:
        return None
    start, tiles = time.perf_counter(), TileReader(train)
    number = max(FEWEST, NUM_PAIRS // len(tiles))
    contents, factor = prepare(tiles[np.arange(len(tiles))])
    distances = {
        key: find_nearest_halves(images.levels[:number, 0], contents, factor).distance
        for key, images in {"held_out": held_out, **generated}.items()
    }
    scale = float(np.median(distances["held_out"])) or 1.0
    rows = {}
    for key, values in distances.items():
        copies = int((values < PARTIAL_RATIO * scale).sum())
        rows[key] = {
            "num_images": len(values),
            "median_ratio": float(np.median(values) / scale),
            "least_ratio": float(values.min() / scale),
            "num_copies": copies,
            "copies": share_interval(copies, len(values)),
        }
    log(
        f"partial copies: {len(tiles):,} training tiles searched in "
        f"{time.perf_counter() - start:.1f} s"
    )
    shift = MARGIN * factor
    return to_json({"ratio": PARTIAL_RATIO, "scale": scale, "max_shift_px": shift, "sets": rows})


def prepare(images):
    """Return uint8 images [N, H, W] averaged, less noise and slow changes, and the factor."""
    factor = max(1, images.shape[1] // WORKING_SIDE)
    images = _average(np.asarray(images, np.float32), factor)
    slow = images.shape[1] / 8
    return (
        ndimage.gaussian_filter(images, (0, SMOOTHING_PX, SMOOTHING_PX), truncate=3)
        - ndimage.gaussian_filter(images, (0, slow, slow), truncate=3)
    ), factor


def find_nearest_halves(images, contents, factor) -> NearestHalf:
    """Find for uint8 images [N, H, W] the nearest half among training tiles.

    contents, factor: what `prepare` returns for the training tiles [T, H, W].
    """
    side = contents.shape[1]
    if images.shape[1] // factor != side or images.shape[1] != images.shape[2]:
        raise ValueError(
            f"The images {images.shape[1:]} and the training tiles must be squares of one size."
        )
    halves = list_halves(side)
    coarse = [_coarsen(contents[:, *half]).T.contiguous() for half in halves]  # [D, T] each
    found = []
    for start in tqdm(range(0, len(images), BLOCK), "partial copies", unit="block", leave=False):
        block, _ = prepare(images[start : start + BLOCK])
        turned = np.stack([apply_symmetry(block, name) for name in ELEMENTS], 1)  # [B, 8, S, S]
        by_half = [_score(turned, half, each) for half, each in zip(halves, coarse)]
        scores, windows = (torch.stack(each, 1).flatten(1) for each in zip(*by_half))  # [B, 4 T]
        best = scores.topk(min(NUM_CANDIDATES, scores.shape[1]), 1).indices
        where = windows.gather(1, best)
        for image, *candidates in zip(turned, best.tolist(), where.tolist()):
            decided = (
                _decide(image, i, window, contents, halves) for i, window in zip(*candidates)
            )
            found.append(max(decided))
    correlation, tile, symmetry, half = (np.array(each) for each in zip(*found))
    return NearestHalf(np.sqrt(np.maximum(2 - 2 * correlation, 0)), tile, symmetry, half)


def list_halves(side) -> list[tuple[slice, slice]]:
    """Return rows and columns of the halves of a square: top, bottom, left, right."""
    middle, whole = side // 2, slice(MARGIN, side - MARGIN)
    first, second = slice(MARGIN, middle - MARGIN), slice(side - middle + MARGIN, side - MARGIN)
    return [(first, whole), (second, whole), (whole, first), (whole, second)]


SHIFTS = [(down, right) for down in (-MARGIN, 0, MARGIN) for right in (-MARGIN, 0, MARGIN)]


def _coarsen(windows):
    """Return windows [..., h, w] averaged over a sixteenth of a side, standardised [..., D]."""
    square = max(2, (max(windows.shape[-2:]) + 2 * MARGIN) // 16)
    averaged = _average(windows.reshape(-1, *windows.shape[-2:]), square)
    return torch.from_numpy(_standardise(averaged.reshape(*windows.shape[:-2], -1)))


def _score(turned, half, coarse):
    """Return the highest coarse correlation of images [B, 8, S, S] with each tile's half."""
    windows = np.stack([turned[..., *_move(half, shift)] for shift in SHIFTS], 2)  # [B, 8, 9, h, w]
    queries = _coarsen(windows).flatten(1, 2)  # [B, 72, D]
    products = queries.flatten(0, 1) @ coarse
    return products.view(len(turned), queries.shape[1], -1).max(1)


def _move(half, shift):
    return tuple(slice(s.start + by, s.stop + by) for s, by in zip(half, shift))


def _decide(turned, number, window, contents, halves):
    """Return (correlation, tile, symmetry, half) of a candidate, over the shifts around it."""
    half, tile = divmod(number, len(contents))
    symmetry, shift = divmod(window, len(SHIFTS))
    content = contents[tile][halves[half]]
    reach = MARGIN // 2
    down, right = (
        slice(max(0, s.start - reach), s.stop + reach) for s in _move(halves[half], SHIFTS[shift])
    )  # of what may have moved
    around = np.lib.stride_tricks.sliding_window_view(turned[symmetry][down, right], content.shape)
    correlations = (
        _standardise(around.reshape(-1, content.size)) @ _standardise(content.reshape(1, -1))[0]
    )
    return float(correlations.max()), tile, symmetry, half
