"""Masks are told from micrographs by their pixels."""

import re

import numpy as np
import PIL.Image
import pytest

from em_data import load_data
from em_data.label_images import is_label_image


def draw_mask(num_levels, side=96):
    mask = np.zeros((side, side), np.uint8)
    for i in range(1, num_levels):
        row, column = divmod(i, 8)
        mask[12 * row + 1 : 12 * row + 9, 12 * column + 1 : 12 * column + 9] = i * (
            255 // (num_levels - 1)
        )
    return mask


@pytest.mark.parametrize(
    "name",
    [
        "mask_000.png",
        "em_000_mask_1.png",
        "em_000_seg.png",
        "label-000.png",
        "em_000_json/label.png",
        "em_000_instances.png",
        "em_000a.png",
    ],
)
@pytest.mark.parametrize("num_levels", [2, 5])
def test_masks_are_left_out_and_said(tmp_path, noise, config, name, num_levels):
    for i in range(3):
        PIL.Image.fromarray(noise(i, (96, 96))).save(tmp_path / f"em_00{i}.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    mask = PIL.Image.fromarray(draw_mask(num_levels))
    (mask.convert("1") if num_levels == 2 else mask).save(tmp_path / name)
    for _ in range(2):  # from the files, then from the cache
        said = []
        data = load_data(tmp_path, config(on_bad_image="fail"), log=said.append)
        assert data.summary["num_micrographs"] == 3
        # by its pixels, or first by a micrograph of its name and size
        words = "look like labels|are labels, by|labels from"
        (line,) = [line for line in said if re.search(words, line)]
        if line.startswith("labels from"):  # with a micrograph of its name
            assert data.summary["num_labelled_micrographs"] == 1
            assert sum(data.summary["kinds"].values()) == num_levels - 1
        else:
            assert name in line
            assert line in data.summary["ignored"]


@pytest.mark.parametrize(
    "name",
    [
        "em_000_seg",
        "seg_em_000",
        "em_000_mask_1",
        "mask-em_000",
        "em_000.gt_soft",
        "em_000_instances",
    ]
    + ["em_000_json/label", "segs/em_000", "instances_2/em_000_mask", "em_000_mask", "masks/em_000"]
    + ["labels/em_000"],
)
@pytest.mark.parametrize("folder", ["", "images/"])
def test_a_label_of_the_name_and_size_of_a_micrograph_is_never_one(
    tmp_path, noise, config, name, folder
):
    """Whatever its pixels: here those of a micrograph."""
    if "/" not in name or "json" in name:
        name = f"{folder}{name}"
    for i in range(3):
        path = tmp_path / folder / f"em_00{i}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(noise(i, (64, 96))).save(path)
    path = tmp_path / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    PIL.Image.fromarray(noise(7, (64, 96))).save(path)
    said = []
    data = load_data(tmp_path, config(), log=said.append)
    assert data.summary["num_micrographs"] == 3
    used, found = [line for line in said if "labels" in line]
    assert re.search(r"em_000.png: labels not used: the mask (has 255 grey|uses all 255)", used)
    form = r"\(masks of (kinds|instances), 1 images\)"
    assert re.match(rf"labels from .* {form}: 0 of 3 micrographs, 0 defects", found)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("em_000_seg", (64, 64)), ("em_009_seg", (64, 96)), ("segs/em_009", (64, 96))],
)
def test_an_image_without_a_pair_of_its_size_is_read(tmp_path, noise, config, name, shape):
    for i in range(3):
        PIL.Image.fromarray(noise(i, (64, 96))).save(tmp_path / f"em_00{i}.png")
    path = tmp_path / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    PIL.Image.fromarray(noise(7, shape)).save(path)
    assert load_data(tmp_path, config(), log=print).summary["num_micrographs"] == 4


def test_folder_of_masks_only_is_refused_by_that_name(tmp_path, config):
    for i in range(2):
        PIL.Image.fromarray(draw_mask(3 + i)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"2 images that look like labels(?s:.*)Nothing is left"):
        load_data(tmp_path, config(), log=print)


def test_instances_need_a_word_and_micrographs_of_few_levels_are_kept(noise):
    mask = np.kron(np.random.default_rng(0).permutation(64).reshape(8, 8), np.ones((32, 32), int))
    mask = mask.astype(np.uint16)
    assert is_label_image(mask, "a/em_000_instances.png")
    assert is_label_image(mask, "masks of em_000/0.png")
    assert not is_label_image(mask, "unmasked/em_000.png")
    assert not is_label_image(noise(0, (64, 64)) // 64, "mask_000.png")
    assert is_label_image(noise(0, (64, 64)) // 128, "em_000.png")
