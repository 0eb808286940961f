"""The detector that is trained on labelled images: targets, augmentation, instances, matching."""

import numpy as np
import pytest
import torch

from em_data.config import DataConfig
from em_data.data import load_data
from em_data.micrograph import Defect
from em_evaluation.detector.augmentation import change_levels, distort, paste
from em_evaluation.detector.labelled import LabelledImage, cut_instances, draw_targets
from em_evaluation.detector.labelled_tiles import compare_kinds, list_labelled, parse_kinds
from em_evaluation.detector.matching import match, overlap_masks
from em_evaluation.detector.segmenter import SegmenterConfig, TrainingSet, separate, train_segmenter

TINY = SegmenterConfig(widths=(12, 24, 48), crop_px=32, num_steps=60)


def make_disc(centre, radius, kind="disc"):
    """Return a disc as a defect with its mask inside its box."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    x0, y0 = centre[0] - radius, centre[1] - radius
    side = 2 * radius + 1
    return Defect(kind, (x0, y0, x0 + side, y0 + side), y**2 + x**2 <= radius**2)


def make_image(seed, num=4, side=48):
    """Return noise with dark discs ("disc") and bright ones ("spot") that keep apart."""
    rng = np.random.default_rng(seed)
    image, defects = rng.normal(128, 6, (side, side)), []
    cells = [(x, y) for x in range(8, side - 7, 16) for y in range(8, side - 7, 16)]
    for i in rng.permutation(len(cells))[:num]:
        kind = ("disc", "spot")[rng.integers(2)]
        disc = make_disc(cells[i], int(rng.integers(4, 7)), kind)
        x0, y0, x1, y1 = disc.box_px
        image[y0:y1, x0:x1][disc.mask] += -50 if kind == "disc" else 50
        defects.append(disc)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return LabelledImage(pixels, defects, f"image {seed}", f"m{seed}", f"s{seed // 2}")


@pytest.fixture(scope="module")
def images():
    return [make_image(seed) for seed in range(12)]


def test_cores_of_touching_defects_do_not_touch():
    pair = [make_disc((10, 12), 5), make_disc((21, 12), 5)]
    targets = draw_targets((24, 32), pair, ["other", "disc"])
    masks, cores = targets[:2], targets[2:]
    assert not masks[0].any()
    assert not cores[0].any()
    assert masks[1].sum() == sum(each.mask.sum() for each in pair)
    found = separate("disc", masks[1], cores[1])
    assert len(found) == 2
    assert sorted(match(found, pair)) == [0, 1]
    assert min(overlap_masks(f, pair[i]) for f, i in zip(found, match(found, pair))) > 0.9


def test_a_mask_without_a_clear_core_is_no_defect():
    disc = make_disc((10, 10), 5)
    mask, core = draw_targets((20, 20), [disc], ["disc"])
    assert separate("disc", mask, 0.7 * core) == []
    (found,) = separate("disc", mask, 0.8 * core)
    assert found.box_px == disc.box_px
    assert np.array_equal(found.mask, disc.mask)
    assert found.metadata["score"] == pytest.approx(0.8)


def test_a_defect_counts_once_and_by_its_kind():
    true = [make_disc((10, 10), 5)]
    found = [make_disc((10, 10), 5), make_disc((11, 10), 5), make_disc((10, 10), 5, "spot")]
    for each, score in zip(found, (0.7, 0.9, 1.0)):
        each.metadata["score"] = score
    assert match(found, true).tolist() == [-1, 0, -1]  # the higher score of its kind first
    assert match(found, []).tolist() == [-1, -1, -1]


def test_pasted_instances_stand_on_clear_ground_with_their_masks(images):
    kinds = ["disc", "spot"]
    instances = cut_instances(images[0], kinds)
    rng = np.random.default_rng(0)
    crop = np.zeros((5, 40, 40), np.float32)
    crop[0] = 0.3
    before = np.sort([each.mask.sum() for each in instances])
    paste(crop, instances, rng)
    masks, cores = crop[1:3], crop[3:]
    assert masks.any()
    assert not (masks[0] * masks[1]).any()
    assert (cores <= masks).all()
    assert masks.sum() >= before[0]
    is_dark = crop[0] < 0.3 - 1
    assert np.mean(masks[0][is_dark]) > 0.9 if is_dark.any() else masks[1].any()


def test_strong_augmentation_keeps_masks_binary_and_levels_finite(images):
    stack = np.concatenate(
        [images[0].levels[None], draw_targets((48, 48), images[0].defects, ["disc", "spot"])]
    )
    batch = torch.from_numpy(stack)[None].repeat(16, 1, 1, 1)
    moved = distort(batch, torch.Generator().manual_seed(1))
    assert set(moved[:, 1:].unique().tolist()) == {0.0, 1.0}
    is_moved = (moved != batch).any(-1).any(-1).any(-1)
    assert 0 < is_moved.sum() < 16
    levels = change_levels(batch[:, :1], torch.Generator().manual_seed(1))
    assert levels.isfinite().all()
    assert levels.shape == (16, 1, 48, 48)


def test_training_depends_on_the_seed_alone(images):
    config = SegmenterConfig(widths=(4, 8), crop_px=32, num_steps=3)

    def train(seed):
        torch.rand(1)  # the global generator plays no part
        real, other = (
            TrainingSet.from_images(each, ("disc",)) for each in (images[:4], images[4:])
        )
        state = train_segmenter(real, ("disc",), config, synthetic=other, seed=seed)
        return torch.cat([each.flatten() for each in state.network.parameters()])

    assert torch.equal(train(0), train(0))
    assert not torch.equal(train(0), train(1))


def test_finds_most_defects_of_other_images(images):
    training = TrainingSet.from_images(images, ("disc", "spot")).select(range(10))
    segmenter = train_segmenter(training, ("disc", "spot"), TINY)
    num_true = num_found = num_right = 0
    for image in images[10:] + [make_image(seed) for seed in range(20, 26)]:
        found = segmenter.find(image)
        num_right += (match(found, image.defects) >= 0).sum()
        num_found, num_true = num_found + len(found), num_true + len(image.defects)
    assert num_right >= 0.85 * num_true
    assert num_right >= 0.85 * num_found


def test_refuses_to_train_on_nothing():
    with pytest.raises(ValueError, match="no labelled image"):
        train_segmenter(TrainingSet([], []), ("disc",), TINY)


def test_kinds_are_joined_and_left_out_by_name():
    known = ("dot", "line", "loop_100", "loop_111")
    words = ["loop=loop_111+loop_100", "dot"]
    assert parse_kinds(words, known) == {"loop_111": "loop", "loop_100": "loop", "dot": "dot"}
    assert parse_kinds((), known) == dict(zip(known, known))
    with pytest.raises(ValueError, match="no kind 'disc'"):
        parse_kinds(["disc"], known)
    with pytest.raises(ValueError, match="'dot' twice"):
        parse_kinds(["dot", "a=dot"], known)


def test_a_join_may_name_kinds_that_one_side_lacks():
    kinds = parse_kinds(["loop=hcloop+loop_100+loop_111"], ["hcloop", "line"])
    assert kinds == dict.fromkeys(("hcloop", "loop_100", "loop_111"), "loop")
    generated = {"the images": ["dot", "line", "loop_100"], "the pairs": ["loop"]}
    assert compare_kinds({**kinds, "loop_111": "disc"}, ["hcloop", "loop_111"], generated) == [
        "the micrographs have no loop_100",
        "the images have no hcloop or loop_111",
        "the images also have dot and line, which are not looked for",
        "the pairs have no loop_111",
    ]
    assert compare_kinds(kinds, ["hcloop", "line"], {}) == [
        "the micrographs have no loop_100 or loop_111"  # pairs may be made later
    ]
    with pytest.raises(ValueError, match=r"'loop_111', but no .* hcloop in the micrographs; "):
        compare_kinds(kinds, ["hcloop"], {"the images": ["loop_100"]})
    with pytest.raises(ValueError, match="no kind 'loop_100' or 'loop_111'"):
        parse_kinds(["loop=loop_100+loop_111"], ["hcloop"])


def test_lists_labelled_tiles_of_the_embedded_micrographs(tmp_path):
    tiles = {"resolution": 64, "micrograph_size": 128, "num_synthetic": 8, "split": "specimen"}
    config = DataConfig(**tiles, cache_dir=str(tmp_path))
    data = load_data("synthetic", config, log=lambda text: None)
    images = list_labelled(data.held_out, parse_kinds(["dot"], data.held_out.kinds))
    assert len(images) == data.held_out.num_tiles == 16
    assert len({each.micrograph for each in images}) == 4
    assert len({each.specimen for each in images}) == 1
    assert {defect.kind for each in images for defect in each.defects} == {"dot"}
    assert all(defect.mask.any() for each in images for defect in each.defects)
