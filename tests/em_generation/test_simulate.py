"""Simulated micrographs have the defects of the training side, and labels where they show them."""

import subprocess
import sys

import numpy as np
import pytest

from em_data import DataConfig, from_uint, load_tiles
from em_data.images import write_image
from em_data.labels import draw_whole_mask, write_labelled
from em_data.micrograph import Defect, Micrograph
from em_data.split import choose_groups
from em_generation.simulate import SimulationConfig, read_training_side, write_simulation

TILES = DataConfig(resolution=32, held_out_fraction=0.5)
SHAPES = {"train": (4, 12), "held out": (8, 8)}  # one is long, one is square


def make_micrograph(number, shape, side=64):
    """Draw dark rectangles of one shape on a grid, not straight below each other."""
    rng = np.random.default_rng(number)
    image = rng.normal(150, 4, (side, side))
    defects = []
    for row in range(2, side - 16, 16):
        for column in range(2, side - 16, 16):
            y, x = row + int(rng.integers(3)), column + int(rng.integers(3))
            image[y : y + shape[0], x : x + shape[1]] -= 60
            mask = np.ones(shape, bool)
            defects.append(Defect("disc", (x, y, x + shape[1], y + shape[0]), mask))
    return Micrograph(image.astype(np.uint8), f"{number}.png", defects=defects)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder whose held-out micrographs have defects of another shape."""
    folder = tmp_path_factory.mktemp("labelled")
    names = [f"images/{number}.png" for number in range(6)]
    held_out = choose_groups(names, TILES)
    sides = ["held out" if name in held_out else "train" for name in names]
    write_labelled([make_micrograph(i, SHAPES[side]) for i, side in enumerate(sides)], folder)
    return str(folder)


@pytest.fixture(scope="module")
def config(labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "simulated"
    config = SimulationConfig(labelled, str(out), num=4, size=128, tiles=TILES)
    write_simulation(config, say=lambda line: None)
    return config


def read(folder):
    tiles = load_tiles(folder, DataConfig(resolution=128), log=lambda line: None)
    return [(tiles.batch([i])[0, 0].numpy(), tiles.defects(i)) for i in range(len(tiles))]


def test_only_shapes_of_the_training_side_are_drawn(config):
    labelled = read_training_side(config, lambda line: None)
    assert {each.mask.shape for layout in labelled.layouts for each in layout} == {SHAPES["train"]}
    found = [each for _, layout in read(config.out) for each in layout]
    whole = [each for each in found if min(each.box_px) > 0 and max(each.box_px) < 128]
    assert len(whole) > 30
    assert {each.kind for each in whole} == {"disc"}
    for each in whole:
        rows, columns = np.nonzero(each.mask)
        spread = np.linalg.eigvalsh(np.cov(np.stack([rows, columns])))
        assert spread[1] > 3 * spread[0]  # 9 for the long one, 1 for the square one


def test_defects_are_dark_where_their_masks_are(config):
    contrasts = []
    for image, layout in read(config.out):
        covered = np.any([draw_whole_mask(each, image.shape) for each in layout], axis=0)
        for each in layout:
            x0, y0, x1, y1 = each.box_px
            window = np.s_[max(0, y0 - 8) : y1 + 8, max(0, x0 - 8) : x1 + 8]
            inside = draw_whole_mask(each, image.shape)[window]
            around = image[window][~covered[window]]
            contrasts.append(image[window][inside].mean() - around.mean())
    assert np.mean(np.array(contrasts) < 0) > 0.95
    assert np.mean(contrasts) < -0.2


def test_a_micrograph_depends_on_its_seed_and_number_alone(config, tmp_path):
    fewer = SimulationConfig(config.data, str(tmp_path / "a"), num=2, size=128, tiles=TILES)
    other = SimulationConfig(config.data, str(tmp_path / "b"), num=2, size=128, seed=1, tiles=TILES)
    for each in (fewer, other):
        write_simulation(each, say=lambda line: None)
    first, same, different = (read(each.out)[:2] for each in (config, fewer, other))
    for a, b, c in zip(first, same, different, strict=False):
        assert np.array_equal(a[0], b[0])
        assert [each.box_px for each in a[1]] == [each.box_px for each in b[1]]
        assert not np.array_equal(a[0], c[0])


def test_mistakes_are_told(config, labelled, tmp_path):
    with pytest.raises(ValueError, match=r"not an empty folder.*--out"):
        write_simulation(config)
    with pytest.raises(ValueError, match="--size is 8, but must be at least 16"):
        SimulationConfig(labelled, "out", size=8)
    for number in range(2):
        image = from_uint(make_micrograph(number, (4, 4)).image)
        write_image(image, tmp_path / "data" / f"{number}.png")
    command = [sys.executable, "-m", "em_generation.simulate", "--out", str(tmp_path / "out")]
    command += ["--data", str(tmp_path / "data"), "--tiles.resolution", "32"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "data has no labelled defects" in ended.stderr
