"""Average precision as faster-coco-eval computes it, to compare ours with it."""

from collections.abc import Sequence

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from em_data.labels import encode_runs
from em_data.labels.masks import draw_whole_mask
from em_evaluation.detector.scores import Comparison

MOST_DETECTIONS = 1000  # per image; COCO's usual 100 would cut off dense micrographs


def average_precision_coco(comparisons: Sequence[Comparison], shapes, kinds) -> float:
    """Return the average precision at an overlap of 0.5 as faster-coco-eval computes it.

    shapes: (H, W) of each image.
    """
    images, true, found = [], [], []
    for image_id, (each, (height, width)) in enumerate(zip(comparisons, shapes), start=1):
        images.append({"id": image_id, "height": height, "width": width})
        for out, defects in ((true, each.true), (found, each.found)):
            for defect in defects:
                mask = draw_whole_mask(defect, (height, width))
                x0, y0, x1, y1 = defect.box_px
                row = {
                    "id": len(out) + 1,
                    "image_id": image_id,
                    "category_id": kinds.index(defect.kind) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": encode_runs(mask)},
                }
                if out is found:
                    row["score"] = defect.metadata["score"]
                out.append(row)
    categories = [{"id": i, "name": kind} for i, kind in enumerate(kinds, start=1)]
    truth = COCO({"images": images, "annotations": true, "categories": categories})
    if not found:
        return 0.0
    measure = COCOeval_faster(truth, truth.loadRes(found), "segm", rle_iou_max_workers=1)
    measure.params.iouThrs = np.array([0.5])
    measure.params.maxDets = [MOST_DETECTIONS]
    measure.params.areaRng, measure.params.areaRngLbl = [[0, 1e10]], ["all"]
    measure.evaluate()
    measure.accumulate()
    values = measure.eval["precision"][0, :, :, 0, 0]  # [recalls, kinds]
    return float(values[:, values[0] >= 0].mean())
