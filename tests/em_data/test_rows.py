"""Rows of data sets: which column, which arrays, what is missing."""

import io
import re

import numpy as np
import PIL.Image
import pytest
from datasets import Array2D, Array3D, Dataset, Features, Image, List, Value

from em_data import load_data


def encode(image):
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def load(dataset, tmp_path, config, **changes):
    dataset.save_to_disk(tmp_path / "set")
    said = []
    data = load_data(tmp_path / "set", config(split="leaky", **changes), log=said.append)
    return data, said


def pixels_of(data):
    tiles = data.train.cut
    return tiles.tile(0)


def test_null_images_are_named_and_skipped(tmp_path, noise, config):
    images = [encode(noise(0)), None, encode(noise(1))]
    dataset = Dataset.from_dict({"image": images}, features=Features({"image": Image()}))
    data, said = load(dataset, tmp_path, config)
    assert data.summary["num_micrographs"] == 2
    assert any("row_000001: no image in this row (null)" in line for line in said)


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (["annotation", "image"], "image"),
        (["mask", "scan"], "scan"),
        (["seg", "label_image", "em"], "em"),
        (["annotation"], "annotation"),
        (["a", "b"], "a"),
    ],
)
def test_the_image_column_is_chosen_by_sense(tmp_path, noise, config, columns, chosen):
    images = {name: [noise(i), noise(i + 9)] for i, name in enumerate(columns)}
    rows = {name: [encode(image) for image in both] for name, both in images.items()}
    dataset = Dataset.from_dict(rows, features=Features({name: Image() for name in columns}))
    data, said = load(dataset, tmp_path, config)
    assert np.array_equal(pixels_of(data), images[chosen][0][:16, :16])
    if len(columns) > 1:  # a mask is a label; of several, one is used
        words = f"the images are in column {chosen}|labels from column (annotation|mask|seg)"
        assert any(re.search(words, line) for line in said)
        assert any("not used" in line for line in said) == (columns != ["a", "b"])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("form", ["2d", "1hw", "hw1", "hw3", "3hw", "list"])
def test_arrays_and_lists_are_images(tmp_path, noise, config, form, dtype):
    images = [noise(i, dtype=np.dtype(dtype)) for i in range(2)]
    height, width = images[0].shape
    feature, change = {
        "2d": (Array2D((height, width), dtype), lambda x: x),
        "1hw": (Array3D((1, height, width), dtype), lambda x: x[None]),
        "hw1": (Array3D((height, width, 1), dtype), lambda x: x[..., None]),
        "hw3": (Array3D((height, width, 3), dtype), lambda x: np.stack([x] * 3, -1)),
        "3hw": (Array3D((3, height, width), dtype), lambda x: np.stack([x] * 3)),
        "list": (List(List(Value(dtype))), lambda x: x.tolist()),
    }[form]
    rows = {"image": [change(image) for image in images]}
    data, _ = load(Dataset.from_dict(rows, features=Features({"image": feature})), tmp_path, config)
    assert pixels_of(data).dtype == dtype
    assert np.array_equal(pixels_of(data), images[0][:16, :16])


def test_arrays_that_are_no_images_are_refused_with_the_way_out(tmp_path, noise, config):
    frames = [np.stack([noise(i) for i in range(5)])] * 2
    feature = Features({"image": Array3D((5, 32, 48), "uint8")})
    with pytest.raises(ValueError, match=r"shape \[5, 32, 48\].*each frame in a row"):
        load(Dataset.from_dict({"image": frames}, features=feature), tmp_path, config)
    feature = Features({"image": List(List(Value("uint8")))})
    ragged = [[[1, 2], [3]], noise(0).tolist()]
    _, said = load(Dataset.from_dict({"image": ragged}, features=feature), tmp_path, config)
    assert any("row_000000: rows of different lengths" in line for line in said)


def test_pixel_sizes_that_are_null_or_nan_are_unknown(tmp_path, noise, config):
    sizes = [None, float("nan"), -1.0, 0.5]
    rows = {"image": [encode(noise(i)) for i in range(4)], "pixel_size_nm": sizes}
    data, _ = load(Dataset.from_dict(rows).cast_column("image", Image()), tmp_path, config)
    assert [each["pixel_size_nm"] for each in data.train.cut.micrographs] == [None] * 3 + [0.5]


def test_arrays_lose_rows_of_nan_as_files_do(tmp_path, noise, config):
    images = [noise(i).astype(np.float32) for i in range(2)]
    images[0][-3:] = np.nan
    feature = Features({"image": Array2D(images[0].shape, "float32")})
    _, said = load(Dataset.from_dict({"image": images}, features=feature), tmp_path, config)
    assert any("NaN" in each and "row_000000" in each for each in said)
    assert not any("cannot be used" in each for each in said)
