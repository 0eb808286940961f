"""The report's section on labels, for the folders of images that have some."""

from pathlib import Path

from em_data import DataConfig, load_tiles
from em_data.tiles import Tiles
from em_evaluation.detector.adherence_measure import describe_sets
from em_evaluation.detector.adherence_section import measure_section
from em_evaluation.evaluator import RealImages


def add_adherence(report: dict, config, candidates, real: RealImages, log=print) -> list[dict]:
    """Add to a report how well folders of labelled images follow their labels.

    Returns:
        The section's pictures; none if the real micrographs or the folders have no labels.
    """
    train, held_out = real.train, real.held_out
    if not (isinstance(train, Tiles) and isinstance(held_out, Tiles) and train.is_labelled.any()):
        return []
    tiles = DataConfig(
        resolution=train.resolution, label_bar="keep", cache_dir=config.cache_dir, symmetries="none"
    )
    folders = {
        each.name: load_tiles(each.source, tiles, log=lambda text: None)
        for each in candidates
        if each.images is not None and Path(each.source).is_dir()
    }
    measured = measure_section(train, held_out, folders, config.seed)
    if measured is None:
        return []
    report["adherence"], pictures = measured
    for line in describe_sets(report["adherence"]["sets"]):
        log(line)
    return pictures
