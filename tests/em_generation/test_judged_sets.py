"""What is said of sets that are judged together."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from em_data import DataConfig, load_data, load_tiles, read_image_folder
from em_evaluation.evaluator import RealImages
from em_generation.candidates import Candidate
from em_generation.evaluate import EvaluationConfig, cut_large, load_real_images
from em_generation.judged_sets import describe_sets


def write_images(folder, num, size=32, high=255, dtype=np.uint8, first=0, nm=None):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + num):
        image = np.random.default_rng(i).integers(0, high, (size, size), endpoint=True, dtype=dtype)
        options = {"resolution": (1e7 / nm, 1e7 / nm), "resolutionunit": 3} if nm else {}
        tifffile.imwrite(folder / f"{i}.tif", image, **options)
    return str(folder)


def tile(tmp_path, **changes):
    return DataConfig(
        resolution=32, symmetries="none", cache_dir=str(tmp_path / "cache"), **changes
    )


@pytest.mark.parametrize(
    ("high", "dtype", "is_refused"),
    [(4095, np.uint16, True), (65535, np.uint16, False), (20, np.uint8, False)],
)
def test_images_of_12_bits_in_16_are_refused(tmp_path, high, dtype, is_refused):
    folder = write_images(tmp_path / "theirs", 3, size=64, high=high, dtype=dtype)
    if is_refused:  # also with a hot pixel and beside an image of 8 bits
        image = tifffile.imread(tmp_path / "theirs" / "0.tif")
        image[0, 0] = 65535
        tifffile.imwrite(tmp_path / "theirs" / "0.tif", image)
        write_images(tmp_path / "theirs", 1, size=64, first=9)
    images = read_image_folder(folder)
    if is_refused:
        with pytest.raises(ValueError, match=r"theirs holds .* to 4,09\d only.*by 16"):
            cut_large("theirs", folder, images, None, print)
    else:
        assert cut_large("theirs", folder, images, None, print) is images


def test_files_that_are_not_read_are_named(tmp_path):
    folder = write_images(tmp_path / "theirs", 3)
    (tmp_path / "theirs" / "map.czi").write_text("no image")
    said = []
    cut_large("theirs", folder, read_image_folder(folder), None, said.append)
    assert any(line.startswith("theirs: ") and "czi" in line for line in said)


def test_pixel_sizes_that_differ_are_named(tmp_path):
    folders = {nm: write_images(tmp_path / f"{nm}", 3, nm=nm) for nm in (0.5, 0.502, 1.0)}
    real = load_real_images(EvaluationConfig(reference=folders[0.5]), [], log=print)
    candidates = [
        Candidate(f"images of {nm}", folder, images=read_image_folder(folder))
        for nm, folder in folders.items()
    ]
    (said,) = describe_sets(real, candidates)
    assert said.startswith("images of 1.0: 1 nm per pixel, the reference: 0.5 nm.")


def test_a_reference_that_was_trained_on_is_named(tmp_path):
    data = load_data(write_images(tmp_path / "data", 8, size=64), tile(tmp_path))
    name = data.train.cut.micrographs[int(data.train.micrograph_ids[0])]["name"]
    reference = write_images(tmp_path / "reference", 3, size=64, first=100)
    real = RealImages(load_tiles(reference, tile(tmp_path)), data.train, {})
    assert describe_sets(real, []) == []
    seen = np.rot90(tifffile.imread(tmp_path / "data" / name))
    Image.fromarray(np.ascontiguousarray(seen)).save(tmp_path / "reference" / "seen.png")
    real = RealImages(load_tiles(reference, tile(tmp_path)), data.train, {})
    (said,) = describe_sets(real, [])
    assert "1 of 4 micrographs of the reference are also among the training" in said
    assert "seen.png" in said


def test_generated_micrographs_have_the_pixels_of_the_tiles(tmp_path):
    folder = write_images(tmp_path / "theirs", 2, size=128)
    config, images = tile(tmp_path, downsample=2), read_image_folder(folder)
    assert len(cut_large("theirs", folder, images, config, print)) == 2 * 2 * 2
    (tmp_path / "theirs" / "generation.json").write_text("{}")
    tiles = cut_large("theirs", folder, images, config, print)
    assert len(tiles) == 2 * 4 * 4
    first = torch.from_numpy(tifffile.imread(tmp_path / "theirs" / "0.tif")[:32, :32].copy())
    assert torch.allclose(tiles.batch([0])[0, 0], first / 127.5 - 1, atol=1e-6)
