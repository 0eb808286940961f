import numpy as np
import pytest
import torch

from em_data import from_uint, to_uint8, to_uint16
from em_data.intensity import describe_narrow, find_levels, float_to_uint16


@pytest.mark.parametrize(("dtype", "back"), [(np.uint8, to_uint8), (np.uint16, to_uint16)])
def test_every_grey_level_survives_the_round_trip(dtype, back):
    levels = np.arange(np.iinfo(dtype).max + 1, dtype=dtype)
    images = from_uint(levels)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() == 1
    assert torch.all(images.diff() > 0)
    assert np.array_equal(back(images), levels)


def test_levels_of_a_micrograph_become_minus_one_and_one():
    images = from_uint(np.array([[100, 300, 200, 50, 400]], np.uint16), 100, 300)
    assert torch.equal(images, torch.tensor([[-1.0, 1.0, 0.0, -1.0, 1.0]]))


def test_a_batch_with_levels_of_its_own_equals_image_by_image():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 65536, (300, 24, 24), dtype=np.uint16)  # more than one slab
    low, high = rng.integers(0, 1000, 300), rng.integers(30000, 65536, 300)
    first, last = (each[:, None, None].astype(np.float64) for each in (low, high))
    expected = np.clip(2 * (array - first) / (last - first) - 1, -1, 1)
    images = from_uint(array, low, high)
    np.testing.assert_allclose(images, expected, rtol=0, atol=3e-7)
    assert torch.equal(images[7], from_uint(array[7], low[7], high[7]))
    assert images.abs().max() <= 1


def test_values_outside_are_clamped_and_nan_is_refused():
    assert to_uint8(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]
    assert to_uint16(torch.tensor([-5.0, 5.0])).tolist() == [0, 65535]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))


def test_other_types_and_empty_ranges_are_refused():
    with pytest.raises(ValueError, match="uint8 or uint16"):
        from_uint(np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="constant"):
        from_uint(np.zeros((2, 3, 3), np.uint8), [0, 7], [9, 7])


def test_find_levels():
    image = np.arange(1000, dtype=np.uint16).reshape(25, 40)
    assert find_levels(image, "full") == (0, 65535, 0.0)
    assert find_levels(image, "auto") == (0, 999, 0.0)
    assert find_levels((image % 200).astype(np.uint8), "auto") == (0, 255, 0.0)
    low, high, clipped = find_levels(image, "percentile", (1, 99))
    assert (low, high) == (9, 989)
    assert clipped == pytest.approx(np.mean((image < low) | (image > high)), abs=1e-12)


def test_one_hot_pixel_is_clipped_by_percentiles_and_counted():
    image = np.random.default_rng(0).integers(100, 200, (100, 100), dtype=np.uint16)
    image[3, 4] = 65535
    low, high, clipped = find_levels(image, "percentile", (0.1, 99.9))
    assert 100 <= low < high < 200
    assert clipped > 0


def test_percentiles_of_a_nearly_constant_image_still_differ():
    image = np.full((100, 100), 7, np.uint8)
    image[0, 0] = 9
    assert find_levels(image, "percentile", (1, 99)) == (7, 9, 0.0)


HOT = {  # what an image of 1000 +- 100 gets: its spikes, and the number of pixels
    "one hot pixel": ({(30, 40): 65535}, 1),
    "one dead pixel": ({(30, 40): 0}, 1),
    "hot pixels in a corner and at an edge": ({(0, 0): 65535, (127, 60): 30000}, 2),
    "four hot pixels that touch": ({(i, j): 65535 for i in (9, 10) for j in (9, 10)}, 4),
    "an X-ray that spreads": (
        {(9, 9): 60000, (8, 9): 20000, (10, 9): 20000, (9, 8): 20000, (9, 10): 20000},
        5,
    ),
    "hot and dead pixels": ({(5, 5): 65535, (50, 50): 0, (90, 9): 40000, (91, 70): 9000}, 4),
}


def make_flat(spikes=(), shape=(128, 128)):
    image = np.random.default_rng(0).normal(1000, 100, shape).round()
    for position, value in dict(spikes).items():
        image[position] = value
    return image


@pytest.mark.parametrize("kind", HOT)
def test_spikes_are_found_and_do_not_take_the_contrast(kind):
    spikes, num = HOT[kind]
    image = make_flat(spikes).astype(np.uint16)
    low, high, clipped = find_levels(image, "auto")
    others = np.ma.array(image, mask=np.zeros(image.shape, bool))
    for position in spikes:
        others[position] = np.ma.masked
    assert (low, high) == (others.min(), others.max())
    assert clipped == num / image.size
    assert from_uint(image, low, high).std() > 0.2


def test_many_hot_pixels_are_all_found():
    image, rng = make_flat(shape=(512, 512)), np.random.default_rng(1)
    where = rng.choice(image.size, 500, replace=False)
    image.flat[where] = rng.uniform(5000, 65535, 500)
    low, high, clipped = find_levels(image.astype(np.uint16), "auto")
    assert (low, high) == (541, 1473)
    assert round(clipped * image.size) == 500


def draw_structure(kind):
    image = make_flat()
    rows, columns = np.indices(image.shape)
    if kind == "precipitates":
        for row, column in ((30, 30), (80, 100), (100, 20)):
            image[(rows - row) ** 2 + (columns - column) ** 2 < 9] = 50_000
    elif kind == "small square":
        image[60:63, 60:63] = 65_535
    elif kind == "thin line":
        image[60, 20:100] = 50_000
    elif kind == "saturated region":
        image[rows + columns > 200] = 65_535
    elif kind == "round peak":
        image += 50_000 * np.exp(-((rows - 60) ** 2 + (columns - 70) ** 2) / 2 / 1.5**2)
    elif kind == "bright noisy region":
        image[:20, :20] = np.random.default_rng(2).normal(40_000, 4000, (20, 20))
    return image.round().astype(np.uint16)


@pytest.mark.parametrize(
    "kind",
    [
        "precipitates",
        "small square",
        "thin line",
        "saturated region",
        "round peak",
        "bright noisy region",
    ],
)
def test_bright_structures_are_no_spikes(kind):
    image = draw_structure(kind)
    assert find_levels(image, "auto") == (image.min(), image.max(), 0.0)
    dark = 65535 - image
    assert find_levels(dark, "auto") == (dark.min(), dark.max(), 0.0)


NOISE = {
    "gaussian": lambda rng: rng.normal(1000, 100, (512, 512)),
    "few counts": lambda rng: rng.poisson(0.05, (512, 512)),
    "hardly any count": lambda rng: rng.poisson(0.0005, (512, 512)),
    "counts": lambda rng: rng.poisson(3, (512, 512)),
    "every level": lambda rng: rng.integers(0, 65536, (512, 512)),
    "two levels": lambda rng: 7 + 9 * (rng.random((512, 512)) < 1e-3),
}


@pytest.mark.parametrize("kind", NOISE)
def test_noise_has_no_spikes(kind):
    image = NOISE[kind](np.random.default_rng(0)).round().astype(np.uint16)
    assert find_levels(image, "auto") == (image.min(), image.max(), 0.0)


def test_spikes_of_a_tiny_or_nearly_constant_image_are_what_it_shows():
    image = np.full((100, 100), 7, np.uint16)
    image[50, 50] = 60_000
    assert find_levels(image, "auto") == (7, 60_000, 0.0)
    assert find_levels(image[48:52, 48:52], "auto") == (7, 60_000, 0.0)


@pytest.mark.parametrize("value", [1e9, -1e9, 3e38, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_outlier_leaves_a_float_image_all_16_bits(dtype, value):
    image = (make_flat() / 7).astype(dtype)
    kept = image.copy()
    image[20, 30] = value
    kept[20, 30] = kept.max() if value > 0 else kept.min()
    scaled, low, high, spikes = float_to_uint16(image)
    assert spikes.tolist() == [20 * 128 + 30]
    assert (low, high) == (kept.min(), kept.max())
    assert (scaled.min(), scaled.max()) == (0, 65535)
    step = (float(high) - float(low)) / 65535
    np.testing.assert_allclose(scaled * step + low, kept, rtol=0, atol=0.51 * step)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
def test_one_outlier_leaves_wide_integers_as_they_are(dtype):
    image = make_flat().astype(dtype)
    kept = image.copy()
    image[20, 30] = np.iinfo(dtype).max
    kept[20, 30] = kept.max()
    scaled, low, high, spikes = float_to_uint16(image)
    assert len(spikes) == 1
    assert np.array_equal(scaled, kept)
    assert (low, high) == (0, 65535)


def test_integers_with_more_digits_than_a_float_has_are_kept():
    image = make_flat().astype(np.int64)
    scaled, low, high, _ = float_to_uint16(image + 2**60)
    assert np.array_equal(scaled, image - image.min())
    assert (low, high) == (2.0**60 + image.min(), 2.0**60 + image.min() + 65535)
    scaled, *_ = float_to_uint16(image - 2**62)
    assert np.array_equal(scaled, image - image.min())


@pytest.mark.parametrize("largest", [1.7e308, 1e-300, 1e-320])
def test_values_at_the_ends_of_float64_are_scaled(largest):
    image = np.random.default_rng(0).uniform(-1, 1, (64, 64)) * largest
    scaled, low, high, spikes = float_to_uint16(image)
    assert (low, high, len(spikes)) == (image.min(), image.max(), 0)
    expected = (image / 2 - low / 2) / (high / 2 - low / 2) * 65535
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=0.51 if largest > 1e-310 else 33)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("size", [1e-308, 1.0, 1e300])
def test_spikes_of_either_sign_at_the_end_of_float64_take_no_contrast(sign, size):
    image = np.random.default_rng(0).uniform(-1, 1, (64, 64)) * size
    expected, *_ = float_to_uint16(image)
    spoiled = image.copy()
    spoiled[10, 20], spoiled[40, 50] = sign * 1e308, -sign * 1e308
    scaled, low, high, spikes = float_to_uint16(spoiled)
    assert list(spikes) == [10 * 64 + 20, 40 * 64 + 50]
    rest = np.delete(image.ravel(), spikes)
    assert (low, high) == (rest.min(), rest.max())
    np.testing.assert_allclose(np.delete(scaled, spikes), np.delete(expected, spikes), atol=40)
    assert sorted([scaled[10, 20], scaled[40, 50]]) == [0, 65535]


@pytest.mark.parametrize("sign", [-1, 1])
def test_two_levels_at_the_ends_of_float64_are_black_and_white(sign):
    is_white = np.random.default_rng(0).random((64, 64)) > 0.5
    scaled, *_ = float_to_uint16(np.where(is_white, sign * 1e308, -sign * 1e308))
    assert np.array_equal(scaled == 65535, is_white if sign > 0 else ~is_white)
    assert set(np.unique(scaled)) == {0, 65535}


def test_infinite_regions_are_refused():
    image = make_flat()
    image[:40] = np.inf
    with pytest.raises(ValueError, match="infinite"):
        float_to_uint16(image)


def test_float_image_is_scaled_to_16_bits_and_whole_numbers_are_kept():
    image = np.linspace(-0.3, 0.7, 12).reshape(3, 4)
    scaled, low, high, _ = float_to_uint16(image)
    assert (scaled.min(), scaled.max(), low, high) == (0, 65535, image.min(), image.max())
    np.testing.assert_allclose(scaled / 65535 * (high - low) + low, image, atol=1e-5)
    counts = np.array([[0, 17, 40000]], np.float32)
    kept, low, high, _ = float_to_uint16(counts)
    assert np.array_equal(kept, counts)
    assert (low, high) == (0, 65535)
    signed = np.array([[-32768, 5, 32767]], np.int16)
    shifted, low, high, _ = float_to_uint16(signed)
    assert np.array_equal(shifted, [[0, 32773, 65535]])
    assert (low, high) == (-32768, 32767)
    wide, low, high, _ = float_to_uint16(np.array([[5, 70_000, 140_005]], np.uint32))
    assert np.array_equal(wide, [[0, 32765, 65535]])
    assert (low, high) == (5, 140_005)


def test_a_dead_column_that_takes_the_contrast_is_said():
    image = np.random.default_rng(0).integers(1000, 3000, (256, 2000)).astype(np.uint16)
    assert describe_narrow(image, 1000, 2999) == []
    image[:, 700] = 65535
    (said,) = describe_narrow(image, 1000, 65535)
    assert "fill only 0.031 of the grey levels 1000 to 65535" in said
