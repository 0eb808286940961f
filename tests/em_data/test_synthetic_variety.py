import json

import numpy as np
import pytest

from em_data.config import DataConfig
from em_data.data import load_data
from em_data.synthetic import main
from em_data.synthetic_imaging import Display
from em_data.synthetic_micrographs import Specimen, synthesise_micrograph
from em_data.synthetic_variety import (
    draw_specimen,
    synthesise_varied_micrograph,
    synthesise_varied_micrographs,
)

FIELDS = (
    "loop_median_nm",
    "loops_per_um2",
    "dots_per_um2",
    "lines_per_um2",
    "thickness",
    "mottle",
    "dose",
)


def test_a_seed_is_a_picture_and_another_seed_another():
    pictures = list(synthesise_varied_micrographs(6, seed=2, size=96))
    again = synthesise_varied_micrograph(2_000_004, size=96)
    assert np.array_equal(again.image, pictures[4].image)
    assert (again.name, again.specimen) == (pictures[4].name, pictures[4].specimen)
    assert len({each.specimen for each in pictures}) == 6
    for i, a in enumerate(pictures):
        assert a.image.shape == (96, 96)
        for b in pictures[:i]:
            assert np.mean(a.image == b.image) < 0.3


def test_no_micrograph_is_one_of_the_standard_set():
    """Defects and their places differ for every seed, not only the imaging."""
    for seed in range(4):
        varied = synthesise_varied_micrograph(seed, 128)
        specimen, pixel_size_nm = draw_specimen(seed)
        standard = synthesise_micrograph(seed, 128, pixel_size_nm, specimen=specimen)
        places = [
            {defect.metadata["center_px"] for defect in each.defects} for each in (varied, standard)
        ]
        assert places[0]
        assert not places[0] & places[1]


def test_the_standard_set_lies_inside_the_variety():
    varied = [draw_specimen(seed) for seed in range(400)]
    standard = [Specimen.from_seed(seed) for seed in range(100)]
    for name in FIELDS:
        wide = [getattr(specimen, name) for specimen, _ in varied]
        narrow = [getattr(specimen, name) for specimen in standard]
        assert min(wide) < min(narrow), name
        assert max(wide) > max(narrow), name
    sizes = [size for _, size in varied]
    assert 0.5 <= min(sizes) < 0.6
    assert 1.8 < max(sizes) <= 2
    displays = [specimen.display for specimen, _ in varied]
    assert all(0 < each.black < each.white < 255 for each in displays)
    assert 0.06 < np.mean([each.is_inverted for each in displays]) < 0.2
    assert 0.15 < np.mean([specimen.dot_contrast < 0 for specimen, _ in varied]) < 0.35


def test_loops_cover_the_share_of_the_area_that_was_drawn():
    for seed in range(50):
        specimen, pixel_size_nm = draw_specimen(seed)
        covered = specimen.loops_per_um2 * np.pi / 4 * (specimen.loop_median_nm / 1000) ** 2
        assert 0.05 <= covered <= 0.35
        assert 10 <= specimen.loop_median_nm / pixel_size_nm <= 40


def test_a_display_maps_counts_to_its_levels():
    counts = np.linspace(3, 7, 10_000)
    grey = Display(20, 120).to_grey(counts).astype(float)
    assert (grey.min(), grey.max()) == (20, 120)
    assert np.all(np.diff(grey) >= 0)
    inverted = Display(20, 120, is_inverted=True).to_grey(counts).astype(float)
    assert np.abs(grey + inverted - 140).max() <= 1
    curved = Display(20, 120, gamma=2.0).to_grey(counts)
    assert curved[5000] == pytest.approx(20 + 100 * 0.25, abs=1)


def test_contrast_and_bright_dots_are_seen():
    plain = dict(loops_per_um2=0, lines_per_um2=0, dots_per_um2=3000, dot_median_nm=6, dose=200)
    flat = dict(mottle=0.0, display=Display(20, 240))

    def centres(**change):
        specimen = Specimen(**plain, **flat, **change)
        picture = synthesise_micrograph(3, 128, specimen=specimen)
        image = picture.image.astype(float)
        at = [
            d.metadata["center_px"] for d in picture.defects if not d.metadata["is_cut_by_border"]
        ]
        return np.mean([image[round(y), round(x)] for x, y in at]) - np.median(image)

    assert centres() < -10
    assert centres(dot_contrast=-1.0) > 10
    assert centres(contrast=0.3) > 0.7 * centres(contrast=1.5)


@pytest.mark.parametrize(("seed", "size"), [(-1, 64), (0, 8)])
def test_impossible_pictures_are_refused(seed, size):
    with pytest.raises(ValueError, match="a synthetic micrograph needs"):
        synthesise_varied_micrograph(seed, size)


def test_it_is_a_source_of_data(tmp_path):
    lines = []
    config = DataConfig(
        resolution=32, num_micrographs=4, micrograph_size=64, cache_dir=str(tmp_path)
    )
    data = load_data("synthetic-varied", config, log=lines.append)
    assert data.summary["name"] == "synthetic-varied"
    assert [each["name"] for each in data.train.cut.micrographs] == [
        f"varied_{i:05d}" for i in range(4)
    ]
    assert data.summary["pixel_size_nm"] is None
    assert any("pixel sizes differ" in line for line in lines)
    standard = load_data("synthetic", config, log=lines.append)
    assert standard.identity["fingerprint"] != data.identity["fingerprint"]


def test_the_command_writes_it_with_labels(tmp_path, capsys):
    main(["--num", "2", "--size", "96", "--varied", "--out", str(tmp_path)])
    assert "2 micrographs" in capsys.readouterr().out
    coco = json.loads((tmp_path / "labels" / "coco.json").read_text())
    assert len({image["pixel_size_nm"] for image in coco["images"]}) == 2
    with pytest.raises(SystemExit):
        main(["--varied", "--pixel-size-nm", "0.5", "--out", str(tmp_path)])
    assert "not allowed with" in capsys.readouterr().err


def test_the_standard_set_is_unchanged():
    """The demo's numbers are of these pictures. Processors may round a pixel differently."""
    image = synthesise_micrograph(0, 64).image.astype(float)
    assert image.mean() == pytest.approx(119.82, abs=0.02)
    expected = [[67, 175, 148, 119], [95, 102, 110, 161], [142, 72, 162, 112], [91, 108, 149, 82]]
    assert np.abs(image[::16, ::16] - expected).max() <= 1
