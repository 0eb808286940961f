"""The sections on electron microscopy and memorisation on the page, and without them."""

import json
import re

import numpy as np
import pytest
import torch

from em_data.config import DataConfig
from em_data.data import load_data, load_tiles
from em_data.synthetic_micrographs import synthesise_micrographs
from em_evaluation import ModelImages, Protocol, evaluate_models, microscopy, write_report
from em_evaluation.detector import adherence_section
from em_evaluation.evaluator import RealImages
from em_evaluation.features import Extractor
from em_evaluation.wording import list_notes

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
        self.groups = np.array([f"m{i // 4}" for i in range(24)])

    def __len__(self):
        return self.num_views

    def locate(self, view_ids):
        return np.asarray(view_ids), np.zeros(len(view_ids), int)

    def batch(self, view_ids):
        return torch.from_numpy(self.tiles[view_ids]).float()[:, None] / 127.5 - 1


@pytest.fixture(scope="module")
def evaluated():
    quick = microscopy.calibrate_detector
    train, held_out = FakeTiles(0), FakeTiles(1)
    models = [
        ModelImages("Copier", train.batch(np.arange(24)).flip(-1), "ldm"),
        ModelImages("Honest", FakeTiles(2).batch(np.arange(24)), "stylegan2"),
    ]
    real = RealImages(held_out, train, SUMMARY)

    def evaluate(real=real, **options):
        protocol = Protocol(num_images=24, use_cache=False, **options)
        return evaluate_models(models, real, [Pooled()], protocol, log=lambda text: None)

    def calibrate(side, pixel, num_micrographs):
        return quick(side, pixel, num_micrographs=2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microscopy, "calibrate_detector", calibrate)
        alone = RealImages(held_out, None, SUMMARY)
        return evaluate(), evaluate(microscopy=False, memorisation=False), evaluate(alone)


def test_both_sections_are_on_the_page_and_in_the_json(evaluated, tmp_path):
    (report, pictures), *_ = evaluated
    page = write_report(report, pictures, tmp_path).read_text()
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["memorisation"]["pixels"]["sets"]["Copier"]["num_copies"] == 24
    assert stored["memorisation"]["pixels"]["sets"]["Honest"]["num_copies"] == 0
    assert '<h2 id="microscopy">Electron microscopy</h2>' in page
    assert '<h2 id="memorisation">Memorisation</h2>' in page
    assert "Copier copies training tiles" in page
    assert "24 of 24 images count as copies" in page
    assert "number of loops<small>/ µm²</small>" in page
    assert page.count('aria-label="distances to the nearest training tile in') == 2
    assert len(re.findall(r"closest|nearest training tile of each", page)) >= 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_both_can_be_left_out(evaluated, tmp_path):
    _, (report, pictures), _ = evaluated
    page = write_report(report, pictures, tmp_path).read_text()
    assert report["microscopy"] is None
    assert report["memorisation"] is None
    assert "Memorisation" not in page
    assert "Electron microscopy" not in page


def test_without_training_tiles_what_needs_them_is_left_out_and_said(evaluated, tmp_path):
    *_, (report, pictures) = evaluated
    assert report["memorisation"] is None
    notes = " ".join(report["protocol"]["notes"])
    assert "Memorisation is not measured: the training images are not known (--data)." in notes
    assert "Real images are not compared with real images: the reference has 24" in notes
    assert [level["kind"] for level in report["levels"]] == ["surrogates", "noise"]
    assert {verdict["outcome"] for verdict in report["verdicts"]} == {"not_measured"}
    assert all(set(row) == {"held_out"} for row in report["measurements"][0]["rows"].values())
    assert "Memorisation is not measured" in write_report(report, pictures, tmp_path).read_text()


def test_the_page_says_what_a_model_was_given_beforehand(evaluated, tmp_path):
    _, (report, pictures), _ = evaluated
    report = json.loads(json.dumps(report))
    page = write_report(report, pictures, tmp_path).read_text()
    assert "started from" not in page
    report["models"][0]["info"]["started_from"] = "em-ldm-64's autoencoder (unchanged)"
    page = write_report(report, pictures, tmp_path).read_text()
    assert "<small>started from em-ldm-64&#39;s autoencoder (unchanged)</small>" in page
    note = (
        "Copier started from em-ldm-64&#39;s autoencoder (unchanged); Honest from random weights."
    )
    assert f"{note} A comparison is fair only if all were given as much." in page
    report["models"][1]["info"]["started_from"] = "em-stylegan2-64's generator"
    page = write_report(report, pictures, tmp_path).read_text()
    assert "Honest started from em-stylegan2-64&#39;s generator. A comparison is fair" in page


def test_a_model_of_other_embedded_micrographs_is_named(evaluated):
    _, (report, _), _ = evaluated
    report = json.loads(json.dumps(report))
    report["dataset"] |= {"name": "synthetic", "fingerprint": "1"}
    for model in report["models"]:
        model["info"]["trained_on"] = "synthetic"
    assert "was trained on" not in " ".join(list_notes(report))
    report["models"][0]["info"]["trained_on"] = "synthetic-other"
    (note,) = [note for note in list_notes(report) if "was trained on" in note]
    assert note.startswith("Copier was trained on synthetic-other, but the reference is synthetic:")
    report["dataset"]["fingerprint"] = None  # real images of --reference
    assert "was trained on" not in " ".join(list_notes(report))


def test_labelled_images_have_a_section_on_adherence(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(adherence_section, "NUM_STEPS", 3)
    tiles = {"resolution": 64, "micrograph_size": 64, "cache_dir": str(tmp_path / "cache")}
    config = DataConfig(num_synthetic=8, split="specimen", held_out_fraction=0.5, **tiles)
    data = load_data("synthetic-other", config, log=lambda text: None)
    generated = load_tiles("synthetic", DataConfig(num_synthetic=5, **tiles), log=lambda text: None)
    section, pictures = adherence_section.measure_section(
        data.train, data.held_out, {"way1": generated}
    )
    assert [row["name"] for row in section["sets"]] == ["held-out micrographs", "way1"]
    assert section["sets"][1]["num_images"] == 5
    assert set(section["sets"][1]["by_kind"]) == set(data.train.kinds)

    report, others = evaluated[1]
    page = write_report({**report, "adherence": section}, others + pictures, tmp_path).read_text()
    assert '<h2 id="adherence">' in page
    assert '<a href="#adherence">' in page
    assert "way1: 4 images, and below them" in page
    assert "adherence" not in write_report(report, others, tmp_path).read_text()

    unlabelled = load_tiles("synthetic", DataConfig(num_synthetic=5, **tiles), log=print)
    unlabelled.is_labelled = np.zeros(unlabelled.num_tiles, bool)
    assert adherence_section.measure_section(data.train, data.held_out, {"a": unlabelled}) is None
