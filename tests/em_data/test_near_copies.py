"""Near copies are found, micrographs that are only similar are not, and no split parts copies."""

import io
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import tifffile
from scipy import ndimage

from em_data import load_data
from em_data.near_copies import (
    RELATIVE,
    Groups,
    _match_wholes,
    find_near_copies,
    make_signature,
)
from em_data.views import ELEMENTS, apply_symmetry


def stretch(image):
    image = image - image.min()
    return np.uint8(image / image.max() * 255)


def texture(seed, shape=(256, 320), blur=3):
    """A micrograph of a random texture, with noise."""
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.normal(size=shape), blur)
    return stretch(image / image.std() + rng.normal(0, 0.3, shape))


def lattice(seed, period, angle=10):
    """A micrograph of a lattice with a random phase, and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:256, :256]
    turn = np.deg2rad(angle)
    phases = rng.uniform(0, 2 * np.pi, 2)
    u = (x * np.cos(turn) + y * np.sin(turn)) * 2 * np.pi / period + phases[0]
    v = (y * np.cos(turn) - x * np.sin(turn)) * 2 * np.pi / period + phases[1]
    return stretch(np.cos(u) + np.cos(v) + rng.normal(0, 0.5, x.shape))


def compress(image, quality=60):
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(PIL.Image.open(file))


def rescale(image, factor):
    size = round(image.shape[1] * factor), round(image.shape[0] * factor)
    return np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BICUBIC))


COPIES = {
    "compressed": compress,
    "16 bits": lambda image: image.astype(np.uint16) * 100 + 500,
    "median": lambda image: ndimage.median_filter(image, 5),
    "blurred": lambda image: ndimage.gaussian_filter(image, 2),
    "noisy": lambda image: stretch(image + np.random.default_rng(0).normal(0, 20, image.shape)),
    "twice": lambda image: rescale(image, 2),
    "half": lambda image: rescale(image, 0.5),
    "1.37": lambda image: rescale(image, 1.37),
    "stretched": lambda image: np.uint8(np.clip(image.astype(float) - 60, 0, 120) * 2),
    "gamma": lambda image: stretch((image / 255) ** 0.5),
    "bar cropped": lambda image: image[:-20],
    "turned": lambda image: compress(np.ascontiguousarray(np.rot90(image[:-20]))),
    "flipped": lambda image: rescale(np.ascontiguousarray(image[:, ::-1]), 0.5),
    "crop": lambda image: image[30:190, 90:300],
    "crop of a crop": lambda image: image[40:240, :230],
    "turned crop": lambda image: np.rot90(image[60:220, 11:200], 3),
    "enlarged crop": lambda image: rescale(image[60:220, 11:200], 2),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found_among_others(name):
    images = [texture(seed) for seed in range(5)]
    images.insert(3, COPIES[name](images[1]))
    assert find_near_copies([make_signature(image) for image in images]) == [(1, 3)]


def test_relative_symmetries():
    probe = np.arange(12).reshape(3, 4)
    for a, first in enumerate(ELEMENTS):
        for b, second in enumerate(ELEMENTS):
            turned = apply_symmetry(probe, list(ELEMENTS)[RELATIVE[a, b]])
            assert np.array_equal(apply_symmetry(turned, first), apply_symmetry(probe, second))


@pytest.mark.parametrize("blur", [0, 1, 3, 10])
def test_textures_of_one_kind_are_no_copies(blur):
    signatures = [make_signature(texture(seed, blur=blur)) for seed in range(20)]
    assert find_near_copies(signatures) == []


@pytest.mark.parametrize("period", [8, 20, 60])
def test_lattices_are_no_copies_unless_they_are(period):
    images = [lattice(seed, period) for seed in range(6)]
    assert find_near_copies([make_signature(image) for image in images]) == []
    images = [images[0], compress(images[0], 90)]
    assert find_near_copies([make_signature(image) for image in images]) == [(0, 1)]


def test_equal_padding_is_no_copy():
    y, x = np.mgrid[:256, :256]
    images = [texture(seed, (256, 256), 1) for seed in range(8)]
    for image in images:
        image[(y - 128) ** 2 + (x - 128) ** 2 > 115**2] = 0
    assert find_near_copies([make_signature(image) for image in images]) == []


def test_small_and_narrow_images_have_a_signature():
    for shape in ((8, 8), (16, 16), (16, 900), (33, 64)):
        images = [texture(seed, shape, 1) for seed in (0, 1)]
        assert find_near_copies([make_signature(image) for image in images]) == []


def test_twins_of_12_micrographs_stay_on_one_side(tmp_path, config):
    for i in range(12):
        tifffile.imwrite(tmp_path / f"{i}.tif", texture(i).astype(np.uint16) * 50)
        PIL.Image.fromarray(texture(i)).save(tmp_path / f"{i}.jpg", quality=80)
    for seed in range(3):
        said = []
        settings = config(resolution=64, seed=seed, held_out_fraction=0.25)
        data = load_data(tmp_path, settings, log=said.append)
        (line,) = [line for line in said if "near copies" in line]
        assert "24 micrographs are near copies" in line
        assert all(f"{i}.jpg ~ {i}.tif" in line for i in range(10))
        assert "and 2 more groups" in line
        held_out = data.summary["held_out"]
        assert len(held_out) == 6
        assert len({name.split(".")[0] for name in held_out}) == 3
        assert data.identity["num_micrographs"] == 24
    _, again = said, []
    load_data(tmp_path, settings, log=again.append)
    assert again == said
    data = load_data(tmp_path, config(resolution=64, split="leaky"), log=said.append)
    assert "both sides of the leaky split show them" in said[-3] + said[-2] + said[-4]


def test_drifting_frames_of_a_series_stay_together(tmp_path, config):
    scene = texture(0, (400, 400))
    for i in range(6):
        frame = scene[10 * i : 10 * i + 256, 15 * i : 15 * i + 256].astype(float)
        frame += np.random.default_rng(i).normal(0, 20, frame.shape)
        PIL.Image.fromarray(stretch(frame)).save(tmp_path / f"Heat-1-Frame-{7 * i}.png")
    with pytest.raises(
        ValueError, match=r"All 6 micrographs .*show one scene.*--tiles\.split leaky"
    ):
        load_data(tmp_path, config(resolution=64), log=print)
    PIL.Image.fromarray(texture(1)).save(tmp_path / "other.png")
    said = []
    data = load_data(tmp_path, config(resolution=64), log=said.append)
    assert len(data.summary["held_out"]) in (1, 6)
    assert any("6 micrographs are near copies" in line for line in said)
    assert not any("look like frames" in line for line in said)


def test_specimens_that_share_a_near_copy_are_one(tmp_path, config):
    for specimen in "abc":
        (tmp_path / specimen).mkdir()
        image = texture(ord(specimen), (128, 128))
        PIL.Image.fromarray(image).save(tmp_path / specimen / "0.png")
    copy = compress(texture(ord("a"), (128, 128)))
    PIL.Image.fromarray(copy).save(tmp_path / "c" / "copy.png")
    data = load_data(tmp_path, config(resolution=64, split="specimen"), log=print)
    assert data.summary["held_out"] in (["b/0.png"], ["a/0.png", "c/0.png", "c/copy.png"])


def test_thousands_of_frames_of_one_scene_have_few_candidates():
    """Each is like all others: all pairs would fill the memory. Few link them all as well."""
    rng, num = np.random.default_rng(0), 1200
    wholes = rng.normal(size=(12, 12)) + 0.5 * rng.normal(size=(num, 12, 12))
    wholes = (wholes / np.linalg.norm(wholes, axis=(1, 2), keepdims=True)).astype(np.float32)
    candidates = list(_match_wholes([SimpleNamespace(whole=each) for each in wholes]))
    assert num < len(candidates) <= 64 * num
    assert all(i < j for i, j, *_ in candidates)
    groups = Groups(num)
    for i, j, *_ in candidates:
        groups.join(i, j)
    assert {groups.find(i) for i in range(num)} == {0}
    alike = [float((wholes[i] * wholes[j]).sum()) for i, j, *_ in candidates]
    np.testing.assert_allclose(alike, sorted(alike, reverse=True), atol=1e-5)
    few = [SimpleNamespace(whole=each) for each in wholes[:60]]
    assert len(list(_match_wholes(few))) == 60 * 59 // 2
