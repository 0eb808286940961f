"""How reliable the detector of defects is: precision and recall on synthetic micrographs.

python -m em_evaluation.calibrate_detector --resolution 256 --out calibration.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from em_data.cutting import find_tile_positions
from em_data.files import write_atomically
from em_data.synthetic_micrographs import synthesise_micrographs
from em_evaluation.defects import KINDS, DetectorSettings, detect_defects
from em_evaluation.interval import Interval
from em_evaluation.numbers import format_interval

SEED = 31  # not that of training data (0) or of the micrographs for tuning (77)
LEAST_OVERLAP = 0.3  # intersection over union of the boxes of a loop or a line and of its match
LEAST_SEEN = 0.5  # share of a defect that a tile must show before it counts as missed
PIXEL_SIZES_NM = (0.25, 4.0)  # finer: too few defects; coarser: none visible


def calibrate_detector(
    resolution=256, pixel_size_nm=1.0, *, num_micrographs=12, seed=SEED, settings=None
) -> dict:
    """Measure `detect_defects` on tiles of synthetic micrographs with known defects.

    The micrographs are made at `pixel_size_nm` (0.25 to 4 nm; 1 nm if None) and cut into tiles of
    `resolution` pixels. A detection matches a defect of its kind if the boxes overlap by 0.3 of
    their union, a dot if the centres lie within 4 nm or 2 pixels; pairs are one to one. Defects of
    which a tile shows less than half, and lines below the least length, are neither missed nor
    false.

    Returns:
        JSON values: for each kind precision and recall (95 %, bootstrap over micrographs),
        size_bias_nm (median of detected less true diameter) and angle_error_deg (median).
    """
    settings = settings or DetectorSettings()
    pixel_nm = float(np.clip(pixel_size_nm or 1.0, *PIXEL_SIZES_NM))
    side = resolution * max(1, round(512 / pixel_nm / resolution))
    counts = np.zeros((num_micrographs, len(KINDS), 3))  # true, found, matched
    pairs = {kind: [] for kind in KINDS}
    for i, micrograph in enumerate(synthesise_micrographs(num_micrographs, seed, side, pixel_nm)):
        corners = find_tile_positions(micrograph.image.shape, resolution)
        tiles = np.stack(
            [micrograph.image[y : y + resolution, x : x + resolution] for y, x in corners]
        )
        found = detect_defects(tiles, pixel_nm, settings)
        for tile, corner in enumerate(corners):
            truth = _cut_truth(micrograph.defects, corner, resolution, settings.line / pixel_nm)
            for k, kind in enumerate(KINDS):
                detections = found.select((found.image == tile) & (found.kind == k))
                counts[i, k] += _match(kind, truth, detections, pixel_nm, pairs[kind])
    return {
        "micrographs": num_micrographs,
        "seed": seed,
        "micrograph_px": side,
        "resolution": resolution,
        "pixel_size_nm": pixel_nm,
        "as_in_the_data": pixel_size_nm is not None and pixel_nm == pixel_size_nm,
        "kinds": {
            kind: _summarise(counts[:, k], pairs[kind], seed) for k, kind in enumerate(KINDS)
        },
    }


def _cut_truth(defects, corner, resolution, least_line_px):
    """Return the defects of one tile: (kind, box in it, visible share, Defect)."""
    top, left = corner
    inside = []
    for defect in defects:
        x0, y0, x1, y1 = defect.box_px
        box = np.clip([y0 - top, x0 - left, y1 - top, x1 - left], 0, resolution)
        if box[0] >= box[2] or box[1] >= box[3]:
            continue
        rows, columns = box[[0, 2]] + top - y0, box[[1, 3]] + left - x0
        y, x = np.nonzero(defect.mask[slice(*rows), slice(*columns)])
        if not len(y):
            continue
        seen = len(y) / np.count_nonzero(defect.mask)
        box = np.array([y.min(), x.min(), y.max() + 1, x.max() + 1]) + np.tile(box[:2], 2)
        kind = "loop" if defect.kind.startswith("loop") else defect.kind
        if kind == "line":  # as long as it is seen
            seen = float(np.hypot(box[2] - box[0], box[3] - box[1]) >= least_line_px)
        inside.append((kind, box, seen, defect))
    return inside


def _match(kind, truth, detections, pixel_nm, pairs):
    """Return (true, found, matched) of one kind on one tile; append the pairs that are whole."""
    truth = [each for each in truth if each[0] == kind]
    counted = np.array([seen >= LEAST_SEEN for _, _, seen, _ in truth], bool)
    num_found = len(detections)
    if not len(truth) or not num_found:
        return counted.sum(), num_found, 0
    boxes = np.stack([box for _, box, _, _ in truth])
    agreement = _agreement(kind, boxes, detections, pixel_nm)
    rows, columns = linear_sum_assignment(-agreement - 0.01 * (counted[:, None] & (agreement > 0)))
    hits = agreement[rows, columns] > 0
    for row, column in zip(rows[hits], columns[hits]):
        defect = truth[row][3]
        if counted[row] and not (detections.is_cut[column] or defect.metadata["is_cut_by_border"]):
            pairs.append((defect, detections.major[column], detections.angle[column]))
    num_ignored = (hits & ~counted[rows]).sum()
    return counted.sum(), num_found - num_ignored, (hits & counted[rows]).sum()


def _agreement(kind, boxes, detections, pixel_nm):
    if kind == "dot":
        centres = (boxes[:, :2] + boxes[:, 2:] - 1) / 2
        distance = np.linalg.norm(centres[:, None] - detections.centre_px[None], axis=-1)
        return np.clip(1 - distance / (max(4 / pixel_nm, 2) + 1e-9), 0, None)
    overlap = box_overlap(boxes, detections.box_px)
    return np.where(overlap >= LEAST_OVERLAP, overlap, 0)


def box_overlap(a, b):
    """Return the intersection over union [A, B] of boxes (y0, x0, y1, x1) [A, 4] and [B, 4]."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.clip(sides, 0, None).prod(-1)
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(-1) for box in (a, b))
    return shared / (area_a[:, None] + area_b[None] - shared)


def _summarise(counts, pairs, seed):
    true, found, matched = counts.sum(0)
    drawn = np.random.default_rng(seed).integers(len(counts), size=(1000, len(counts)))
    totals = counts[drawn].sum(1)  # [1000, 3]

    def share(above, below):
        if counts[:, below].sum() == 0:
            return None
        with np.errstate(invalid="ignore", divide="ignore"):
            low, high = np.nanquantile(totals[:, above] / totals[:, below], [0.025, 0.975])
        value = float(counts[:, above].sum() / counts[:, below].sum())
        return Interval(value, float(low), float(high)).to_json()

    sized = [major - d.diameter_nm for d, major, _ in pairs if d.diameter_nm is not None]
    turned = [
        abs((angle - d.metadata["angle"] + np.pi / 2) % np.pi - np.pi / 2)
        for d, _, angle in pairs
        if d.metadata.get("axis_ratio", 1) < 0.8
    ]
    return {
        "num_true": int(true),
        "num_found": int(found),
        "num_matched": int(matched),
        "precision": share(2, 1),
        "recall": share(2, 0),
        "size_bias_nm": float(np.median(sized)) if sized else None,
        "angle_error_deg": float(np.degrees(np.median(turned))) if turned else None,
    }


def describe_calibration(calibration) -> list[str]:
    """Return one line of text per kind of defect."""

    return [
        f"{kind:5} precision {format_interval(row['precision'])}  "
        f"recall {format_interval(row['recall'])}  "
        f"({row['num_true']} true, {row['num_found']} found, {row['num_matched']} matched)"
        for kind, row in calibration["kinds"].items()
    ]


def main(arguments=None):
    """Print the detector's precision and recall, and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m em_evaluation.calibrate_detector", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--resolution", type=int, default=256, help="side of a tile in pixels (256)"
    )
    parser.add_argument("--pixel-size-nm", type=float, default=1.0, help="nm per pixel (1)")
    parser.add_argument(
        "--num-micrographs", type=int, default=12, help="synthetic micrographs to search (12)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the micrographs ({SEED})")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write; by default, the numbers are only printed"
    )
    args = parser.parse_args(arguments)
    if args.num_micrographs < 2 or args.resolution < 32 or not args.pixel_size_nm > 0:
        parser.error("use at least 2 micrographs, tiles of 32 pixels and a pixel size above 0")
    calibration = calibrate_detector(
        args.resolution, args.pixel_size_nm, num_micrographs=args.num_micrographs, seed=args.seed
    )
    print("\n".join(describe_calibration(calibration)))
    if args.out:
        write_atomically(args.out, (json.dumps(calibration, indent=1) + "\n").encode())
        print(args.out)


if __name__ == "__main__":
    main()
