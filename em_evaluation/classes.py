"""Evaluation per class: distances at equal numbers, and whether a probe recognises the classes.

The probe is a logistic regression on the features of real training tiles (a linear probe; Alain &
Bengio 2017). Its accuracy on generated images is a classification accuracy score of the other
direction than that of Ravuri & Vinyals 2019: trained on real images, tested on generated ones.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special

from em_data.intensity import to_uint8
from em_evaluation.bootstrap import Resampled, resample_means
from em_evaluation.distances import frechet_distance_interval
from em_evaluation.extractor import Extractor
from em_evaluation.feature_cache import compute_features, iterate_batches
from em_evaluation.feature_metrics import measure
from em_evaluation.images import (
    ClassImages,
    ImageSet,
    ModelImages,
    find_micrographs,
    read_images,
    select_views,
)
from em_evaluation.interval import Interval
from em_evaluation.levels import make_surrogates

LEAST_VIEWS = 12  # of a class, on each side of the split
NUM_PICTURES, MOST_PICTURED = 8, 6  # images of a class, classes
LEVELS = {
    "real": "real images",
    "others": "other classes",
    "texture": "texture only",
}


class Probe(NamedTuple):
    """A linear classifier of features: standardised, then weighted."""

    mean: np.ndarray  # [D]
    scale: np.ndarray  # [D]
    weights: np.ndarray  # [D + 1, K], the last row is the bias

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the class [N] of features [N, D]."""
        return (_extend((features - self.mean) / self.scale) @ self.weights).argmax(1)


def fit_probe(features: np.ndarray, classes: np.ndarray, num_classes: int) -> Probe:
    """Fit a multinomial logistic regression to features [N, D] of classes [N].

    Minimises the cross-entropy plus half the squared norm of the weights, for standardised
    features.
    """
    features = np.asarray(features, np.float64)
    mean, scale = features.mean(0), features.std(0) + 1e-6
    rows = _extend((features - mean) / scale)  # [N, D + 1]
    targets = np.eye(num_classes)[classes]  # [N, K]
    shape = (rows.shape[1], num_classes)

    def loss(flat):
        weights = flat.reshape(shape)
        penalised = weights.copy()
        penalised[-1] = 0  # not the bias
        log_p = special.log_softmax(rows @ weights, axis=1)
        gradient = rows.T @ (np.exp(log_p) - targets) + penalised
        return (penalised**2).sum() / 2 - (targets * log_p).sum(), gradient.ravel()

    found = optimize.minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B")
    return Probe(mean, scale, found.x.reshape(shape))


def _extend(rows):
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)


def measure_accuracy(predicted, classes, groups=None, seed=0) -> Resampled:
    """Return the share of images [N] that are taken for their class, over groups of images."""
    is_right = (np.asarray(predicted) == np.asarray(classes))[:, None]
    means = resample_means(is_right, groups, seed)[:, 0]
    return Resampled(float(means[0]), means[1:])


class RealClasses(NamedTuple):
    """Real images of each class at one number: names, and sets in the names' order."""

    names: list[str]
    train: list[ImageSet]
    held_out: list[ImageSet]


def measure_classes(
    models: Sequence[ModelImages],
    real: Any,
    extractor: Extractor,
    *,
    seed: int,
    log: Callable[[str], object],
    **options: Any,
) -> tuple[dict | None, list[dict], list[str]]:
    """Judge the images of models that were asked for classes, class by class.

    Args:
        models: Those with `of_classes` are judged.
        real: `RealImages` whose tiles have classes.
        extractor: Gives the features.
        seed: Of the views drawn, the surrogates and the intervals.
        log: Gets a line.
        options: Those of `compute_features`.

    Returns:
        The report's section, None without models or data of classes; grids of images for the page;
        and notes for the reader.
    """
    drawn = {model.name: model.of_classes for model in models if model.of_classes is not None}
    sides = (real.train, real.held_out)
    if not drawn or not all(getattr(side, "class_names", ()) for side in sides):
        return None, [], []
    asked = set.intersection(*(set(each.names) for each in drawn.values()))
    most = min(
        len(images) // len(each.names) for each in drawn.values() for images in each.list_images()
    )
    sets, notes = read_real_classes(sides, asked, most, seed)
    if len(sets.names) < 2:
        return None, [], [*notes, "Classes are not compared: fewer than two can be."]

    def find(images):
        return compute_features(images, extractor, **options)

    judge = ClassJudge(sets, find, seed)
    section: dict = {
        "names": sets.names,
        "num_images": len(sets.held_out[0]),
        "num_train_images": sum(map(len, sets.train)),
        "extractor": extractor.name,
        "levels": LEVELS,
        "held_out": judge.real[1],
        "rows": {name: judge.measure_levels(i) for i, name in enumerate(sets.names)},
        "models": {},
    }
    pictures = list_pictures("held_out", sets.names, sets.held_out)
    for model, images in drawn.items():
        generated = judge.read(images.images, images.names)
        features = [find(each) for each in generated]
        for i, row in enumerate(section["rows"].values()):
            row[model] = judge.measure_distance(i, features[i])
        section["models"][model] = judge.judge_model(features) | {"guidance": judge.sweep(images)}
        pictures += list_pictures(model, sets.names, generated)
    log(f"classes {', '.join(sets.names)}: {section['num_images']:,} images of each set")
    return section, pictures, notes


def read_real_classes(sides, asked, most: int, seed: int) -> tuple[RealClasses, list[str]]:
    """Read at most `most` real images of each class that is asked for and that both sides have."""
    known, notes = sides[0].class_names, []
    views = []
    for side in sides:
        numbers = side.class_labels(range(len(side))).numpy()
        views.append([np.flatnonzero(numbers == i) for i in range(len(known))])
    counts = [min(len(side[i]) for side in views) for i in range(len(known))]
    chosen = [i for i, name in enumerate(known) if name in asked and counts[i] >= LEAST_VIEWS]
    if few := [known[i] for i in range(len(known)) if counts[i] < LEAST_VIEWS]:
        notes.append(
            f"Not judged as classes: {', '.join(few)}. Each needs {LEAST_VIEWS} views on both "
            "sides of the split."
        )
    if missing := sorted(asked - set(known)):
        notes.append(f"A model draws classes that the data do not have: {', '.join(missing)}.")
    number = min([most, *(counts[i] for i in chosen)])
    train, held_out = (
        [read_views(side, ids[i], number, seed + k) for i in chosen]
        for k, (side, ids) in enumerate(zip(reversed(sides), reversed(views), strict=True))
    )
    return RealClasses([known[i] for i in chosen], held_out, train), notes


def read_views(tiles, ids, count: int, seed: int) -> ImageSet:
    """Read `count` of the views `ids`, as many tiles as there are; see `select_views`."""
    tile_of_view, _ = tiles.locate(ids)
    chosen = select_views(tile_of_view, count, seed)
    batches = iterate_batches(tiles, 256, ids[chosen])
    groups = find_micrographs(tiles, tile_of_view[chosen])
    return ImageSet(np.concatenate([to_uint8(batch) for batch in batches]), groups)


class ClassJudge:
    """Compares sets of each class with the held-out images of that class.

    sets: The real images. find: images -> features. seed: Of the surrogates and the intervals.
    """

    def __init__(self, sets: RealClasses, find: Callable, seed: int):
        self.sets, self.find, self.seed = sets, find, seed
        self.train, self.held_out = (
            [find(each) for each in side] for side in (sets.train, sets.held_out)
        )
        classes = np.repeat(np.arange(len(sets.names)), [len(each) for each in self.train])
        self.probe = fit_probe(np.concatenate(self.train), classes, len(sets.names))
        self.groups = [each.groups for each in sets.held_out]
        self.real = self.recognise(self.held_out, self.groups, seed)

    def measure_levels(self, i: int) -> dict[str, Interval]:
        """Return the distances of the reference levels to the held-out images of class i."""
        train, others = self.sets.train[i], [e for j, e in enumerate(self.train) if j != i]
        mixed = np.concatenate([each[: -(-len(train) // len(others))] for each in others])
        texture = make_surrogates(train, self.seed).images
        return {
            "real": self.measure_distance(i, self.train[i], train.groups),
            "others": self.measure_distance(i, mixed[: len(train)]),
            "texture": self.measure_distance(i, self.find(texture), texture.groups),
        }

    def read(self, images, names: Sequence[str]) -> list[ImageSet]:
        """Return the images of each class; image i was asked for as names[i mod their number]."""
        levels, number = read_images(images, len(images)).levels, len(self.sets.held_out[0])
        return [
            ImageSet(levels[names.index(name) :: len(names)][:number]) for name in self.sets.names
        ]

    def measure_distance(self, i: int, features, groups=None) -> Interval:
        """Return the Frechet distance of features to the held-out images of class i."""
        return frechet_distance_interval(
            features, self.held_out[i], groups_a=groups, groups_b=self.groups[i], seed=self.seed
        )

    def recognise(self, features: list[np.ndarray], groups, seed: int) -> tuple[Resampled, dict]:
        """Return how many images of each class the probe takes for it, and for which others."""
        names, number = self.sets.names, len(features)
        predicted = [self.probe.predict(each) for each in features]
        expected = [np.full(len(each), i) for i, each in enumerate(predicted)]
        joined = join_groups(groups)
        accuracy = measure_accuracy(
            np.concatenate(predicted), np.concatenate(expected), joined, seed
        )
        by_class = [
            _bound(measure_accuracy(*each, seed))
            for each in zip(predicted, expected, groups, strict=True)
        ]
        taken = [np.bincount(each, minlength=number) / len(each) for each in predicted]
        return accuracy, {
            "accuracy": _bound(accuracy),
            "by_class": dict(zip(names, by_class, strict=True)),
            "taken_for": {
                name: dict(zip(names, row.tolist(), strict=True))
                for name, row in zip(names, taken, strict=True)
            },
        }

    def judge_model(self, features: list[np.ndarray]) -> dict:
        """Return how well the probe recognises generated images, and that beside real ones."""
        real = self.real[0]
        accuracy, found = self.recognise(features, [None] * len(features), self.seed + 1)
        replicates = accuracy.replicates / np.maximum(real.replicates, 1e-6)
        ratio = Resampled(accuracy.value / max(real.value, 1e-6), replicates)
        return found | {"share_of_held_out": ratio.interval(lowest=0.0)}

    def sweep(self, of_classes: ClassImages) -> list[dict]:
        """Return accuracy, precision and recall at each guidance scale, all classes together."""
        reference = np.concatenate(self.held_out)
        rows = []
        for scale, images in sorted(of_classes.guided.items()):
            features = [self.find(each) for each in self.read(images, of_classes.names)]
            found, _ = measure(
                ("precision", "recall"),
                np.concatenate(features),
                reference,
                groups_b=join_groups(self.groups),
                seed=self.seed,
            )
            accuracy = self.judge_model(features)["accuracy"]
            rows.append({"scale": scale, "accuracy": accuracy, **found})
        return rows


def join_groups(groups: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Return the groups of several sets one after the other; None if they are unknown."""
    known = [each for each in groups if each is not None]
    return np.concatenate(known) if len(known) == len(groups) else None


def _bound(accuracy: Resampled) -> Interval:
    return accuracy.interval().limited(0.0, 1.0)


def list_pictures(key: str, names: Sequence[str], sets: Sequence[ImageSet]) -> list[dict]:
    """Return a grid of each class: the first images, not selected."""
    return [
        {
            "key": key,
            "title": name,
            "caption": key,
            "levels": images.levels[:NUM_PICTURES, 0],
            "role": "class",
        }
        for name, images in zip(names[:MOST_PICTURED], sets, strict=False)
    ]
