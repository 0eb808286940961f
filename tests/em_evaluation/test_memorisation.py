"""A generator that copies is caught, an honest one is not, and the fast search finds what trying
everything finds.
"""

import copy as copy_module
import json

import numpy as np
import pytest
import torch
from scipy import ndimage

from em_data.synthetic_micrographs import synthesise_micrographs
from em_data.views import ELEMENTS, apply_symmetry
from em_evaluation import ModelImages, Protocol, evaluate_models
from em_evaluation.evaluator import RealImages
from em_evaluation.features import Extractor
from em_evaluation.images import ImageSet
from em_evaluation.memorisation import (
    measure_memorisation,
    nearest_in_features,
    probability_nearer,
    share_interval,
)
from em_evaluation.memorisation_report import (
    conclude_memorisation,
    judge_copies,
    make_gallery,
)
from em_evaluation.nearest import (
    INVERSE,
    TileReader,
    align,
    correlate_by_fft,
    find_nearest,
)
from em_evaluation.partial_copies import (
    MARGIN,
    find_nearest_halves,
    list_halves,
    measure_partial_copies,
    prepare,
)
from support.exhaustive_search import correlate_all, correlate_one_by_one

NAMES = list(ELEMENTS)
HALVES = [np.s_[:32], np.s_[32:], np.s_[:, :32], np.s_[:, 32:]]


class Pooled(Extractor):
    """Means and deviations of the whole image and of its Laplacian: the same under every
    symmetry.
    """

    name, identity, num_features = "pooled", "pooled, 4 features", 4

    def _features(self, images):
        edges = images[..., 1:-1, 1:-1] - torch.nn.functional.avg_pool2d(images, 3, 1)
        return torch.stack(
            [
                f(x)
                for x in (images, edges)
                for f in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3)))
            ],
            1,
        )


class FakeTiles:
    """Training tiles with two symmetries each, as `Tiles` shows them."""

    def __init__(self, tiles):
        self.tiles, self.num_views = tiles, 2 * len(tiles)

    def __len__(self):
        return self.num_views

    def locate(self, view_ids):
        return np.divmod(np.asarray(view_ids), 2)

    def batch(self, view_ids):
        tile, symmetry = self.locate(view_ids)
        views = [self.tiles[t][:, ::-1] if s else self.tiles[t] for t, s in zip(tile, symmetry)]
        return torch.from_numpy(np.stack(views)).float()[:, None] / 127.5 - 1


def cut(seed, num, side=64):
    micrographs = synthesise_micrographs(num, seed, size=2 * side)
    return np.stack(
        [
            m.image[y : y + side, x : x + side]
            for m in micrographs
            for y in (0, side)
            for x in (0, side)
        ]
    )


@pytest.fixture(scope="module")
def train():
    return cut(0, 24)  # 96 tiles


@pytest.fixture(scope="module")
def held_out():
    return cut(7, 5)


def copy(tiles, seed, deviation=6.0):
    """Turned, flipped, shifted by up to 4 pixels in both directions (what comes in is the mirrored
    edge), and noisy.
    """
    rng = np.random.default_rng(seed)
    copies = []
    for i, tile in enumerate(tiles):
        moved = ndimage.shift(tile.astype(float), rng.integers(-4, 5, 2), order=0, mode="reflect")
        copies.append(apply_symmetry(moved, NAMES[i % 8]) + rng.normal(0, deviation, tile.shape))
    return np.stack(copies).round().clip(0, 255).astype(np.uint8)


def measure(generated, held_out, train, **options):
    sets = {name: ImageSet(images[:, None]) for name, images in generated.items()}
    return measure_memorisation(
        sets, ImageSet(held_out[:, None]), FakeTiles(train), log=lambda text: None, **options
    )


@pytest.fixture(scope="module")
def measured(train, held_out):
    chosen = np.random.default_rng(1).permutation(len(train))[:20]
    honest = cut(8, 5)
    half = np.concatenate([copy(train[chosen[:10]], 2), honest[:10]])
    return measure(
        {"copier": copy(train[chosen], 1), "honest": honest, "half": half}, held_out, train
    )


def test_a_copier_is_caught_and_an_honest_generator_is_not(measured):
    section, _ = measured
    sets = section["pixels"]["sets"]
    assert sets["copier"]["num_copies"] == 20
    assert sets["copier"]["nearer"]["value"] == 1
    assert sets["honest"]["num_copies"] == sets["held_out"]["num_copies"] == 0
    assert sets["honest"]["nearer"]["low"] < 0.5 < sets["honest"]["nearer"]["high"]
    assert sets["half"]["num_copies"] == 10
    text = conclude_memorisation(section, ["copier", "honest"])
    assert text[0].startswith("copier copies training tiles: look at the closest pairs below. In ")
    assert "20 of 20 images count as copies (100 %" in text[0]
    assert text[1].startswith("honest shows no sign of copying. In pixels, 0 of 20 images count as")
    json.dumps(section, allow_nan=False)


def test_copies_under_added_grain_are_sought_before_it_is_added(train, held_out):
    def as_images(tiles):
        return torch.from_numpy(tiles)[:, None].float() / 127.5 - 1

    hidden = as_images(copy(train[:20], 1, deviation=300))
    models = [
        ModelImages("LDM", hidden, without_grain=as_images(copy(train[:20], 1))),
        ModelImages("hidden", hidden),
    ]
    real = RealImages(FakeTiles(held_out), FakeTiles(train), {"name": "set"})
    protocol = Protocol(levels=(), num_images=20, microscopy=False, use_cache=False)
    report, _ = evaluate_models(models, real, [Pooled()], protocol, log=lambda text: None)
    sets = report["memorisation"]["pixels"]["sets"]
    assert (sets["LDM"]["num_copies"], sets["hidden"]["num_copies"]) == (20, 0)
    assert report["memorisation"]["without_grain"] == ["LDM"]
    rows = report["measurements"][0]["rows"]
    assert rows["LDM"] == rows["hidden"]  # judged with the grain
    text = conclude_memorisation(report["memorisation"], ["LDM", "hidden"])
    assert any(
        sentence.startswith("The images of LDM were searched before grain is added")
        for sentence in text
    )
    assert not any(
        "LDM" in sentence for sentence in conclude_memorisation(report["memorisation"], ["hidden"])
    )


def test_the_gallery_shows_the_source_as_the_copy_lies(measured):
    _, pairs = measured
    pictures = make_gallery(pairs)
    assert [picture["title"] for picture in pictures] == [
        "Held-out micrographs",
        "copier",
        "honest",
        "half",
    ]
    image, tile = (pictures[1]["levels"][i, 8:-8, 8:-8].astype(float) for i in (0, 6))
    best = max(
        np.corrcoef(np.roll(image, (y, x), (0, 1))[4:-4, 4:-4].ravel(), tile[4:-4, 4:-4].ravel())[
            0, 1
        ]
        for y in range(-4, 5)
        for x in range(-4, 5)
    )
    assert best > 0.9


def test_source_symmetry_and_shift_are_told(train):
    tile = train[5].astype(float)
    for name in NAMES:
        turned = apply_symmetry(np.roll(tile, (2, -3), (0, 1)), name)
        nearest = find_nearest(turned[None].round().astype(np.uint8), train)
        assert nearest.tile[0] == 5
        assert nearest.distance[0] < 0.01
        assert NAMES[nearest.symmetry[0]] == INVERSE[name]
        assert tuple(nearest.shift_px[0]) == (2, -3)
        assert np.array_equal(
            align(apply_symmetry(turned, INVERSE[name]), nearest.symmetry[0]), turned
        )


def test_the_fast_search_finds_what_trying_everything_finds(train):
    images = np.concatenate([cut(9, 1)[:2], copy(train[:2], 5, deviation=20.0)])
    few = train[:8]
    fast = 1 - find_nearest(images, few).distance ** 2 / 2
    slow = [correlate_all(image, few) for image in images]
    assert fast[2:] == pytest.approx(slow[2:], abs=1e-5)  # copies
    assert (np.array(slow) >= fast - 1e-5).all()
    assert fast[:2] == pytest.approx(slow[:2], abs=0.08)  # unrelated images: one of the nearest


def test_correlation_by_fft_is_that_of_each_window():
    rng = np.random.default_rng(0)
    image, tile = rng.normal(100, 30, (2, 24, 24)).astype(np.float32)
    assert correlate_by_fft(image, tile, 3) == pytest.approx(
        correlate_one_by_one(image, tile, 3), abs=1e-5
    )
    assert (correlate_by_fft(np.full((24, 24), 5.0), tile, 3) == 0).all()


def test_tiles_are_read_once_each_and_sizes_must_agree(train):
    reader = TileReader(FakeTiles(train[:6]))
    assert len(reader) == 6
    assert np.array_equal(reader[np.arange(6)], train[:6])
    with pytest.raises(ValueError, match="squares of one size"):
        find_nearest(np.zeros((1, 32, 32), np.uint8), train)
    with pytest.raises(ValueError, match="too small for shifts"):
        find_nearest(np.zeros((1, 12, 12), np.uint8), np.zeros((2, 12, 12), np.uint8))


def test_features_find_copies_under_every_symmetry(train, held_out):
    turned = np.stack([apply_symmetry(tile, NAMES[i % 8]) for i, tile in enumerate(train[:16])])
    sets = {"copier": ImageSet(turned[:, None]), "held_out": ImageSet(held_out[:, None])}
    distances = nearest_in_features(sets, TileReader(train), Pooled(), use_cache=False)
    assert distances["copier"] == pytest.approx(0, abs=1e-3)
    assert np.median(distances["held_out"]) > 1e-3
    section, _ = measure({"copier": turned}, held_out, train, extractor=Pooled(), use_cache=False)
    assert section["features"]["sets"]["copier"]["num_copies"] == 16
    assert section["features"]["extractor"] == Pooled.identity
    (said, *_) = conclude_memorisation(section, ["copier"])
    assert "In features, 16 of 16 images count as copies" in said  # the text has both spaces


def test_copies_in_features_alone_are_told(measured):
    section, _ = copy_module.deepcopy(measured)
    assert judge_copies(section, "honest") == "nothing"
    section["features"] = copy_module.deepcopy(section["pixels"])
    section["features"]["sets"]["honest"]["num_copies"] = 1
    assert judge_copies(section, "honest") == "copies"
    said = conclude_memorisation(section, ["honest"])[0]
    assert "no sign of copying" not in said
    assert "In features, 1 of 20 images count as copies" in said


def test_a_leaky_split_is_said_and_nothing_concluded(train):
    section, _ = measure({"honest": cut(8, 2)}, copy(train[:12], 4, deviation=1.0), train)
    assert "cannot be judged" in conclude_memorisation(section, ["honest"])[0]
    assert measure({}, np.zeros((2, 16, 16), np.uint8), np.zeros((3, 16, 16), np.uint8)) == (
        None,
        [],
    )


def paste_halves(tiles, onto):
    """Images of which one half is a tile's: top, bottom, left, right in turn."""
    images = onto.copy()
    for i, tile in enumerate(tiles):
        images[i][HALVES[i % 4]] = tile[HALVES[i % 4]]
    return images


def measure_halves(generated, held_out, train):
    sets = {name: ImageSet(images[:, None]) for name, images in generated.items()}
    return measure_partial_copies(
        sets, ImageSet(held_out[:, None]), FakeTiles(train), log=lambda text: None
    )


def test_who_copies_halves_is_caught_where_whole_copies_are_not_found(train, held_out, measured):
    chosen = np.random.default_rng(1).permutation(len(train))[:20]
    honest = cut(8, 5)
    halves = paste_halves(copy(train[chosen], 1), honest)
    section, _ = measure({"halves": halves, "honest": honest}, held_out, train)
    assert section["pixels"]["sets"]["halves"]["num_copies"] <= 2
    section["partial"] = measure_halves(
        {"halves": halves, "honest": honest, "whole": train[:12]}, held_out, train
    )
    sets = section["partial"]["sets"]
    assert sets["halves"]["num_copies"] >= 17
    assert sets["whole"]["num_copies"] == 12
    assert sets["honest"]["num_copies"] + sets["held_out"]["num_copies"] <= 1
    text = " ".join(conclude_memorisation(section, ["halves", "honest"]))
    assert f"Partial copies: {sets['halves']['num_copies']} of 20 images of halves" in text
    assert f"false alarms, {sets['held_out']['num_copies']} of 20 do" in text
    assert "Partial" not in " ".join(conclude_memorisation(measured[0], ["half"]))
    json.dumps(section, allow_nan=False)


def test_tile_symmetry_and_half_of_a_partial_copy_are_told(train):
    contents, factor = prepare(train)
    assert factor == 1
    unrelated = cut(9, 1)[0]
    for i, name in enumerate(NAMES):
        image = paste_halves([unrelated] * 4, np.stack([np.roll(train[5], (3, -2), (0, 1))] * 4))[
            i % 4
        ]
        nearest = find_nearest_halves(apply_symmetry(image, name)[None], contents, factor)
        assert nearest.tile[0] == 5
        assert NAMES[nearest.symmetry[0]] == INVERSE[name]
        assert nearest.half[0] == [1, 0, 3, 2][i % 4]  # the other one was overwritten
        assert nearest.distance[0] < 0.35


def test_the_search_for_halves_finds_what_trying_everything_finds(train):
    images, few = paste_halves(copy(train[:4], 5), cut(9, 1)[:4]), train[:8]
    contents, factor = prepare(few)
    fast = 1 - find_nearest_halves(images, contents, factor).distance ** 2 / 2
    for image, found in zip(prepare(images)[0], fast):
        best = -1.0
        for name in NAMES:
            turned = apply_symmetry(image, name)
            for rows, columns in list_halves(64):
                height, width = rows.stop - rows.start, columns.stop - columns.start
                shifts = [
                    (rows.start + y, columns.start + x)
                    for y in range(-MARGIN, MARGIN + 1)
                    for x in range(-MARGIN, MARGIN + 1)
                ]
                windows = np.stack(
                    [turned[y : y + height, x : x + width].ravel() for y, x in shifts]
                )
                for content in contents[:, rows, columns].reshape(len(few), -1):
                    best = max(best, np.corrcoef(content, windows)[0, 1:].max())
        assert best - 0.02 < found < best + 1e-5


def test_halves_of_large_images_are_sought_averaged_and_small_ones_not_at_all(train):
    large = train[:10].repeat(4, 1).repeat(4, 2)
    contents, factor = prepare(large)
    assert factor == 4
    assert contents.shape == (10, 64, 64)
    np.testing.assert_allclose(contents, prepare(train[:10])[0], atol=1e-3)
    nearest = find_nearest_halves(large[:3], contents, factor)
    assert list(nearest.tile) == [0, 1, 2]
    assert nearest.distance.max() < 0.01
    small = np.zeros((3, 40, 40), np.uint8)
    assert measure_halves({}, small, small) is None
    with pytest.raises(ValueError, match="squares of one size"):
        find_nearest_halves(train[:1], contents, factor)


def test_probability_and_share_in_closed_form():
    a, b = np.array([0.5, 0.5, 0]), np.array([0, 0.5, 0.5])
    assert probability_nearer(a, b) == pytest.approx(0.5 + 0.5 * 0.75)
    assert probability_nearer(a, a) == pytest.approx(0.5)
    none = share_interval(0, 100)
    assert none.low == 0
    assert none.high == pytest.approx(1 - 0.025**0.01)
    assert share_interval(100, 100).high == 1
