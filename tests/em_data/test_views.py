import itertools

import numpy as np
import pytest

from em_data.views import ELEMENTS, SYMMETRIES, apply_symmetry

TWINS = {
    "identity": lambda image: image,
    "turn_90": lambda image: np.rot90(image, 1),
    "turn_180": lambda image: np.rot90(image, 2),
    "turn_270": lambda image: np.rot90(image, 3),
    "flip_columns": np.fliplr,
    "flip_rows": np.flipud,
    "transpose": np.transpose,
    "anti_transpose": lambda image: np.rot90(np.transpose(image), 2),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_view_equals_its_slow_twin(name):
    image = np.arange(5 * 7).reshape(5, 7)
    assert np.array_equal(apply_symmetry(image, name), TWINS[name](image))


def test_view_of_a_batch_is_the_view_of_each_image():
    batch = np.random.default_rng(0).integers(0, 255, (3, 4, 4))
    for name in ELEMENTS:
        views = [apply_symmetry(image, name) for image in batch]
        assert np.array_equal(apply_symmetry(batch, name), views)


def test_elements_form_the_group_of_the_square():
    image = np.arange(9).reshape(3, 3)
    tables = {apply_symmetry(image, name).tobytes(): name for name in ELEMENTS}
    assert len(tables) == 8  # all different
    for first, second in itertools.product(ELEMENTS, repeat=2):  # closed under composition
        assert apply_symmetry(apply_symmetry(image, first), second).tobytes() in tables
    for name in ELEMENTS:  # each has an inverse
        images = [apply_symmetry(apply_symmetry(image, name), other) for other in ELEMENTS]
        assert sum(np.array_equal(each, image) for each in images) == 1


def test_paper_has_identity_three_turns_and_two_flips():
    turns, flips = ("turn_90", "turn_180", "turn_270"), ("flip_columns", "flip_rows")
    assert SYMMETRIES["paper"] == ("identity", *turns, *flips)
    assert len(SYMMETRIES["d4"]) == 8
    assert SYMMETRIES["none"] == ("identity",)
