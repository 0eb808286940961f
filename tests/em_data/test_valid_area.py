import numpy as np
import pytest

from em_data.refusal import Refusal
from em_data.valid_area import find_largest_rectangle, remove_nan

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
