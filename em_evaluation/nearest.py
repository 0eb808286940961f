"""The nearest training view of every image, over all symmetries of the square and small shifts, in blocks.

Two steps: matrix products over averaged windows name a few candidates for each image, and their correlation at full
resolution, shift by shift, decides. The slow twin `correlate_all` tries everything.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import fft, ndimage
from tqdm import tqdm

from em_data.images import Views
from em_data.intensity import to_uint8
from em_data.views import ELEMENTS, apply_symmetry

MAX_SHIFT_PX = 4
SMOOTHING_PX = 1.0  # before comparison, so that the recording's noise, or an autoencoder's lack of it, hides no copy
COARSE_SIDE = 32
NUM_CANDIDATES = 4
ROWS = 2000  # windows compared with all training tiles at once
INVERSE = {name: name for name in ELEMENTS} | {"turn_90": "turn_270", "turn_270": "turn_90"}


@dataclass(frozen=True)
class Nearest:
    """For every image its nearest training view. distance: root of 2 (1 - correlation), from 0 (equal up to brightness and
    contrast) over 1.41 (unrelated) to 2, [N]. tile: the training tile's number [N]. symmetry: index into ELEMENTS of what
    turns the image into the tile's frame [N]. shift_px: (down, right) of the image's window [N, 2].
    """

    distance: np.ndarray
    tile: np.ndarray
    symmetry: np.ndarray
    shift_px: np.ndarray


class TileReader:
    """Training tiles, each once, as uint8 by number: of `Tiles` (or what has `locate` and `batch`) or an array [T, H, W]."""

    def __init__(self, train):
        self.train, self.views, self.coarse = (
            train,
            None,
            {},
        )  # coarse: averaged tiles, made once for several sets
        if isinstance(train, Views):
            _, self.views = np.unique(train.locate(np.arange(len(train)))[0], return_index=True)

    def __len__(self):
        return len(self.train) if self.views is None else len(self.views)

    def __getitem__(self, numbers):
        if self.views is None:
            return np.asarray(self.train[numbers])
        return to_uint8(self.train.batch(self.views[numbers]))[:, 0]


def find_nearest(
    images, train, *, max_shift_px=MAX_SHIFT_PX, name="nearest training views"
) -> Nearest:
    """Find the nearest view among training tiles for uint8 images [N, H, W]; all eight symmetries, shifts up to
    `max_shift_px` along both axes.

    train: what `TileReader` reads, of the same H, W. The inner part of a tile, `max_shift_px` from its edges, is sought in
    the image, so that it does not matter what a generator fills in at the edges after a shift. Both are smoothed first.
    `ValueError` for sizes that differ, are not square, or leave too little inside.
    """
    tiles = train if isinstance(train, TileReader) else TileReader(train)
    side = images.shape[1]
    if images.shape[1:] != tiles[np.arange(1)].shape[1:] or images.shape[2] != side:
        raise ValueError(
            f"images {images.shape[1:]} and training tiles {tiles[np.arange(1)].shape[1:]} must be squares of one size"
        )
    if side - 2 * max_shift_px < 8:
        raise ValueError(
            f"images of {side} pixels are too small for shifts of {max_shift_px}; allow fewer"
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
        candidates = _find_candidates(windows, coarse)
        best += [
            _decide(image, *found, tiles, len(shifts), max_shift_px)
            for image, found in zip(smooth, zip(*candidates))
        ]
    correlation, tile, symmetry, shift = zip(*best)
    return Nearest(
        np.sqrt(np.maximum(2 - 2 * np.array(correlation), 0)),
        np.array(tile),
        np.array(symmetry),
        np.array(shift),
    )


def _smooth(images):
    return ndimage.gaussian_filter(
        np.asarray(images, np.float32), (0, SMOOTHING_PX, SMOOTHING_PX), truncate=3
    )


def _standardise(windows):
    """Return windows [..., D] less their mean and of unit length; constant ones become 0."""
    windows = windows - windows.mean(-1, keepdims=True)
    return windows / np.maximum(np.linalg.norm(windows, axis=-1, keepdims=True), 1e-6)


def _average(windows, factor):
    """Return windows [B, H, W] averaged over squares of `factor` pixels, the rest at the right and the bottom left out."""
    return F.avg_pool2d(torch.from_numpy(np.ascontiguousarray(windows))[:, None], factor)[
        :, 0
    ].numpy()


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
    """Return the averaged, standardised windows of images [B, H, W] under every symmetry and shift [B, 8 x shifts, D]."""
    inside = images.shape[-1] - 2 * margin
    rows = []
    for name in ELEMENTS:
        turned = apply_symmetry(images, name)
        for down, right in shifts:
            window = turned[
                :, margin + down : margin + down + inside, margin + right : margin + right + inside
            ]
            rows.append(_average(window, factor).reshape(len(images), -1))
    return _standardise(np.stack(rows, 1))


def _find_candidates(windows, coarse):
    """Return, for each image, the tiles [B, K] of the highest coarse correlation and the window that has it [B, K]."""
    num, num_windows, size = windows.shape
    products = torch.from_numpy(np.ascontiguousarray(windows).reshape(-1, size)) @ coarse.T
    best, window = products.view(num, num_windows, -1).max(1)  # [B, T]
    tiles = best.topk(min(NUM_CANDIDATES, best.shape[1]), 1).indices
    return tiles.numpy(), window.gather(1, tiles).numpy()


def _decide(image, tile_numbers, windows, tiles, num_shifts, margin):
    """Return (correlation, tile, symmetry, shift) of the best candidate at full resolution, over all shifts."""
    names, best = list(ELEMENTS), (-2.0, -1, 0, (0, 0))
    for tile, content, window in zip(tile_numbers, _smooth(tiles[tile_numbers]), windows):
        symmetry = int(window) // num_shifts
        found = correlate_by_fft(apply_symmetry(image, names[symmetry]), content, margin)
        down, right = np.unravel_index(found.argmax(), found.shape)
        if found[down, right] > best[0]:
            best = (
                float(found[down, right]),
                int(tile),
                symmetry,
                (int(down) - margin, int(right) - margin),
            )
    return best


def correlate_by_fft(image, tile, margin):
    """Return the correlation of a tile's inner part with an image's windows at all shifts up to `margin`, [2 m + 1, 2 m + 1].

    Products by FFT (whose wrap-around no window inside reaches), the windows' means and norms by running sums (Lewis 1995).
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


def correlate_one_by_one(image, tile, margin):
    """Return what `correlate_by_fft` returns, window by window: its slow twin."""
    inside = image.shape[0] - 2 * margin
    inner = _standardise(tile[margin : margin + inside, margin : margin + inside].reshape(1, -1))[0]
    windows = np.stack([
        image[margin + down : margin + down + inside, margin + right : margin + right + inside].ravel()
        for down in range(-margin, margin + 1) for right in range(-margin, margin + 1)
    ])  # fmt: skip
    return (_standardise(windows) @ inner).reshape(2 * margin + 1, -1)


def correlate_all(image, train, max_shift_px=MAX_SHIFT_PX):
    """Return the highest correlation of one uint8 image [H, W] with every tile under every symmetry and shift: the slow twin."""
    tiles, smooth = TileReader(train), _smooth(image[None])[0]
    contents = _smooth(tiles[np.arange(len(tiles))])
    return max(
        float(correlate_one_by_one(apply_symmetry(smooth, name), content, max_shift_px).max())
        for name in ELEMENTS for content in contents
    )  # fmt: skip


def align(tile, symmetry):
    """Return a training tile [H, W] in the frame of the image that it is nearest to."""
    return apply_symmetry(tile, INVERSE[list(ELEMENTS)[symmetry]])
