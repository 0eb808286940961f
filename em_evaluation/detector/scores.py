"""What a segmenter gets right on labelled images, as sums that can be drawn again by specimen."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from em_data.micrograph import Defect
from em_evaluation.detector.labelled import LabelledImage, get_mask
from em_evaluation.detector.matching import match, overlap_masks
from em_evaluation.detector.segmenter import LEAST_AREA_PX, Segmenter

SUMS = ("right", "found", "true", "found_px", "true_px")


@dataclass(frozen=True)
class Scores:
    """What was found in a set of images.

    Args:
        groups: Name of each group of images [G], such as the specimens.
        kinds: Names of the kinds [K].
        sums: float64 [G, K, 5]: numbers of right, found and true defects, and the sums of the
            diameters of found and true ones in pixels (of discs with the same area).
        detections: One row (group, kind, score, is right) per found defect, float64 [D, 4].
        quality: Panoptic quality of each image [N] (Kirillov et al. 2019), 0 to 1; 1 for an image
            without defects in which nothing is found.
    """

    groups: tuple[str, ...]
    kinds: tuple[str, ...]
    sums: np.ndarray
    detections: np.ndarray
    quality: np.ndarray

    def to_json(self) -> dict:
        """Return plain lists; scores have four digits."""
        return {
            "groups": list(self.groups),
            "kinds": list(self.kinds),
            "sums": self.sums.round(3).tolist(),
            "detections": self.detections.round(4).tolist(),
            "quality": self.quality.round(4).tolist(),
        }

    @classmethod
    def from_json(cls, content: dict) -> "Scores":
        """Return what `to_json` wrote."""
        return cls(
            tuple(content["groups"]),
            tuple(content["kinds"]),
            np.array(content["sums"], float),
            np.array(content["detections"], float).reshape(-1, 4),
            np.array(content["quality"], float),
        )


@dataclass(frozen=True)
class Comparison:
    """The defects found in one image beside the true ones; tiny ones are left out of both."""

    found: list[Defect]
    true: list[Defect]
    partner: np.ndarray  # int64 [found], index into `true`, or -1

    @property
    def missed(self) -> list[Defect]:
        return [each for i, each in enumerate(self.true) if i not in set(self.partner.tolist())]


def compare(found: Sequence[Defect], true: Sequence[Defect]) -> Comparison:
    """Match found to true defects.

    True defects of less than LEAST_AREA_PX are left out, and so are the finds that match them.
    """
    is_tiny = np.array([np.count_nonzero(get_mask(each)) < LEAST_AREA_PX for each in true], bool)
    partner = match(found, true)
    kept = [i for i, number in enumerate(partner) if number < 0 or not is_tiny[number]]
    number_of = np.cumsum(~is_tiny) - 1
    return Comparison(
        [found[i] for i in kept],
        [each for each, tiny in zip(true, is_tiny) if not tiny],
        np.array([number_of[partner[i]] if partner[i] >= 0 else -1 for i in kept], np.int64),
    )


def score_segmenter(segmenter: Segmenter, images: Sequence[LabelledImage]) -> Scores:
    """Search labelled images and compare with their labels; groups are the specimens."""
    comparisons = [compare(segmenter.find(each), each.defects) for each in images]
    return summarise(comparisons, [each.specimen for each in images], segmenter.kinds)


def summarise(comparisons: Sequence[Comparison], groups, kinds) -> Scores:
    """Return the scores of comparisons, whose images belong to `groups` [N]."""
    names = tuple(sorted(set(groups)))
    sums, rows = np.zeros((len(names), len(kinds), len(SUMS))), []
    quality = np.ones(len(comparisons))
    for i, (each, group) in enumerate(zip(comparisons, groups)):
        g = names.index(group)
        for defect in each.true:
            sums[g, kinds.index(defect.kind)] += (0, 0, 1, 0, _diameter(defect))
        overlap = 0.0
        for defect, number in zip(each.found, each.partner.tolist()):
            k, is_right = kinds.index(defect.kind), number >= 0
            sums[g, k] += (is_right, 1, 0, _diameter(defect), 0)
            rows.append((g, k, defect.metadata["score"], is_right))
            overlap += overlap_masks(defect, each.true[number]) if is_right else 0.0
        if each.found or each.true:
            quality[i] = 2 * overlap / (len(each.found) + len(each.true))
    return Scores(names, tuple(kinds), sums, np.array(rows, float).reshape(-1, 4), quality)


def _diameter(defect):
    return 2 * np.sqrt(np.count_nonzero(get_mask(defect)) / np.pi)


# ---------------------------------------------------------------- from sums [..., K, 5] -> [...]


def f1_score(sums):
    """Return 2 right / (found + true) of all kinds together, 0 to 1."""
    right, found, true = np.moveaxis(sums[..., :3].sum(-2), -1, 0)
    return _divide(2 * right, found + true)


def recall(sums):
    """Return the share of true defects that are found."""
    return _divide(sums[..., 0].sum(-1), sums[..., 2].sum(-1))


def precision(sums):
    """Return the share of found defects that are true."""
    return _divide(sums[..., 0].sum(-1), sums[..., 1].sum(-1))


def density_error(sums):
    """Return how far the number of found defects is from the true one, in percent of it.

    The mean over kinds of the absolute error.
    """
    return 100 * _mean(np.abs(_divide(sums[..., 1], sums[..., 2]) - 1))


def size_error(sums):
    """Return how far the mean diameter of found defects is from the true one, in percent of it.

    The mean over kinds of the absolute error; kinds of which nothing is found are left out.
    """
    found, true = _divide(sums[..., 3], sums[..., 1]), _divide(sums[..., 4], sums[..., 2])
    return 100 * _mean(np.abs(_divide(found, true) - 1))


def _divide(above, below):
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def _mean(values):
    is_known = np.isfinite(values)
    return _divide(np.where(is_known, values, 0).sum(-1), is_known.sum(-1))


def average_precision(scores: Scores, weights=None) -> np.ndarray:
    """Return the average precision at an overlap of 0.5, mean over kinds, for each draw of groups.

    As COCO: the mean precision at 101 recalls. The value of one draw equals faster-coco-eval's.

    Args:
        scores: Scores of one segmenter.
        weights: How often each group is drawn, [R, G]. Default: each once, R = 1.

    Returns:
        float64 [R]; NaN if a draw has no true defect.
    """
    weights = np.ones((1, len(scores.groups))) if weights is None else np.asarray(weights, float)
    values = []
    for k in range(len(scores.kinds)):
        num_true = weights @ scores.sums[:, k, 2]  # [R]
        rows = scores.detections[scores.detections[:, 1] == k]
        rows = rows[np.argsort(-rows[:, 2], kind="stable")]
        drawn = weights[:, rows[:, 0].astype(int)]  # [R, D]
        right, found = np.cumsum(drawn * rows[:, 3], 1), np.cumsum(drawn, 1)
        precisions = _divide(right, found)
        precisions = np.where(np.isfinite(precisions), precisions, 0)
        precisions = np.maximum.accumulate(precisions[:, ::-1], 1)[:, ::-1]
        recalls = _divide(right, np.broadcast_to(num_true[:, None], right.shape))
        value = np.zeros(len(weights))
        for r in range(len(weights)):
            at = np.searchsorted(recalls[r], np.linspace(0, 1, 101), side="left")
            value[r] = np.append(precisions[r], 0.0)[at].mean()
        values.append(np.where(num_true > 0, value, np.nan))
    return _mean(np.stack(values, -1))
