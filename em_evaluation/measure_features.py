"""All metrics of all sets with the features of one extractor."""

import time
from dataclasses import dataclass, field

from tqdm import tqdm

from em_evaluation.blindness import BlindSpot
from em_evaluation.distances import Distance
from em_evaluation.feature_cache import compute_features
from em_evaluation.feature_metrics import choose_metrics, measure
from em_evaluation.interval import Interval


@dataclass(frozen=True)
class FeatureMeasurement:
    """The metrics of all sets with one extractor.

    metrics: their names. against_held_out, against_train: set -> metric -> interval.
    blind_spots: what each metric does not tell apart. distances: set -> Frechet distance to the
    held-out images with its influences, from which differences follow. notes: for the reader.
    """

    extractor: str
    identity: str
    num_features: int
    metrics: tuple[str, ...]
    against_held_out: dict[str, dict[str, Interval]]
    against_train: dict[str, dict[str, Interval]]
    blind_spots: tuple[BlindSpot, ...] = ()
    distances: dict[str, Distance] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()


def measure_features(extractor, *, protocol, sets, log, **caching) -> FeatureMeasurement | None:
    """Measure each set against the held-out images, and the models against training images, too.

    protocol, sets: the evaluator's. caching: options of `compute_features`. Returns None on all
    processes but the main one.
    """
    held_out, train = sets.held_out, sets.train
    names, notes = choose_metrics(protocol.metrics, extractor, len(held_out))
    known = {}

    def features_of(title, images):
        if id(images) not in known:
            known[id(images)] = _compute(title, images, extractor, log, **caching)
        return known[id(images)]

    reference = features_of("held-out images", held_out)
    train_reference = None if train is None else features_of("training images", train)
    found = {key: features_of(key, images) for key, images in sets.judged.items()}
    if reference is None:
        return None
    began = time.perf_counter()
    against_held_out, against_train, distances = {}, {}, {}
    for key, images in sets.judged.items():
        options = {"groups_a": images.groups, "seed": protocol.seed}
        against_held_out[key], influences = measure(
            names, found[key], reference, groups_b=held_out.groups, **options
        )
        distances[key] = influences["frechet_distance"]
        if key in sets.generated and train is not None:
            against_train[key], _ = measure(
                names, found[key], train_reference, groups_b=train.groups, **options
            )
    seconds = time.perf_counter() - began
    log(f"metrics of {len(sets.judged)} sets with {extractor.name}: {seconds:.1f} s")
    return FeatureMeasurement(
        extractor.name,
        extractor.identity,
        extractor.num_features,
        names,
        against_held_out,
        against_train,
        distances=distances,
        notes=tuple(notes),
    )


def _compute(title, images, extractor, log, **caching):
    began = time.perf_counter()
    with tqdm(
        total=len(images), desc=f"{extractor.name}: {title}", unit="img", leave=False, disable=None
    ) as bar:
        features = compute_features(
            images, extractor, progress=lambda done: bar.update(done - bar.n), **caching
        )
    log(f"features of {title}: {len(images):,} images in {time.perf_counter() - began:.1f} s")
    return features
