"""The leakage experiment on a few tiles: a generator that has learnt by heart gains by leaks, an
honest one does not.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from em_data import DataConfig
from em_evaluation.features import Extractor
from em_evaluation.images import ImageSet

FOLDER = Path(__file__).parents[2] / "experiments" / "2024_gan_vs_ldm"


@pytest.fixture(scope="module")
def leakage():
    spec = importlib.util.spec_from_file_location("leakage", FOLDER / "leakage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pooled(Extractor):
    name, identity, num_features = "pooled", "pooled, 4 features", 4

    def _features(self, images):
        edges = images.diff(dim=-1)
        return torch.stack(
            [
                images.mean((1, 2, 3)),
                images.std((1, 2, 3)),
                edges.std((1, 2, 3)),
                images.amin((1, 2, 3)),
            ],
            1,
        )


def test_every_combination_is_measured_and_summarised(leakage, tmp_path):
    config = DataConfig(
        resolution=32,
        num_micrographs=6,
        micrograph_size=128,
        held_out_fraction=0.3,
        cache_dir=str(tmp_path),
    )
    rows = leakage.measure(
        "synthetic", config, (10, 30), Pooled(), log=lambda text: None, use_cache=False
    )
    combinations = {
        (row["split"], row["reference"], row["generator"], row["num_images"]) for row in rows
    }
    assert len(rows) == len(combinations) == 2 * 2 * 2 * 2
    for row in rows:
        assert (
            0
            <= row["frechet_distance"]["low"]
            <= row["frechet_distance"]["value"]
            <= row["frechet_distance"]["high"]
        )
    summary = {row["generator"]: row for row in leakage.summarise(rows)}
    by_heart = summary["learnt by heart"]
    found = {
        (row["split"], row["reference"]): row["frechet_distance"]["value"]
        for row in rows
        if row["num_images"] == 30 and row["generator"] == "learnt by heart"
    }
    assert by_heart["both_add"] == pytest.approx(
        found["leaky", "train"] - found["micrograph", "held_out"]
    )
    assert by_heart["training_reference_adds"] < 0
    result = {"scale": "small", "data": "synthetic", "resolution": 32, "extractor": "pooled, 4"}
    result |= {"summary": list(summary.values()), "rows": rows}
    text = leakage.write_tables(result)
    assert text.count("\n| micrograph |") == 8
    assert f"{by_heart['both_add']:+.2f}" in text


def test_what_is_learnt_by_heart_is_a_copy_and_what_is_new_is_not(leakage):
    from em_evaluation.nearest import find_nearest

    tiles = leakage.draw_new(24, 48, 192)
    assert tiles.levels.shape == (24, 1, 48, 48)
    assert len(np.unique(tiles.groups)) > 1
    copies = leakage.learn_by_heart(ImageSet(tiles.levels[:12]))
    assert (find_nearest(copies.levels[:, 0], tiles.levels[:12, 0]).distance < 0.35).all()
    assert (find_nearest(tiles.levels[12:, 0], tiles.levels[:12, 0]).distance > 0.4).all()
