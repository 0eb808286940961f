"""Memorisation: are generated images copies of training images, or nearer than unseen ones?"""

import time

import numpy as np
from scipy import stats

from em_data.views import ELEMENTS, apply_symmetry
from em_evaluation.bootstrap import compare_means, histogram_of_values, resample_means
from em_evaluation.feature_cache import compute_features
from em_evaluation.images import ImageSet
from em_evaluation.interval import Interval, to_json
from em_evaluation.nearest import MAX_SHIFT_PX, SMOOTHING_PX, TileReader, align, find_nearest

COPY_RATIO = 0.5  # a copy is nearer than half of the median distance of held-out tiles
NUM_FEATURE_QUERIES = 128  # images of each set sought in feature space, under eight symmetries each
NUM_BINS, NUM_PAIRS = 200, 6


def measure_memorisation(
    generated, held_out, train, *, extractor=None, seed=0, log=print, **feature_options
):
    """Search all training tiles for the nearest one to each image.

    In pixels, under the eight symmetries of the square and shifts of up to 4 pixels; in features of
    `extractor`, under the symmetries, for the first 128 images of each set. A copy is nearer than
    half of the median distance of held-out tiles. Returns the report's section, JSON values, and
    the closest pairs; None, [] if the images are too small for the shifts.
    """
    start, tiles = time.perf_counter(), TileReader(train)
    side = held_out.resolution[0]
    if side < 16 + 2 * MAX_SHIFT_PX or held_out.resolution[1] != side:
        log(
            f"memorisation is left out: images of {side} x {held_out.resolution[1]} pixels are "
            "too small or not square"
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
    scale = section["pixels"]["scale"]
    pairs = [
        pair
        for key in sets
        for pair in choose_pairs(key, sets[key].levels[:, 0], nearest[key], tiles, scale)
    ]
    names = ("set", "distance", "ratio")
    section["closest"] = [{name: pair[name] for name in names} for pair in pairs]
    log(
        f"memorisation: {len(tiles):,} training tiles searched in "
        f"{time.perf_counter() - start:.1f} s"
    )
    return to_json(section), pairs


def compare_distances(distances, groups, seed=0):
    """Compare the sets by the distances [N] of their images to the nearest training tile.

    scale: median distance of held-out tiles; a ratio is a distance over it. copies: share of
    images nearer than `COPY_RATIO` of the scale (interval: Clopper & Pearson 1934). nearer:
    probability that an image is nearer to training than a held-out tile, 0.5 for an honest model
    (Mann & Whitney 1947; Meehan, Chaudhuri & Dasgupta 2020).
    """
    held_out = distances["held_out"]
    scale = float(np.median(held_out)) or 1.0  # 0: held-out tiles are copies themselves
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
            nearer = compare_means(probability_nearer, means[key], means["held_out"])
            rows[key]["nearer"] = nearer.interval().limited(0.0, 1.0)
    return {
        "scale": scale,
        "threshold": threshold,
        "sets": rows,
        "highest": float(highest),
        "curves": curves,
    }


def probability_nearer(a, b):
    """Return the probability that a draw from histogram a [..., K] is below one from b."""
    return (a * (1 - np.cumsum(b, -1) + b / 2)).sum(-1)


def share_interval(count, total, level=0.95):
    """Return the share count / total with its exact interval (Clopper & Pearson 1934)."""
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, count, total - count + 1) if count else 0.0
    high = stats.beta.ppf(1 - tail, count + 1, total - count) if count < total else 1.0
    return Interval(count / total, float(low), float(high))


def nearest_in_features(sets, tiles, extractor, num_queries=NUM_FEATURE_QUERIES, **options):
    """Return the distance in features of the first images of each set to the nearest tile, [N].

    Each image is tried under all eight symmetries, so that a flipped copy is found, too.
    """

    def features_of(images):
        return compute_features(images, extractor, **options).astype(np.float64)

    known = features_of(tiles)  # [T, D]
    known_squared = (known**2).sum(1)
    distances = {}
    for key, images in sets.items():
        levels = images.levels[:num_queries, 0]
        nearest = np.full(len(levels), np.inf)
        for name in ELEMENTS:
            turned = np.ascontiguousarray(apply_symmetry(levels, name))
            asked = features_of(ImageSet(turned[:, None]))
            squared = (asked**2).sum(1)[:, None] + known_squared[None] - 2 * asked @ known.T
            nearest = np.minimum(nearest, squared.min(1))
        distances[key] = np.sqrt(np.maximum(nearest, 0))
    return distances


def choose_pairs(key, levels, nearest, tiles, scale, num_pairs=NUM_PAIRS):
    """Return the closest images of a set, each with its training tile, turned alike."""
    order = np.argsort(nearest.distance, kind="stable")[:num_pairs]
    return [
        {
            "set": key,
            "distance": float(nearest.distance[i]),
            "ratio": float(nearest.distance[i]) / scale,
            "levels": np.stack(
                [levels[i], align(tiles[nearest.tile[i : i + 1]][0], nearest.symmetry[i])]
            ),
        }
        for i in order
    ]
