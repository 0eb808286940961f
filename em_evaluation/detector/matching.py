"""Which detections are right: masks matched one to one at an intersection over union of 0.5."""

from collections.abc import Sequence

import numpy as np

from em_data.micrograph import Defect
from em_evaluation.detector.labelled import get_mask

LEAST_OVERLAP = 0.5  # intersection over union


def overlap_masks(a: Defect, b: Defect) -> float:
    """Return the intersection over union of the masks of two defects of one image."""
    x0, y0 = max(a.box_px[0], b.box_px[0]), max(a.box_px[1], b.box_px[1])
    x1, y1 = min(a.box_px[2], b.box_px[2]), min(a.box_px[3], b.box_px[3])
    if x0 >= x1 or y0 >= y1:
        return 0.0
    mask_a, mask_b = get_mask(a), get_mask(b)
    shared = _cut(mask_a, a.box_px, x0, y0, x1, y1) & _cut(mask_b, b.box_px, x0, y0, x1, y1)
    num_shared = np.count_nonzero(shared)
    return num_shared / (np.count_nonzero(mask_a) + np.count_nonzero(mask_b) - num_shared)


def _cut(mask, box, x0, y0, x1, y1):
    return mask[y0 - box[1] : y1 - box[1], x0 - box[0] : x1 - box[0]]


def match(found: Sequence[Defect], true: Sequence[Defect]) -> np.ndarray:
    """Return for each found defect the number of its true one, or -1, int64 [D].

    As COCO does: in falling order of scores, each takes the free true defect of its kind with the
    largest overlap, if that is at least LEAST_OVERLAP.
    """
    order = sorted(range(len(found)), key=lambda i: -found[i].metadata["score"])
    partner, is_free = np.full(len(found), -1, np.int64), np.ones(len(true), bool)
    for i in order:
        overlaps = [
            overlap_masks(found[i], each) if free and each.kind == found[i].kind else 0.0
            for each, free in zip(true, is_free)
        ]
        best = int(np.argmax(overlaps)) if overlaps else -1
        if best >= 0 and overlaps[best] >= LEAST_OVERLAP:
            partner[i], is_free[best] = best, False
    return partner
