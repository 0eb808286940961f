"""The two lines before a training whose tiles do not suit the micrographs."""

import re
import time

import numpy as np
import PIL.Image
import pytest
from scipy import ndimage

from em_data import DataConfig, load_data
from em_data.look.tile_size import join_tiles, measure_tiles, warn_of_tile_size


def save_discs(folder, diameter, side, num=3):
    folder.mkdir()
    y, x = np.mgrid[:side, :side]
    for seed in range(num):
        rng = np.random.default_rng(seed)
        image = np.zeros((side, side))
        for _ in range(int(0.15 * side**2 / (np.pi / 4 * diameter**2))):
            row, column = rng.uniform(0, side, 2)
            image = np.maximum(image, np.hypot(y - row, x - column) < diameter / 2)
        image = 60 + 120 * ndimage.gaussian_filter(image, 1) + 6 * rng.normal(size=image.shape)
        PIL.Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{seed}.png")


def listen(folder, tmp_path, **tiles):
    """Return the cut and the lines that are said of it."""
    config = DataConfig(cache_dir=str(tmp_path / "cache"), **tiles)
    cut, lines = load_data(folder, config, log=lambda line: None).train.cut, []
    warn_of_tile_size(cut, config.downsample, str(folder), lines.append)
    return cut, lines


def test_structures_larger_than_tiles_are_said(tmp_path):
    folder = tmp_path / "my data"
    save_discs(folder, 60, 600)
    _, (first, second) = listen(folder, tmp_path, resolution=64)
    pattern = r"Structures are about \d+ px across in tiles of 64 px \(\d+ % of the side\): "
    assert re.fullmatch(pattern + r"most tiles show a part of one\.", first)
    assert second == (
        "--tiles.resolution 256 --tiles.downsample 1 suits them better; "
        f"`python -m em_data.look '{folder}'` shows such tiles."
    )


def test_structures_much_smaller_than_tiles_are_said(tmp_path):
    save_discs(tmp_path / "data", 24, 1024)
    cut, (first, second) = listen(tmp_path / "data", tmp_path, resolution=256, downsample=4)
    assert measure_tiles(cut, 4) == pytest.approx(6, rel=0.2)
    assert "of the side): their details are a few pixels." in first
    assert second.startswith("--tiles.resolution 128 --tiles.downsample 1 suits them better; ")


def test_nothing_is_said_of_tiles_that_suit(tmp_path):
    save_discs(tmp_path / "data", 20, 512)
    assert not listen(tmp_path / "data", tmp_path, resolution=128)[1]
    assert not listen(tmp_path / "data", tmp_path, resolution=64)[1]


def test_nothing_is_said_of_the_embedded_micrographs_in_less_than_a_second(tmp_path):
    cut, lines = listen("synthetic", tmp_path, resolution=64)
    assert not lines
    start = time.process_time()
    warn_of_tile_size(cut, 1, "synthetic", print)
    assert time.process_time() - start < 2  # under load; half a second alone


def test_tiles_are_joined_at_their_places(tmp_path):
    save_discs(tmp_path / "data", 20, 300)
    cut, _ = listen(tmp_path / "data", tmp_path, resolution=64, downsample=2)
    image = join_tiles(cut, 1, 2)
    pixels = np.asarray(PIL.Image.open(tmp_path / "data/1.png"), np.float64)[:256, :256]
    expected = np.rint(pixels.reshape(128, 2, 128, 2).mean(axis=(1, 3)))
    assert np.array_equal(image, expected)
