"""The sections on electron microscopy and memorisation on the page, and without them."""

import json
import re

import numpy as np
import pytest
import torch

from em_data.synthetic_micrographs import synthesise_micrographs
from em_evaluation import ModelImages, evaluate_models, write_report
from em_evaluation import calibrate_detector as calibration
from em_evaluation.features import Extractor

SUMMARY = {
    "name": "tiles",
    "num_micrographs": 6,
    "split": "micrograph",
    "resolution": 48,
    "pixel_size_nm": 1.0,
}


class Pooled(Extractor):
    name, identity, num_features = "pooled", "pooled, 18 features", 18

    def _features(self, images):
        blocks = torch.nn.functional.unfold(images, 16, stride=16)
        return torch.cat([blocks.mean(1), blocks.std(1)], 1)


class FakeTiles:
    def __init__(self, seed):
        micrographs = synthesise_micrographs(6, seed, size=96)
        self.tiles = np.stack(
            [m.image[y : y + 48, x : x + 48] for m in micrographs for y in (0, 48) for x in (0, 48)]
        )
        self.num_tiles = self.num_views = len(self.tiles)
        self.rows = type("Rows", (dict,), {"column_names": ["micrograph"]})(
            micrograph=[f"m{i // 4}" for i in range(24)]
        )

    def __len__(self):
        return self.num_views

    def locate(self, view_ids):
        return np.asarray(view_ids), np.zeros(len(view_ids), int)

    def batch(self, view_ids):
        return torch.from_numpy(self.tiles[view_ids]).float()[:, None] / 127.5 - 1


@pytest.fixture(scope="module")
def evaluated():
    quick = calibration.calibrate_detector
    train, held_out = FakeTiles(0), FakeTiles(1)
    models = [
        ModelImages("Copier", "ldm", train.batch(np.arange(24)).flip(-1)),
        ModelImages("Honest", "stylegan2", FakeTiles(2).batch(np.arange(24))),
    ]

    def evaluate(**options):
        return evaluate_models(
            models,
            SUMMARY,
            held_out,
            train,
            extractor=Pooled(),
            num_images=24,
            use_cache=False,
            log=lambda text: None,
            **options,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            calibration,
            "calibrate_detector",
            lambda side, pixel, num_micrographs: quick(side, pixel, num_micrographs=2),
        )
        return evaluate(), evaluate(microscopy=False, memorisation=False)


def test_both_sections_are_on_the_page_and_in_the_json(evaluated, tmp_path):
    (report, pictures), _ = evaluated
    page = write_report(report, pictures, tmp_path).read_text()
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["memorisation"]["pixels"]["sets"]["Copier"]["num_copies"] == 24
    assert stored["memorisation"]["pixels"]["sets"]["Honest"]["num_copies"] == 0
    assert "<h2>Electron microscopy</h2>" in page
    assert "<h2>Memorisation</h2>" in page
    assert "Copier copies: 24 of 24 images" in page
    assert "number of loops, / µm²" in page
    assert page.count('aria-label="distances to the nearest training view') == 1
    assert len(re.findall(r"closest|nearest training view of each", page)) >= 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_both_can_be_left_out(evaluated, tmp_path):
    _, (report, pictures) = evaluated
    page = write_report(report, pictures, tmp_path).read_text()
    assert not {"microscopy", "memorisation"} & set(report)
    assert "Memorisation" not in page
    assert "Electron microscopy" not in page
