"""How well images follow their labels, as a segmenter that was trained on real ones sees it."""

from collections.abc import Sequence

import numpy as np

from em_data.figures import make_data_uri
from em_evaluation.detector import scores as score_functions
from em_evaluation.detector.labelled import LabelledImage
from em_evaluation.detector.outlines import COLOURS, FOUND, INVENTED, MISSED, draw_outlines, join
from em_evaluation.detector.scores import Comparison, Scores, compare, summarise
from em_evaluation.detector.segmenter import Segmenter
from em_evaluation.interval import Interval
from em_evaluation.numbers import format_interval

NUM_REPLICATES = 1000
MOST_SHOWN = 4  # images of a set in a picture
LONGEST_PX = 256  # side of an image in a picture, about
MEASURES = {"recall": score_functions.recall, "precision": score_functions.precision}


def search_images(
    segmenter: Segmenter, images: Sequence[LabelledImage]
) -> tuple[list[Comparison], Scores]:
    """Search images for their labelled defects; return the comparisons and their scores."""
    comparisons = [compare(segmenter.find(each), each.defects) for each in images]
    groups = [each.specimen for each in images]
    return comparisons, summarise(comparisons, groups, segmenter.kinds)


def describe_set(name: str, scores: Scores, seed: int = 0) -> dict:
    """Return recall and precision of a set with 95 % intervals, all and by kind, as JSON values.

    The intervals are those of a bootstrap over the groups of images. Recall is the share of
    labelled defects that are found, precision the share of found ones that are labelled.
    """
    num = len(scores.groups)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(num, np.full(num, 1 / num), NUM_REPLICATES)
    sums = np.concatenate(
        [scores.sums.sum(0)[None], np.einsum("rg,gkc->rkc", weights, scores.sums)]
    )

    def measure(chosen):
        row = {"num_true": int(chosen[0, :, 2].sum()), "num_found": int(chosen[0, :, 1].sum())}
        for key, function in MEASURES.items():
            row[key] = _make_interval(function(chosen))
        return row

    by_kind = {kind: measure(sums[:, k : k + 1]) for k, kind in enumerate(scores.kinds)}
    return {
        "name": name,
        "num_images": len(scores.quality),
        "quality": float(scores.quality.mean()),
        **measure(sums),
        "by_kind": by_kind,
    }


def _make_interval(values):
    known = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(known):
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high)).limited(0, 1).to_json()


def describe_sets(rows: list[dict]) -> list[str]:
    """Return recall and precision of each set as lines of text."""
    lines = [f"{'':28} {'kind':12} {'recall (95 %)':26} precision (95 %)"]
    for row in rows:
        parts = [("all", row), *(row["by_kind"].items() if len(row["by_kind"]) > 1 else ())]
        for kind, each in parts:
            name = row["name"] if kind == "all" else ""
            recall, precision = (format_interval(each[key]) for key in ("recall", "precision"))
            lines.append(f"{name:28} {kind:12} {recall:26} {precision}")
    return lines


def draw_adherence(
    images: Sequence[LabelledImage], comparisons: Sequence[Comparison], title: str, caption: str
) -> dict:
    """Return a figure for a page: the first images, plain above and with outlines below."""
    shown = list(zip(images, comparisons))[:MOST_SHOWN]
    sides = {each.image.shape for each, _ in shown}
    shown = [each for each in shown if each[0].image.shape == max(sides)]
    height, width = shown[0][0].image.shape
    scale = max(1, round(LONGEST_PX / max(height, width)))
    plain = [draw_outlines(each.image, [], scale) for each, _ in shown]
    outlined = [draw_outlines(each.image, split_outcomes(c), scale) for each, c in shown]
    picture = join(plain + outlined, len(shown))
    return {
        "uri": make_data_uri(picture),
        "width": picture.shape[1],
        "height": picture.shape[0],
        "title": title,
        "caption": caption,
        "alt": f"{title}: {len(shown)} images, and below them with outlines of their defects",
        "scale_bar": None,
    }


def split_outcomes(comparison: Comparison) -> list:
    """Return labelled defects that are found, those that are missed, and invented ones."""
    right = set(comparison.partner.tolist())
    return [
        (FOUND, [each for i, each in enumerate(comparison.true) if i in right]),
        (MISSED, comparison.missed),
        (INVENTED, [each for each, n in zip(comparison.found, comparison.partner) if n < 0]),
    ]


def list_colours() -> list[tuple[str, str]]:
    """Return (meaning, colour) of the outlines."""
    meanings = {
        "found": "labelled and found",
        "missed": "labelled, but not found",
        "invented": "found, but not labelled",
    }
    return [(meanings[key], colour) for key, colour in COLOURS.items()]


def choose_worst(quality: np.ndarray, names: Sequence[str], share: float) -> set[str]:
    """Return the names of the images to drop so that `share` of them is kept.

    Args:
        quality: Quality of each piece of an image [N].
        names: Name of the image of each piece [N]; the mean of its pieces counts.
        share: Above 0 and at most 1; one image is always kept.
    """
    images, number = np.unique(names, return_inverse=True)
    means = np.bincount(number, quality) / np.bincount(number)
    num_kept = max(1, round(share * len(images)))
    worst = np.argsort(means, kind="stable")[: len(images) - num_kept]
    return set(images[worst].tolist())
