import io

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
import pytest

from em_data import read_micrograph
from em_data.label_bar import find_label_bar


def make_micrograph(height=480, width=640, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    noise = PIL.Image.fromarray(levels)
    smooth = np.asarray(noise.filter(PIL.ImageFilter.GaussianBlur(3)), np.float32)
    return np.clip((smooth - 128) * 6 + 128, 0, 255).astype(np.uint8)


def add_bar(image, num_rows, ground, ink, line=False):
    bar = PIL.Image.new("L", (image.shape[1], num_rows), ground)
    draw = PIL.ImageDraw.Draw(bar)
    draw.text((10, num_rows // 3), "HV 15.0 kV  mag 20 000 x  WD 5.1 mm   det ETD", fill=ink)
    width, middle = image.shape[1], num_rows // 2
    draw.rectangle((width - 220, middle, width - 40, middle + 4), fill=ink)
    if line:
        draw.line((0, 0, width, 0), fill=ink, width=2)
        draw.line((width // 2, 0, width // 2, num_rows), fill=ink, width=2)
    return np.vstack([image, np.asarray(bar)])


@pytest.mark.parametrize("num_rows", [16, 32, 60])
@pytest.mark.parametrize(
    ("ground", "ink", "line"), [(0, 255, False), (255, 0, False), (0, 255, True), (128, 255, True)]
)
def test_bar_is_found_to_the_row(num_rows, ground, ink, line):
    image = make_micrograph(seed=num_rows)
    assert find_label_bar(add_bar(image, num_rows, ground, ink, line)) == num_rows
    wide = add_bar(image, num_rows, ground, ink, line).astype(np.uint16) * 257
    assert find_label_bar(wide) == num_rows


def save_as_jpeg(image, quality):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.array(PIL.Image.open(buffer))


@pytest.mark.parametrize("quality", [60, 75, 85, 92, 98])
@pytest.mark.parametrize(
    ("ground", "ink", "line"),
    [(0, 255, False), (255, 0, False), (0, 255, True), (128, 255, True), (60, 230, True)],
)
def test_bar_in_a_jpeg_is_found_at_any_row(ground, ink, line, quality):
    for height in range(480, 488):  # blocks of JPEG compression have 8 rows
        for num_rows in (24, 43, 64):
            image = add_bar(make_micrograph(height), num_rows, ground, ink, line)
            found = find_label_bar(save_as_jpeg(image, quality))
            assert abs(found - num_rows) <= 1, (height, num_rows)


@pytest.mark.parametrize("quality", [60, 75, 90])
def test_bar_of_an_fei_jpeg_does_not_become_tiles(quality):
    image = add_bar(make_micrograph(884, 1024), 59, 0, 255, line=True)
    assert abs(find_label_bar(save_as_jpeg(image, quality)) - 59) <= 1


@pytest.mark.parametrize("quality", [60, 75, 90])
def test_no_bar_is_seen_in_a_jpeg_without_one(quality):
    for seed in range(10):
        image = make_micrograph(400 + seed, seed=seed)
        rows, columns = np.indices(image.shape)
        for dark in (image, np.minimum(image, 120), np.maximum(image, 180)):
            assert find_label_bar(save_as_jpeg(dark, quality)) == 0
        image[rows > 330 + 20 * np.sin(columns / 40)] = 0
        assert find_label_bar(save_as_jpeg(image, quality)) == 0


def test_no_bar_is_seen_where_there_is_none():
    image = make_micrograph()
    assert find_label_bar(image) == 0
    assert find_label_bar(np.minimum(image, 120)) == 0  # saturated here and there
    dark = image.copy()
    rows, columns = np.indices(dark.shape)
    # the edge of a specimen: dark below, but not straight
    dark[rows > 380 + 30 * np.sin(columns / 40)] = 0
    assert find_label_bar(dark) == 0
    assert find_label_bar(np.zeros((300, 300), np.uint8)) == 0
    two_grains = image.copy()
    two_grains[400:] //= 2  # a straight edge, but no flat ground
    assert find_label_bar(two_grains) == 0


def test_bar_is_cropped_kept_or_refused_by_name(tmp_path):
    image = make_micrograph()
    PIL.Image.fromarray(add_bar(image, 32, 0, 255)).save(tmp_path / "sem.png")
    cropped = read_micrograph(tmp_path / "sem.png")
    assert np.array_equal(cropped.image, image)
    assert any("32 rows" in notice for notice in cropped.metadata["notices"])
    assert read_micrograph(tmp_path / "sem.png", label_bar="keep").image.shape == (512, 640)
    with pytest.raises(ValueError, match=r"sem\.png: a label bar of 32 rows"):
        read_micrograph(tmp_path / "sem.png", label_bar="refuse")
