"""The report's section on adherence: do labelled generated images show what their labels say?"""

from collections.abc import Mapping

from em_data.tiles import Tiles
from em_evaluation.detector.adherence_measure import describe_set, draw_adherence, search_images
from em_evaluation.detector.labelled_tiles import list_labelled
from em_evaluation.detector.segmenter import SegmenterConfig, TrainingSet, train_segmenter
from em_evaluation.interval import to_json

NUM_STEPS = 1200
MOST_IMAGES = 1000  # of each set


def measure_section(
    train: Tiles, held_out: Tiles, folders: Mapping[str, Tiles], seed: int = 0
) -> tuple[dict, list[dict]] | None:
    """Return the section of report.json and its pictures; None without labels on both sides.

    Args:
        train: Real tiles to train the segmenter on.
        held_out: Real tiles that it has not seen.
        folders: {name: tiles} of labelled generated images; those without labels are left out.
        seed: Of the segmenter and the intervals.
    """
    kinds = {kind: kind for kind in train.kinds}
    sides = [list_labelled(tiles, kinds) for tiles in (train, held_out)]
    sets = [(name, list_labelled(tiles, kinds, "micrograph")) for name, tiles in folders.items()]
    sets = [(name, images) for name, images in sets if images]
    if not (all(sides) and sets):
        return None
    config = SegmenterConfig(num_steps=NUM_STEPS, crop_px=min(64, train.resolution))
    training = TrainingSet.from_images(sides[0], tuple(kinds))
    segmenter = train_segmenter(training, tuple(kinds), config, seed=seed)
    rows, pictures = [], []
    for name, images in [("held-out micrographs", sides[1]), *sets]:
        images = images[:MOST_IMAGES]
        comparisons, scores = search_images(segmenter, images)
        rows.append(describe_set(name, scores, seed))
        caption = "The first images, and below them what the segmenter finds"
        figure = draw_adherence(images, comparisons, name, caption)
        pictures.append({"role": "adherence", "figure": figure})
    return to_json({"sets": rows, "num_train_tiles": len(sides[0])}), pictures
