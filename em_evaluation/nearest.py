"""The nearest training view of each image, over the symmetries of the square and small shifts.

Matrix products over averaged windows name a few candidates; their correlation at full resolution,
shift by shift, decides. The tests compare both with an exhaustive search.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import fft, ndimage
from tqdm import tqdm

from em_data.images import Views
from em_data.intensity import from_uint, to_uint8
from em_data.views import ELEMENTS, apply_symmetry

MAX_SHIFT_PX = 4
SMOOTHING_PX = 1.0  # so that noise, or an autoencoder's lack of it, hides no copy
COARSE_SIDE = 32
NUM_CANDIDATES = 4
ROWS = 2000  # windows compared with all training tiles at once
INVERSE = {name: name for name in ELEMENTS} | {"turn_90": "turn_270", "turn_270": "turn_90"}


@dataclass(frozen=True)
class Nearest:
    """The nearest training view of each image.

    distance: root of 2 (1 - correlation): 0 for equal up to brightness and contrast, 1.41 for
    unrelated [N]. tile: the training tile's number [N]. symmetry: index into ELEMENTS of what turns
    the image into the tile's frame [N]. shift_px: (down, right) of the image's window [N, 2].
    """

    distance: np.ndarray
    tile: np.ndarray
    symmetry: np.ndarray
    shift_px: np.ndarray


class TileReader:
    """Training tiles, each once, as uint8 by number: of `Tiles` or an array [T, H, W]."""

    def __init__(self, train):
        self.train, self.views = train, None
        self.coarse = {}  # averaged tiles, made once for several sets
        if isinstance(train, Views):
            _, self.views = np.unique(train.locate(np.arange(len(train)))[0], return_index=True)

    def __len__(self):
        return len(self.train) if self.views is None else len(self.views)

    def __getitem__(self, numbers):
        if self.views is None:
            return np.asarray(self.train[numbers])
        return to_uint8(self.train.batch(self.views[numbers]))[:, 0]

    def batch(self, numbers):
        """Return tiles as float32 [B, 1, H, W] in [-1, 1]."""
        return from_uint(self[np.asarray(numbers)]).unsqueeze(1)


def find_nearest(
    images, train, *, max_shift_px=MAX_SHIFT_PX, name="nearest training views"
) -> Nearest:
    """Find the nearest view among training tiles for uint8 images [N, H, W].

    The inner part of a tile, `max_shift_px` from its edges, is searched in the image under all
    eight symmetries, so that it does not matter what fills the edges after a shift. Both are
    smoothed.

    Raises:
        ValueError: Sizes that differ, are not square, or leave too little inside.
    """
    tiles = train if isinstance(train, TileReader) else TileReader(train)
    side = images.shape[1]
    if images.shape[1:] != tiles[np.arange(1)].shape[1:] or images.shape[2] != side:
        raise ValueError(
            f"The images {images.shape[1:]} and the training tiles "
            f"{tiles[np.arange(1)].shape[1:]} must be squares of one size."
        )
    if side - 2 * max_shift_px < 8:
        raise ValueError(
            f"Images of {side} pixels are too small for shifts of {max_shift_px} pixels."
        )
    factor = max(2, -(-side // COARSE_SIDE))
    step = max(1, min(factor, max_shift_px))
    offsets = np.arange(-(max_shift_px // step) * step, max_shift_px + 1, step)
    shifts = [(down, right) for down in offsets for right in offsets]
    coarse = _coarsen_tiles(tiles, max_shift_px, factor, name)  # [T, D]
    per_block = max(1, ROWS // (len(ELEMENTS) * len(shifts)))
    best = []
    for start in tqdm(range(0, len(images), per_block), name, unit="block", leave=False):
        smooth = _smooth(images[start : start + per_block])
        windows = _make_windows(smooth, shifts, max_shift_px, factor)  # [B, S, D]
        candidates, where = _find_candidates(windows, coarse)  # [B, K] both
        best += [
            _decide(image, numbers, own, tiles, len(shifts), max_shift_px)
            for image, numbers, own in zip(smooth, candidates, where)
        ]
    correlation, *rest = (np.array(each) for each in zip(*best))
    return Nearest(np.sqrt(np.maximum(2 - 2 * correlation, 0)), *rest)


def _smooth(images):
    return ndimage.gaussian_filter(
        np.asarray(images, np.float32), (0, SMOOTHING_PX, SMOOTHING_PX), truncate=3
    )


def _standardise(windows):
    """Return windows [..., D] less their mean and of unit length; constant ones become 0."""
    windows = windows - windows.mean(-1, keepdims=True)
    return windows / np.maximum(np.linalg.norm(windows, axis=-1, keepdims=True), 1e-6)


def _average(windows, factor):
    """Return windows [B, H, W] averaged over squares of `factor` pixels."""
    windows = torch.from_numpy(np.ascontiguousarray(windows)).unsqueeze(1)
    return F.avg_pool2d(windows, factor).squeeze(1).numpy()


def _coarsen_tiles(tiles, margin, factor, name, block=512):
    if (margin, factor) in tiles.coarse:
        return tiles.coarse[margin, factor]
    rows = []
    for start in tqdm(range(0, len(tiles), block), f"{name}: tiles", unit="block", leave=False):
        smooth = _smooth(tiles[np.arange(start, min(start + block, len(tiles)))])
        inner = _average(smooth[:, margin:-margin, margin:-margin] if margin else smooth, factor)
        rows.append(_standardise(inner.reshape(len(inner), -1)))
    tiles.coarse[margin, factor] = torch.from_numpy(np.concatenate(rows))
    return tiles.coarse[margin, factor]


def _make_windows(images, shifts, margin, factor):
    """Return the averaged, standardised windows of images [B, H, W], [B, 8 x shifts, D]."""
    inside = images.shape[-1] - 2 * margin
    rows = []
    for name in ELEMENTS:
        turned = apply_symmetry(images, name)
        for down, right in shifts:
            top, left = margin + down, margin + right
            window = turned[:, top : top + inside, left : left + inside]
            rows.append(_average(window, factor).reshape(len(images), -1))
    return _standardise(np.stack(rows, 1))


def _find_candidates(windows, coarse):
    """Return the tiles of the highest coarse correlation and their windows, [B, K] both."""
    num, num_windows, size = windows.shape
    products = torch.from_numpy(np.ascontiguousarray(windows).reshape(-1, size)) @ coarse.T
    best, window = products.view(num, num_windows, -1).max(1)  # [B, T]
    tiles = best.topk(min(NUM_CANDIDATES, best.shape[1]), 1).indices
    return tiles.numpy(), window.gather(1, tiles).numpy()


def _decide(image, tile_numbers, windows, tiles, num_shifts, margin):
    """Return (correlation, tile, symmetry, shift) of the best candidate at full resolution."""
    names, best = list(ELEMENTS), (-2.0, -1, 0, (0, 0))
    for tile, content, window in zip(tile_numbers, _smooth(tiles[tile_numbers]), windows):
        symmetry = int(window) // num_shifts
        found = correlate_by_fft(apply_symmetry(image, names[symmetry]), content, margin)
        down, right = np.unravel_index(found.argmax(), found.shape)
        if found[down, right] > best[0]:
            shift = int(down) - margin, int(right) - margin
            best = float(found[down, right]), int(tile), symmetry, shift
    return best


def correlate_by_fft(image, tile, margin):
    """Return the correlation of a tile's inner part with an image at all shifts [2 m + 1, 2 m + 1].

    Products by FFT, the windows' means and norms by running sums (Lewis 1995).
    """
    inside = image.shape[0] - 2 * margin
    inner = tile[margin : margin + inside, margin : margin + inside].astype(np.float64)
    inner = inner - inner.mean()
    image = image - image.mean()
    shape = image.shape
    product = fft.irfft2(fft.rfft2(image) * np.conj(fft.rfft2(inner, s=shape)), s=shape)
    product = product[: 2 * margin + 1, : 2 * margin + 1]
    total, square = (
        _window_sums(values, inside, margin) for values in (image, image.astype(np.float64) ** 2)
    )
    norm = np.sqrt(np.maximum(square - total**2 / inside**2, 0)) * np.linalg.norm(inner)
    return np.where(norm > 1e-3, product / np.maximum(norm, 1e-3), 0.0)


def _window_sums(values, inside, margin):
    sums = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    sums[1:, 1:] = values.cumsum(0, dtype=np.float64).cumsum(1)
    low, high = np.s_[: 2 * margin + 1], np.s_[inside : inside + 2 * margin + 1]
    return sums[high, high] - sums[low, high] - sums[high, low] + sums[low, low]


def align(tile, symmetry):
    """Return a training tile [H, W] in the frame of the image that it is nearest to."""
    return apply_symmetry(tile, INVERSE[list(ELEMENTS)[symmetry]])
