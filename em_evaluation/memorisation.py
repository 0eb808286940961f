"""Memorisation: are generated images nearer to the training images than held-out micrographs are, or even copies of them?"""

import time

import numpy as np
from scipy import stats

from em_data.intensity import from_uint
from em_data.views import ELEMENTS, apply_symmetry
from em_evaluation.nearest import MAX_SHIFT_PX, SMOOTHING_PX, TileReader, align, find_nearest
from em_evaluation.profiles import compare_means, histogram_of_values, resample_means
from em_evaluation.statistics import compute_features

COPY_RATIO = 0.5  # a copy is nearer than half of the median distance of held-out tiles
NUM_FEATURE_QUERIES = 128  # images of each set sought in feature space, under eight symmetries each
NUM_BINS, NUM_PAIRS = 200, 6


def measure_memorisation(
    generated, held_out, train, *, extractor=None, seed=0, log=print, **feature_options
):
    """Compare generated ImageSets with all training tiles; return (the report's section, pairs for the gallery).

    generated: name -> ImageSet. held_out: the ImageSet that tells how near unseen micrographs come. train: `Tiles`. In
    pixels every image is sought over all eight symmetries of the square and shifts up to 4 pixels (`find_nearest`); in the
    features of `extractor`, if given, the first 128 images under all symmetries. A copy is an image nearer than half of
    the median distance of held-out tiles. None, [] where images are too small for the shifts.
    """
    start, tiles = time.perf_counter(), TileReader(train)
    side = held_out.resolution[0]
    if side < 16 + 2 * MAX_SHIFT_PX or held_out.resolution[1] != side:
        log(
            f"memorisation left out: images of {side} x {held_out.resolution[1]} pixels are too small or not square"
        )
        return None, []
    sets = {"held_out": held_out, **generated}
    nearest = {
        key: find_nearest(images.levels[:, 0], tiles, name=f"training views nearest to {key}")
        for key, images in sets.items()
    }
    groups = {key: images.groups for key, images in sets.items()}
    section = {
        "num_train_tiles": len(tiles),
        "num_symmetries": len(ELEMENTS),
        "max_shift_px": MAX_SHIFT_PX,
        "smoothing_px": SMOOTHING_PX,
        "copy_ratio": COPY_RATIO,
        "pixels": compare_distances(
            {key: each.distance for key, each in nearest.items()}, groups, seed
        ),
    }
    if extractor is not None:
        distances = nearest_in_features(sets, tiles, extractor, **feature_options)
        few = {
            key: None if ids is None else ids[:NUM_FEATURE_QUERIES] for key, ids in groups.items()
        }
        section["features"] = compare_distances(distances, few, seed) | {
            "extractor": extractor.identity
        }
    pairs = [
        pair
        for key in sets
        for pair in choose_pairs(key, sets[key].levels[:, 0], nearest[key], tiles)
    ]
    scale = section["pixels"]["scale"]
    section["closest"] = [
        {"set": pair["set"], "distance": pair["distance"], "ratio": pair["distance"] / scale}
        for pair in pairs
    ]
    log(
        f"memorisation: {len(tiles):,} training tiles searched in {time.perf_counter() - start:.1f} s"
    )
    return section, pairs


def compare_distances(distances, groups, seed=0):
    """Return what distances to the nearest training view [N], by set, say: JSON values.

    scale: median distance of held-out tiles; ratio: a distance over it. copies: share of
    images nearer than `COPY_RATIO` of the scale, with Clopper & Pearson's interval. nearer: the probability that an image
    is nearer to training than a held-out tile (0.5 for an honest generator; Mann & Whitney 1947, used for this by
    Meehan, Chaudhuri & Dasgupta 2020), with a bootstrap interval.
    """
    held_out = distances["held_out"]
    scale = (
        float(np.median(held_out)) or 1.0
    )  # held-out tiles that are copies themselves: `conclude_memorisation` says so
    threshold = COPY_RATIO * scale
    highest = max(each.max() for each in distances.values()) + 1e-6
    means, rows, curves = {}, {}, {}
    for key, values in distances.items():
        one_hot, _ = histogram_of_values(values, NUM_BINS, 0, highest)
        means[key] = resample_means(one_hot, groups.get(key), [seed, key == "held_out"])
        curves[key] = [round(float(share), 6) for share in means[key][0]]
    for key, values in distances.items():
        copies = int((values < threshold).sum())
        rows[key] = {
            "num_images": len(values),
            "median_distance": float(np.median(values)),
            "median_ratio": float(np.median(values) / scale),
            "least_ratio": float(values.min() / scale),
            "num_copies": copies,
            "copies": share_interval(copies, len(values)),
        }
        if key != "held_out":
            interval = compare_means(probability_nearer, means[key], means["held_out"]).interval(
                lowest=0.0
            )
            rows[key]["nearer"] = {
                "value": interval.value,
                "low": interval.low,
                "high": min(interval.high, 1.0),
            }
    return {
        "scale": scale,
        "threshold": threshold,
        "sets": rows,
        "highest": float(highest),
        "curves": curves,
    }


def probability_nearer(a, b):
    """Return the probability that a draw of histogram a [..., K] lies below one of b, ties counted half."""
    return (a * (1 - np.cumsum(b, -1) + b / 2)).sum(-1)


def share_interval(count, total, level=0.95):
    """Return the share count / total with its exact interval (Clopper & Pearson 1934)."""
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, count, total - count + 1) if count else 0.0
    high = stats.beta.ppf(1 - tail, count + 1, total - count) if count < total else 1.0
    return {"value": count / total, "low": float(low), "high": float(high)}


class _Levels:
    """uint8 images [N, H, W], read by their numbers, as batches for an extractor."""

    def __init__(self, length, read):
        self.length, self.read = length, read

    def __len__(self):
        return self.length

    def batch(self, ids):
        return from_uint(self.read(np.asarray(ids))).unsqueeze(1)


def nearest_in_features(sets, tiles, extractor, num_queries=NUM_FEATURE_QUERIES, **options):
    """Return the Euclidean distance of the features of the first images of each set to the nearest training tile's [N].

    An image enters under all eight symmetries and the nearest counts, so that a flipped copy is as near as a plain one.
    """

    def features_of(length, read):
        return compute_features(_Levels(length, read), extractor, **options).astype(np.float64)

    known = features_of(len(tiles), lambda ids: tiles[ids])  # [T, D]
    known_squared = (known**2).sum(1)
    distances = {}
    for key, images in sets.items():
        levels = images.levels[:num_queries, 0]
        nearest = np.full(len(levels), np.inf)
        for name in ELEMENTS:
            turned = np.ascontiguousarray(apply_symmetry(levels, name))
            asked = features_of(len(turned), lambda ids, turned=turned: turned[ids])
            squared = (asked**2).sum(1)[:, None] + known_squared[None] - 2 * asked @ known.T
            nearest = np.minimum(nearest, squared.min(1))
        distances[key] = np.sqrt(np.maximum(nearest, 0))
    return distances


def choose_pairs(key, levels, nearest, tiles, num_pairs=NUM_PAIRS):
    """Return the closest images of a set, each with its training tile turned to lie as the image does."""
    order = np.argsort(nearest.distance, kind="stable")[:num_pairs]
    return [
        {
            "set": key,
            "distance": float(nearest.distance[i]),
            "levels": np.stack(
                [levels[i], align(tiles[nearest.tile[i : i + 1]][0], nearest.symmetry[i])]
            ),
        }
        for i in order
    ]
