import json

import numpy as np
import pytest
from scipy import ndimage

from em_data.config import DataConfig
from em_data.data import load_data
from em_data.synthetic import main
from em_data.synthetic_micrographs import synthesise_micrographs
from em_data.synthetic_other import (
    make_texture,
    synthesise_other_micrograph,
    synthesise_other_micrographs,
)
from em_evaluation.micrograph_statistics import ring_powers


@pytest.fixture(scope="module")
def micrographs():
    return list(synthesise_other_micrographs(8, seed=3, size=256))


@pytest.fixture(scope="module")
def standard():
    return list(synthesise_micrographs(8, seed=3, size=256))


def find_free_pixels(micrograph):
    free = np.ones(micrograph.image.shape, bool)
    for x0, y0, x1, y1 in (defect.box_px for defect in micrograph.defects):
        free[max(0, y0 - 4) : y1 + 4, max(0, x0 - 4) : x1 + 4] = False
    return free


def test_a_seed_is_a_picture_and_another_seed_another(micrographs):
    again = synthesise_other_micrograph(3_000_004, size=256)
    assert np.array_equal(again.image, micrographs[4].image)
    assert (again.name, again.specimen) == (micrographs[4].name, micrographs[4].specimen)
    assert [d.box_px for d in again.defects] == [d.box_px for d in micrographs[4].defects]
    assert [each.specimen for each in micrographs] == [micrographs[0].specimen] * 4 + [
        micrographs[4].specimen
    ] * 4
    for i, a in enumerate(micrographs):
        for b in micrographs[:i]:
            assert np.mean(a.image == b.image) < 0.3


def test_the_defects_are_of_the_same_kinds_and_sizes_but_others(micrographs, standard):
    def collect(pictures):
        defects = [defect for each in pictures for defect in each.defects]
        sizes = {}
        for defect in defects:
            sizes.setdefault(defect.kind, []).append(defect.diameter_nm or defect.length_nm)
        return sizes, {defect.metadata["center_px"] for defect in defects}

    (theirs, places), (ours, our_places) = collect(micrographs), collect(standard)
    assert theirs.keys() == ours.keys() == {"loop_100", "loop_111", "dot", "line"}
    assert not places & our_places
    for kind, sizes in ours.items():
        assert 0.7 < np.median(theirs[kind]) / np.median(sizes) < 1.43, kind
        assert 0.5 < len(theirs[kind]) / len(sizes) < 2, kind


def test_every_micrograph_looks_unlike_every_standard_one(micrographs, standard):
    """Its noise is a camera's, correlated over pixels, and it uses a part of the grey levels."""

    def fall(micrograph):
        """Power at about 6 pixels a period over that at 3, as a logarithm."""
        powers = ring_powers(micrograph.image[None] / 255.0)[0]
        return np.log(powers[38:48].mean() / powers[80:90].mean())

    def spread(micrograph):
        return np.subtract(*np.quantile(micrograph.image, (0.999, 0.001)))

    theirs, ours = (
        np.array([(fall(each), spread(each)) for each in pictures])
        for pictures in (micrographs, standard)
    )
    assert theirs[:, 0].min() > ours[:, 0].max()
    assert theirs[:, 1].max() < ours[:, 1].min()


def test_defects_are_dark_and_can_be_seen(micrographs):
    """In nearly all loops, the outline is darker than the surroundings by more than the noise."""
    contrasts = []
    for each in micrographs:
        image = ndimage.gaussian_filter(each.image.astype(float), 1)
        free = find_free_pixels(each)
        noise = (image - ndimage.gaussian_filter(image, 8))[free].std()
        for defect in each.defects:
            x0, y0, x1, y1 = defect.box_px
            if defect.kind.startswith("loop") and not defect.metadata["is_cut_by_border"]:
                edge = defect.mask & ~ndimage.binary_erosion(defect.mask, iterations=2)
                around = image[max(0, y0 - 6) : y1 + 6, max(0, x0 - 6) : x1 + 6]
                darker = np.median(around) - image[y0:y1, x0:x1][edge].mean()
                contrasts.append(darker / noise)
    assert np.mean(np.array(contrasts) > 1) > 0.8, np.quantile(contrasts, (0.05, 0.1, 0.2, 0.5))


def test_a_texture_has_details_between_its_two_lengths():
    rng = np.random.default_rng(0)
    field = make_texture(rng, 256, 1.0, 6, 40)
    assert field.shape == (256, 256)
    assert abs(field.std() - 1) < 0.2
    power = np.abs(np.fft.rfft2(field)) ** 2
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256))
    middle = power[(frequency > 1 / 40) & (frequency < 1 / 8)].mean()
    assert middle > 100 * power[frequency > 1 / 3].mean()
    assert abs(field.mean()) < 0.2


def test_the_source_is_data_and_the_command_writes_it(tmp_path):
    config = DataConfig(
        resolution=32, num_synthetic=8, micrograph_size=64, cache_dir=str(tmp_path / "cache")
    )
    data = load_data("synthetic-other", config, log=lambda line: None)
    assert data.summary["num_micrographs"] == 8
    assert data.train.is_labelled.all()
    main(["--num", "2", "--size", "96", "--other", "--out", str(tmp_path / "out")])
    coco = json.loads((tmp_path / "out" / "labels" / "coco.json").read_text())
    assert [image["file_name"][:15] for image in coco["images"]] == ["synthetic-other"] * 2


@pytest.mark.parametrize(("seed", "size"), [(-1, 64), (0, 8)])
def test_impossible_pictures_are_refused(seed, size):
    with pytest.raises(ValueError, match="a synthetic micrograph needs"):
        synthesise_other_micrograph(seed, size)
