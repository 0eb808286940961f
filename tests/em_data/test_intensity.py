import numpy as np
import pytest
import torch

from em_data import from_uint, to_uint8, to_uint16
from em_data.intensity import find_levels, float_to_uint16


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


def test_float_image_is_scaled_to_16_bits_and_whole_numbers_are_kept():
    image = np.linspace(-0.3, 0.7, 12).reshape(3, 4)
    scaled, low, high = float_to_uint16(image)
    assert (scaled.min(), scaled.max(), low, high) == (0, 65535, image.min(), image.max())
    np.testing.assert_allclose(scaled / 65535 * (high - low) + low, image, atol=1e-5)
    counts = np.array([[0, 17, 40000]], np.float32)
    kept, low, high = float_to_uint16(counts)
    assert np.array_equal(kept, counts)
    assert (low, high) == (0, 65535)
    signed = np.array([[-32768, 5, 32767]], np.int16)
    shifted, low, high = float_to_uint16(signed)
    assert np.array_equal(shifted, [[0, 32773, 65535]])
    assert (low, high) == (-32768, 32767)
    wide, low, high = float_to_uint16(np.array([[5, 70_000, 140_005]], np.uint32))
    assert np.array_equal(wide, [[0, 32765, 65535]])
    assert (low, high) == (5, 140_005)
