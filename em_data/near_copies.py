"""Find near copies: micrographs that show the same scene under other names.

A copy may be compressed, filtered, stretched in contrast, rescaled, turned, flipped or cropped, or
be another frame of a series. Two searches give candidates: one compares whole micrographs, the
other the surroundings of prominent points, which finds crops. A candidate counts if the normalised
cross-correlation of both micrographs at low resolution has one high and distinct peak over all
shifts. The next best shift is the yardstick: periodic structures fit their neighbours, too.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from scipy import fft, ndimage

from em_data.views import ELEMENTS, apply_symmetry

NAMES = tuple(ELEMENTS)
NUM_POINTS = {256: 48, 128: 32, 64: 16}  # prominent points by the longer side of a level
KEPT_SIDE = 128  # of the largest level that is kept for verification
MIN_SIDE = 24  # of a level and of an overlap
REACH, STEP = 12, 3  # pixels around a point, and between samples
WHOLE_SIDE = 12  # pixels to which whole micrographs are reduced
MIN_WHOLE, MIN_POINT = 0.5, 0.85  # correlations that make a candidate
MIN_VOTES = 3  # pairs of points that agree on symmetry and scale
MAX_POINTS = 32_000  # of all micrographs, which bounds the time
MAX_FOR_CROPS = MAX_POINTS // 16  # of more micrographs, crops are not looked for
MAX_PARTNERS = 64  # candidates of a micrograph in one view, which bounds the memory
MAX_CHECKS = 20  # candidates of a micrograph that are verified, which bounds the time, too
MIN_CORRELATION = 0.5  # of near copies over their overlap
MIN_GAP = 0.3  # of Fisher's z between the best shift and the next; more for periodic structures
MIN_DISTINCTION = 5.0  # the same gap in standard deviations
CORRELATED_PX = 28.0  # area over which the noise of a level is correlated: 4 pi 1.5**2
QUANTUM = 32.0  # steps per standard deviation of a level that is kept as 8 bits


@dataclass(eq=False)
class Signature:
    """What is kept of a micrograph for comparison: about 30 kB.

    Args:
        levels: int8 [h, w] by octave: normalised grey levels of squares of 2**octave pixels.
        whole: float32 [WHOLE_SIDE, WHOLE_SIDE], of unit length.
        points: float16 [n, samples], surroundings of prominent points in their normal view.
        octaves: int8 [n], of the points' levels.
        views: int8 [n], number of the symmetry that leads to the normal view.
    """

    levels: dict[int, np.ndarray]
    whole: np.ndarray
    points: np.ndarray
    octaves: np.ndarray
    views: np.ndarray


def make_signature(image: np.ndarray, with_points: bool = True) -> Signature:
    """Return the signature of a micrograph [H, W]. Points are needed to find crops."""
    octave = 0
    while max(image.shape) > max(NUM_POINTS) * 2**octave:
        octave += 1
    small = _average(image, 2**octave)
    small = np.clip(small, *np.percentile(small, (0.5, 99.5)))
    levels, parts = {}, []
    for side, most in NUM_POINTS.items():
        if max(small.shape) <= side // 2 and side > min(NUM_POINTS):
            continue
        level = _normalise(small)
        if max(level.shape) <= KEPT_SIDE:
            levels[octave] = np.clip(np.rint(level * QUANTUM), -127, 127).astype(np.int8)
        points, views = _describe_points(level, most if with_points else 0)
        parts.append((points, np.full(len(points), octave, np.int8), views))
        small, octave = _average(small, 2), octave + 1
        if min(small.shape) < MIN_SIDE and levels:
            break
    ranks = np.concatenate([np.arange(len(points)) for points, *_ in parts])
    order = np.argsort(ranks, kind="stable")  # the most prominent points of all levels first
    points, octaves, views = (np.concatenate(part)[order] for part in zip(*parts))
    whole = _reduce(levels[min(levels)].astype(np.float32))
    return Signature(levels, whole, points, octaves, views)


def _average(image, factor):
    height, width = (max(1, length // factor) for length in image.shape)
    rows = image[: height * factor, : width * factor].reshape(height, -1, width * factor)
    return rows.mean(axis=1, dtype=np.float32).reshape(height, width, -1).mean(axis=2)


def _normalise(image):
    """Return an image without slow changes of grey level and contrast, 0 beside flat padding."""
    band = ndimage.gaussian_filter(image, 1.5) - ndimage.uniform_filter(image, 17)
    contrast = np.sqrt(ndimage.uniform_filter(band * band, 17).clip(0))
    band = np.clip(band / (contrast + 0.05 * contrast.mean() + 1e-6), -3, 3)
    is_flat = ndimage.maximum_filter(image, 5) == ndimage.minimum_filter(image, 5)
    if is_flat.any():
        band[ndimage.maximum_filter(is_flat, 21)] = 0
    return band


def _reduce(level):
    """Return a whole level as WHOLE_SIDE x WHOLE_SIDE pixels of unit length."""
    blurred = ndimage.gaussian_filter(level, [length / WHOLE_SIDE / 2 for length in level.shape])
    whole = _resize(blurred, (WHOLE_SIDE, WHOLE_SIDE))
    whole = whole - whole.mean()
    return whole / (np.linalg.norm(whole) + 1e-9)


def _resize(image, shape):
    positions = ((np.arange(new) + 0.5) * old / new - 0.5 for new, old in zip(shape, image.shape))
    grid = np.meshgrid(*positions, indexing="ij")
    return ndimage.map_coordinates(image, grid, order=1, mode="nearest")


def _describe_points(level, most):
    """Return (points, views) of the most prominent points of a level, see `Signature`.

    A point whose surroundings look like those of another in the same level is left out.
    """
    offsets = np.arange(0, 2 * REACH + 1, STEP)
    if min(level.shape) <= 2 * REACH or not most:
        return np.zeros((0, len(offsets) ** 2), np.float16), np.zeros(0, np.int8)
    blurred = ndimage.gaussian_filter(level, 1)
    strength = np.abs(blurred)
    is_peak = (strength == ndimage.maximum_filter(strength, 7))[REACH:-REACH, REACH:-REACH]
    rows, columns = np.nonzero(is_peak)
    order = np.argsort(-strength[rows + REACH, columns + REACH], kind="stable")[:most]
    samples = blurred[
        rows[order, None, None] + offsets[:, None], columns[order, None, None] + offsets
    ]
    samples = samples - samples.mean(axis=(1, 2), keepdims=True)
    samples /= np.linalg.norm(samples, axis=(1, 2), keepdims=True) + 1e-9
    points, views, ramp = samples.copy(), np.zeros(len(samples), np.int8), offsets - REACH
    for number, name in enumerate(NAMES):
        turned = apply_symmetry(samples, name)
        down, across = (turned * ramp[:, None]).sum((1, 2)), (turned * ramp).sum((1, 2))
        is_normal = (down > 0) & (down <= across)
        views[is_normal], points[is_normal] = number, turned[is_normal]
    points = points.reshape(len(points), len(offsets) ** 2)
    alike = points @ points.T - 2 * np.eye(len(points))
    is_single = (alike < MIN_POINT).all(axis=1)
    return points[is_single].astype(np.float16), views[is_single]


def find_near_copies(
    signatures: list[Signature], known: Iterable[tuple[int, int]] = ()
) -> list[tuple[int, int]]:
    """Return pairs of near copies (i, j), i < j, by number.

    Pairs that follow from others are left out: three copies of one scene are two pairs.

    Args:
        signatures: Of the micrographs.
        known: Pairs that are known to belong together. They are not compared.
    """
    groups, pairs, checks = Groups(len(signatures)), [], Counter()
    for i, j in known:
        groups.join(i, j)
    for i, j, symmetry, shift in [*_match_wholes(signatures), *_match_points(signatures)]:
        if groups.find(i) == groups.find(j) or min(checks[i], checks[j]) >= MAX_CHECKS:
            continue
        checks.update((i, j))
        if _is_copy(signatures[i], signatures[j], symmetry, shift):
            groups.join(i, j)
            pairs.append((i, j))
    return sorted(pairs)


def pair_equals(values: Iterable[Hashable]) -> list[tuple[int, int]]:
    """Return (first, i) for each value that equals an earlier one: the first one's number and i."""
    first: dict[Hashable, int] = {}
    firsts = [first.setdefault(value, i) for i, value in enumerate(values)]
    return [(at, i) for i, at in enumerate(firsts) if at != i]


class Groups:
    """Disjoint sets of the numbers 0 to num - 1."""

    def __init__(self, num: int):
        self.parents = list(range(num))

    def find(self, i: int) -> int:
        """Return the least number of the set of i."""
        while self.parents[i] != i:
            self.parents[i] = self.parents[self.parents[i]]
            i = self.parents[i]
        return i

    def join(self, i: int, j: int) -> None:
        """Unite the sets of i and j."""
        least, other = sorted((self.find(i), self.find(j)))
        self.parents[other] = least


def _match_wholes(signatures):
    """Return candidates (i, j, symmetry, None) whose wholes are alike, likely ones first."""
    if len(signatures) < 2:
        return []
    wholes, found = np.stack([each.whole for each in signatures]), []
    for number, name in enumerate(NAMES):
        turned = apply_symmetry(wholes, name).reshape(len(wholes), -1)
        for start in range(0, len(wholes), 1024):
            alike = wholes[start : start + 1024].reshape(-1, turned.shape[1]) @ turned[start:].T
            alike[:, : len(alike)] = np.triu(alike[:, : len(alike)], 1)  # each pair once
            _keep_likely(alike)
            i, j = np.nonzero(alike > MIN_WHOLE)
            found.append((alike[i, j], i + start, j + start, np.full(len(i), number)))
    alike, i, j, number = (np.concatenate(part) for part in zip(*found))
    order = np.lexsort((number, j, i, -alike))
    return zip(i[order].tolist(), j[order].tolist(), number[order].tolist(), repeat(None))


def _keep_likely(alike):
    """Set to 0 all but the MAX_PARTNERS largest values of each row, in place.

    Else thousands of frames of one scene, each of which is like all others, fill the memory.
    """
    crowded = np.count_nonzero(alike > MIN_WHOLE, axis=1) > MAX_PARTNERS
    for row in np.flatnonzero(crowded):
        kept = np.argpartition(alike[row], -MAX_PARTNERS)[-MAX_PARTNERS:]
        values = alike[row, kept]
        alike[row] = 0
        alike[row, kept] = values


def _match_points(signatures):
    """Return candidates (i, j, symmetry, shift of octaves) with points that are alike."""
    if not signatures:
        return []
    few = slice(0, MAX_POINTS // len(signatures))
    points = [each.points[few] for each in signatures]
    owners = np.repeat(np.arange(len(points)), [len(each) for each in points])
    points = np.concatenate(points).astype(np.float32)
    octaves = np.concatenate([each.octaves[few] for each in signatures]).astype(int)
    views = np.concatenate([each.views[few] for each in signatures])
    votes = Counter()
    for start in range(0, len(points), 2048):
        alike = points[start : start + 2048] @ points[start:].T > MIN_POINT
        i, j = (each + start for each in np.nonzero(alike))
        i, j = (each[owners[i] < owners[j]] for each in (i, j))
        shift = octaves[j] - octaves[i]
        symmetry = RELATIVE[views[i], views[j]]
        votes.update(zip(*(each.tolist() for each in (owners[i], owners[j], symmetry, shift))))
    return [key for key, num in votes.most_common() if num >= MIN_VOTES]


def _make_relative():
    """Return [8, 8]: the symmetry g with a(g(x)) = b(x) for all x, by the numbers of a and b."""
    probe, table = np.arange(9).reshape(3, 3), np.zeros((8, 8), np.int8)
    seen = {apply_symmetry(probe, name).tobytes(): number for number, name in enumerate(NAMES)}
    for a, first in enumerate(NAMES):
        for g, then in enumerate(NAMES):
            b = seen[apply_symmetry(apply_symmetry(probe, then), first).tobytes()]
            table[a, b] = g
    return table


RELATIVE = _make_relative()


def _is_copy(one, other, symmetry, shift) -> bool:
    """Return True if a micrograph is a near copy of another one under a symmetry.

    shift: octave of the other less that of the one; None if both show the whole scene.
    """
    first, second = min(one.levels), min(other.levels)
    if shift is not None:
        first = next((each for each in sorted(one.levels) if each + shift in other.levels), None)
        if first is None:
            return False
        second = first + shift
    first = one.levels[first] / np.float32(QUANTUM)
    second = apply_symmetry(other.levels[second] / np.float32(QUANTUM), NAMES[symmetry])
    if shift is None:  # to one size
        first, second = sorted((first, second), key=np.size)
        second = _resize(second, first.shape)
    (best, num), (next_best, num_next) = correlate(first, second)
    gap = np.arctanh(best) - np.arctanh(next_best)
    is_distinct = gap * np.sqrt(min(num, num_next)) >= MIN_DISTINCTION
    return bool(best >= MIN_CORRELATION and gap >= MIN_GAP + next_best**2 and is_distinct)


def correlate(first: np.ndarray, second: np.ndarray) -> list[tuple[float, float]]:
    """Compare two normalised images [h, w] over all shifts.

    Returns:
        Correlation over the overlap, at most 0.9999, and the number of independent pixels there:
        of the best shift and of the best one elsewhere.
    """
    shape = [fft.next_fast_len(a + b - 1, real=True) for a, b in zip(first.shape, second.shape)]
    product = fft.rfft2(first, shape) * np.conj(fft.rfft2(second, shape))
    rows, columns = (
        _measure_overlap(*lengths) for lengths in zip(shape, first.shape, second.shape)
    )
    areas = np.outer(rows * (rows >= MIN_SIDE), columns * (columns >= MIN_SIDE))
    scores = np.where(areas > 0, fft.irfft2(product, shape), -np.inf)
    scores /= np.sqrt(np.maximum(areas, 1))
    results = []
    for _ in range(2):
        shift = np.unravel_index(np.argmax(scores), scores.shape)
        one, other = _cut_overlap(first, second, shift, shape)
        is_used = (one != 0) & (other != 0)  # not flat padding
        num = np.count_nonzero(is_used)
        deviations = one[is_used].std() * other[is_used].std() if num else 0
        correlation = np.corrcoef(one[is_used], other[is_used])[0, 1] if deviations else 0.0
        results.append((float(np.clip(correlation, -0.9999, 0.9999)), float(num / CORRELATED_PX)))
        around = [np.arange(at - 6, at + 7) % length for at, length in zip(shift, shape)]
        scores[np.ix_(*around)] = -np.inf
    return results


def _measure_overlap(length, first, second):
    """Return the overlap of two lines of pixels by the shift of the second, modulo `length`."""
    shifts = np.arange(length)
    shifts[shifts >= first] -= length
    return np.clip(np.minimum(first, shifts + second) - np.maximum(shifts, 0), 0, None)


def _cut_overlap(first, second, shift, shape):
    """Return the pixels that two images share, both flat, for a shift of the second."""
    in_first, in_second = [], []
    for at, length, a, b in zip(shift, shape, first.shape, second.shape):
        at = at - length if at >= a else at
        begin, end = max(at, 0), min(a, at + b)
        in_first.append(slice(begin, end))
        in_second.append(slice(begin - at, end - at))
    return first[tuple(in_first)].ravel(), second[tuple(in_second)].ravel()
