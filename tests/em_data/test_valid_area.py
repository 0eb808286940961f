import numpy as np
import pytest
import tifffile

from em_data import read_micrograph
from em_data.refusal import Refusal
from em_data.valid_area import find_largest_rectangle, mark_fill, remove_nan

RNG = np.random.default_rng(7)
VALUES = RNG.normal(size=(60, 80)).astype(np.float32)


def largest_by_trial(mask):
    """Return the area of the largest rectangle of True: every rectangle is tried."""
    height, width = mask.shape
    return max(
        (bottom - top) * (right - left)
        for top in range(height)
        for bottom in range(top, height + 1)
        for left in range(width)
        for right in range(left, width + 1)
        if mask[top:bottom, left:right].all()
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.9, 1.0])
def test_largest_rectangle_is_that_of_all_rectangles(share):
    for _ in range(6):
        mask = RNG.random((7, 9)) < share
        top, bottom, left, right = find_largest_rectangle(mask)
        assert mask[top:bottom, left:right].all()
        assert (bottom - top) * (right - left) == largest_by_trial(mask)


def test_borders_of_nan_are_cropped_and_said():
    image, notices = VALUES.copy(), []
    image[:5], image[:, -9:] = np.nan, np.nan
    cropped, corner = remove_nan(image, notices)
    assert np.array_equal(cropped, VALUES[5:, :-9])
    assert corner == (5, 0)
    assert notices == ["borders of NaN cropped: 55 x 71 of 60 x 80 pixels, from row 5 and column 0"]


def test_isolated_nan_becomes_the_median_around_it_and_the_rest_is_kept():
    image, notices = VALUES.copy(), []
    image[:5], image[30, 40] = np.nan, np.nan
    filled, _ = remove_nan(image, notices)
    around = np.delete(VALUES[28:33, 38:43].ravel(), 12)
    assert filled.shape == (55, 80)
    assert filled[25, 40] == np.median(around)
    filled[25, 40] = VALUES[30, 40]
    assert np.array_equal(filled, VALUES[5:])
    assert notices[0] == "1 isolated NaN pixels replaced by the median around them"


def test_image_of_mostly_nan_is_refused_with_the_share_that_is_left():
    image = VALUES.copy()
    image[:36] = np.nan
    with pytest.raises(Refusal, match=r"2880 pixels are NaN: the largest .* is 40 % of the image"):
        remove_nan(image, [])


def test_image_without_nan_is_not_copied():
    assert remove_nan(VALUES, [])[0] is VALUES


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(-9999, "float32"), (-3.4e38, "float32"), (1e30, "float64")]
    + [(-32768, "int16"), (-(2**31), "int32")],
)
def test_fill_values_become_nan_and_a_spike_does_not_hide_them(value, dtype):
    notices = []
    expected = (100 * VALUES).astype(dtype)
    expected[20, 30] = 30_000  # a spike
    image = expected.copy()
    image[:5] = value
    marked = mark_fill(image, notices)
    assert np.isnan(marked[:5]).all()
    assert np.array_equal(marked[5:], expected[5:])
    assert notices == [f"400 pixels have the fill value {value:.6g}: taken as NaN"]


def test_several_fill_values_become_nan():
    image, notices = VALUES.copy(), []
    image[:5], image[:, -4:] = -9999, 1e30
    marked = mark_fill(image, notices)
    assert np.isnan(marked[:5]).all()
    assert np.isnan(marked[:, -4:]).all()
    assert np.array_equal(marked[5:, :-4], VALUES[5:, :-4])
    assert len(notices) == 2


def test_an_image_that_would_lose_its_half_is_kept():
    image, notices = VALUES.copy(), []
    image[:, 20:45] = 65535
    assert mark_fill(image, notices) is image
    assert "1500 pixels have the fill value 65535, but the largest rectangle" in notices[0]
    assert "43.8 % of the image: kept" in notices[0]


@pytest.mark.parametrize("kind", ["two values", "saturated", "infinite", "dark ground", "too few"])
def test_values_that_belong_to_the_image_are_no_fill(kind):
    image = VALUES.astype(np.float64)
    if kind == "two values":
        image = (image > 0) * 1e6
    elif kind == "saturated":  # the edges of a bright particle have all values
        rows, columns = np.indices(image.shape)
        image += 1e4 * np.clip(20 - np.hypot(rows - 30, columns - 40), 0, 10)
    elif kind == "infinite":
        image[:5], image[5:20] = np.inf, -np.inf
    elif kind == "dark ground":
        image[:, :40] = -20
    else:
        image[0, 0] = image[0, 1] = -1e9
    notices = []
    assert mark_fill(image, notices) is image
    assert not notices


def test_a_file_with_fill_values_keeps_its_grey_levels(tmp_path):
    image = (1000 + 10 * VALUES).astype(np.float32)
    image[:, -9:] = -1e30
    tifffile.imwrite(tmp_path / "x.tif", image)
    read = read_micrograph(tmp_path / "x.tif")
    assert read.image.shape == (60, 71)
    kept = image[:, :71].astype(np.float64)
    expected = (kept - kept.min()) / (kept.max() - kept.min()) * 65535
    np.testing.assert_allclose(read.image, expected, atol=1)
    assert "540 pixels have the fill value -1e+30: taken as NaN" in read.metadata["notices"]
