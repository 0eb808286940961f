"""Evaluation per class: the probe, distances at equal numbers, the section and its page."""

import numpy as np
import pytest
import torch

from em_evaluation import ModelImages, Protocol, evaluate_models, write_report
from em_evaluation.class_report import conclude_classes, keep_classes
from em_evaluation.classes import fit_probe, measure_accuracy, measure_classes
from em_evaluation.evaluator import RealImages
from em_evaluation.extractor import Extractor
from em_evaluation.images import ClassImages
from em_evaluation.report import render_page

NAMES = ("copper", "iron", "tin")


class Pooled(Extractor):
    """Block means and deviations in 32 features."""

    name, identity, num_features = "pooled", "pooled, 32 features", 32

    def _features(self, images):
        blocks = torch.nn.functional.unfold(images, 4, stride=4)
        return torch.cat([blocks.mean(1), blocks.std(1)], 1)


def draw(classes, seed, contrast=0.25):
    """Noise whose strength and brightness tell the classes apart, nearly."""
    rng = torch.Generator().manual_seed(seed)
    classes = torch.as_tensor(classes).view(-1, 1, 1, 1)
    shift = torch.randn(len(classes), 1, 1, 1, generator=rng) * 0.1
    noise = torch.randn(len(classes), 1, 16, 16, generator=rng) * (0.05 + 0.05 * classes)
    return ((classes - 1) * contrast + shift + noise).clamp(-1, 1)


class Tiles:
    """Tiles of three classes, seen as they are and mirrored, of twelve micrographs."""

    class_names = NAMES

    def __init__(self, seed, counts=(40, 60, 50)):
        self.classes = np.repeat(np.arange(3), counts)
        self.tiles = draw(self.classes, seed)
        self.num_tiles = len(self.classes)
        self.groups = np.array([f"m{c}-{i % 4}" for i, c in enumerate(self.classes)])

    def __len__(self):
        return 2 * self.num_tiles

    def locate(self, view_ids):
        return np.divmod(np.asarray(view_ids), 2)

    def batch(self, view_ids):
        tiles, symmetries = self.locate(view_ids)
        turned = torch.as_tensor(symmetries).view(-1, 1, 1, 1) == 1
        return torch.where(turned, self.tiles[tiles].flip(-1), self.tiles[tiles])

    def class_labels(self, view_ids):
        return torch.from_numpy(self.classes[self.locate(view_ids)[0]])


def make_model(name, classes, images, guided=()):
    return ModelImages(
        name,
        images,
        "ldm",
        of_classes=ClassImages(classes, images, {scale: images for scale in guided}),
    )


def make_models():
    classes = np.arange(90) % 3
    return [
        make_model("Obeys", NAMES, draw(classes, 5), guided=(1.0, 2.0)),
        make_model("Ignores", NAMES, draw(np.zeros(90, int), 6)),
    ]


@pytest.fixture(scope="module")
def evaluated():
    real = RealImages(
        Tiles(1),
        Tiles(2),
        {"name": "metals", "resolution": 16, "split": "micrograph", "pixel_size_nm": 1.0},
    )
    protocol = Protocol(
        num_images=80, use_cache=False, microscopy=False, memorisation=False, levels=("real",)
    )
    return evaluate_models(make_models(), real, [Pooled()], protocol, log=lambda text: None)


def test_the_probe_is_a_regularised_logistic_regression():
    """At the minimum of the loss, the gradient of the cross-entropy is the negative weights."""
    rng = np.random.default_rng(0)
    classes = rng.integers(3, size=200)
    features = rng.normal(size=(200, 5)) + 3 * np.eye(3, 5)[classes] + 7
    probe = fit_probe(features, classes, 3)
    assert (probe.predict(features) == classes).mean() > 0.9
    rows = np.c_[(features - features.mean(0)) / (features.std(0) + 1e-6), np.ones(200)]
    scores = rows @ probe.weights
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = rows.T @ (p - np.eye(3)[classes])
    np.testing.assert_allclose(gradient[:-1], -probe.weights[:-1], atol=0.02)
    np.testing.assert_allclose(gradient[-1], 0, atol=0.02)


def test_accuracy_has_an_interval_over_groups():
    right = np.r_[np.ones(70), np.zeros(30)]
    accuracy = measure_accuracy(right, np.ones(100))
    assert accuracy.value == 0.7
    assert accuracy.replicates.std() == pytest.approx(np.sqrt(0.7 * 0.3 / 100), rel=0.15)
    grouped = measure_accuracy(right, np.ones(100), np.repeat(np.arange(10), 10))
    assert grouped.replicates.std() > 2.5 * accuracy.replicates.std()


def test_each_class_is_judged_at_one_number(evaluated):
    section = evaluated[0]["classes"]
    assert section["names"] == list(NAMES)
    assert section["num_images"] == 30  # 90 generated images of three classes
    assert section["num_train_images"] == 90
    obeys, ignores = (section["models"][name] for name in ("Obeys", "Ignores"))
    assert section["held_out"]["accuracy"]["value"] > 0.85
    assert obeys["share_of_held_out"]["value"] > 0.9
    assert ignores["accuracy"]["value"] == pytest.approx(1 / 3, abs=0.1)
    assert ignores["taken_for"]["tin"]["copper"] > 0.8
    assert sum(ignores["taken_for"]["tin"].values()) == pytest.approx(1)
    for name, row in section["rows"].items():
        values = {key: each["value"] for key, each in row.items()}
        assert values["real"] < values["others"]
        assert values["Obeys"] < values["others"]
        assert (values["Ignores"] < values["others"]) == (name == "copper")
    assert [each["scale"] for each in obeys["guidance"]] == [1.0, 2.0]
    assert obeys["guidance"][0]["accuracy"]["value"] == obeys["accuracy"]["value"]
    assert 0 <= obeys["guidance"][0]["recall"]["value"] <= 1
    assert ignores["guidance"] == []


def test_the_section_is_on_the_page_and_on_the_card(evaluated, tmp_path):
    report, pictures = evaluated
    page = write_report(report, pictures, tmp_path).read_text(encoding="utf-8")
    assert '<h2 id="classes">Classes</h2>' in page
    assert page.count("against the guidance scale") == 2
    assert "Images of Ignores are no nearer to held-out images of iron and tin than" in page
    assert sum(picture["role"] == "class" for picture in pictures) == 9
    kept = keep_classes(report["classes"], "Obeys")
    assert set(kept["rows"]["tin"]) == {"real", "others", "texture", "Obeys"}
    sentences = conclude_classes(kept, ["Obeys"])
    assert sentences[0].startswith("A probe trained on 90 real tiles takes")
    assert "at the 0.9 to aim at" in sentences[1]
    assert keep_classes(report["classes"], "Other") is None
    # reports of before have no such section
    del report["classes"]
    assert 'id="classes"' not in render_page(report, pictures)


def judge(models, held_out, train):
    real = RealImages(held_out, train, {})
    options = {"seed": 0, "log": lambda text: None, "use_cache": False}
    return measure_classes(models, real, Pooled(), **options)


def test_classes_that_cannot_be_judged_are_said():
    models = make_models()
    section, _, notes = judge(models, Tiles(1, (40, 5, 50)), Tiles(2))
    assert section["names"] == ["copper", "tin"]
    assert "Not judged as classes: iron" in notes[0]
    section, _, notes = judge(models, Tiles(1, (40, 5, 5)), Tiles(2))
    assert section is None
    assert "fewer than two" in notes[-1]
    other = make_model("New", ("copper", "tin", "zinc"), draw(np.arange(90) % 3, 5))
    section, _, notes = judge([other], Tiles(1), Tiles(2))
    assert section["names"] == ["copper", "tin"]
    assert notes == ["A model draws classes that the data do not have: zinc."]


def test_without_classes_there_is_no_section():
    plain = [ModelImages("LDM", draw(np.zeros(10), 0))]
    assert judge(plain, Tiles(1), Tiles(2)) == (None, [], [])
    tiles = Tiles(1)
    tiles.class_names = ()
    assert judge(make_models(), tiles, tiles) == (None, [], [])
    assert judge(make_models(), tiles, None) == (None, [], [])
