"""All metrics of all sets with the features of one extractor."""

import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from em_evaluation.blindness import find_blind_spots
from em_evaluation.distances import Distance
from em_evaluation.extractor import Extractor
from em_evaluation.feature_cache import compute_features
from em_evaluation.feature_metrics import choose_metrics, measure
from em_evaluation.levels import Sets


def measure_features(
    extractor: Extractor,
    sets: Sets,
    *,
    metrics: Sequence[str],
    seed: int,
    log: Callable[[str], object],
    **options,
) -> tuple[dict, dict[str, Distance], list[str]] | None:
    """Measure each set against the held-out images, and the models against training images, too.

    options: those of `compute_features`.

    Returns:
        The report's entry, with rows: set -> "held_out" or "train" -> metric -> interval; the
        Frechet distance of each set to the held-out images, from which differences follow; and
        notes for the reader. None on all processes but the main one.
    """
    names, notes = choose_metrics(metrics, extractor, len(sets.held_out))
    references = {"held_out": sets.held_out, "train": sets.train}
    known = {}
    titles = {"held_out": "held-out images", "train": "training images"}
    for key, images in (references | sets.judged).items():
        if images is not None and id(images) not in known:
            known[id(images)] = _compute(titles.get(key, key), images, extractor, log, **options)
    if known[id(sets.held_out)] is None:
        return None
    began = time.perf_counter()
    rows, distances = {}, {}
    for key, images in sets.judged.items():
        rows[key] = {}
        for side, reference in references.items():
            if reference is None or (side == "train" and key not in sets.generated):
                continue
            rows[key][side], influences = measure(
                names,
                known[id(images)],
                known[id(reference)],
                groups_a=images.groups,
                groups_b=reference.groups,
                seed=seed,
            )
            if side == "held_out":
                distances[key] = influences["frechet_distance"]
    seconds = time.perf_counter() - began
    log(f"metrics of {len(rows)} sets with {extractor.name}: {seconds:.1f} s")
    held_out = {key: row["held_out"] for key, row in rows.items()}
    entry = {
        "extractor": extractor.name,
        "identity": extractor.identity,
        "num_features": extractor.num_features,
        "metrics": names,
        "blind_spots": find_blind_spots(held_out, names, tuple(sets.generated), sets.levels),
        "rows": rows,
    }
    return entry, distances, notes


def _compute(title, images, extractor, log, **options):
    began = time.perf_counter()
    with tqdm(
        total=len(images), desc=f"{extractor.name}: {title}", unit="img", leave=False, disable=None
    ) as bar:
        features = compute_features(
            images, extractor, progress=lambda done: bar.update(done - bar.n), **options
        )
    log(f"features of {title}: {len(images):,} images in {time.perf_counter() - began:.1f} s")
    return features
