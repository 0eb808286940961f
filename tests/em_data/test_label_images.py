"""Masks are told from micrographs by their pixels."""

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
        (line,) = [line for line in said if "look like labels" in line]
        assert name in line
        assert line in data.summary["ignored"]


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
