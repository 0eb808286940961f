"""All metrics of all sets with one extractor's features."""

import time

from tqdm import tqdm

from em_evaluation.blindness import find_blindness
from em_evaluation.metrics import choose_metrics, interval_to_json, measure
from em_evaluation.statistics import compute_features


def measure_with_extractor(
    extractor, metrics, sets, generated, floor_sets, floor_info, models, *, seed, log, **caching
):
    """Return (measurement, Frechet distances to held-out tiles by set, notes); (None, None, []) on all but the main process.

    sets: "held_out" and "train", the references, at equal numbers. The measurement is JSON: the extractor, its metrics, and
    for each set each metric against held-out tiles, of models against training tiles, too.
    """
    num_images = len(sets["held_out"])
    names, notes = choose_metrics(metrics, extractor, num_images)
    references = {
        key: _features_of(name, sets[key], extractor, log, **caching)
        for key, name in (("held_out", "held-out tiles"), ("train", "training tiles"))
    }
    rows, distances, seconds = {}, {}, 0.0
    for key, images in {**generated, **floor_sets}.items():
        name = floor_info[key]["name"] if key in floor_info else key
        own = (
            references["train"]
            if key == "real"
            else _features_of(name, images, extractor, log, **caching)
        )
        if own is None:
            continue
        began = time.perf_counter()
        rows[key] = {}
        for side in ("held_out", "train") if key in generated else ("held_out",):
            found, influences = measure(
                names,
                own,
                references[side],
                groups_a=images.groups,
                groups_b=sets[side].groups,
                seed=seed,
            )
            rows[key][side] = {
                metric: interval_to_json(interval) for metric, interval in found.items()
            }
            if side == "held_out":
                distances[key] = influences["frechet_distance"]
        seconds += time.perf_counter() - began
    if references["held_out"] is None:
        return None, None, []
    log(f"metrics of {len(rows)} sets with {extractor.name}: {seconds:.1f} s")
    measurement = {
        "extractor": extractor.name,
        "identity": extractor.identity,
        "num_features": extractor.num_features,
        "metrics": list(names),
        "rows": rows,
    }
    measurement["blindness"] = find_blindness(
        measurement, {model.name: model.family for model in models}, floor_info
    )
    return measurement, distances, notes


def _features_of(name, images, extractor, log, **caching):
    began = time.perf_counter()
    with tqdm(
        total=len(images), desc=f"{extractor.name}: {name}", unit="img", leave=False, disable=None
    ) as bar:
        features = compute_features(
            images, extractor, progress=lambda done: bar.update(done - bar.n), **caching
        )
    log(f"features of {name}: {len(images):,} images in {time.perf_counter() - began:.1f} s")
    return features
