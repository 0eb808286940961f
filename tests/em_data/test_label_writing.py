"""Labels of an image as polygons, COCO annotations, YOLO lines and masks, read back by others."""

import json

import numpy as np
import pytest
import torch
import yaml
from faster_coco_eval import COCO
from faster_coco_eval import mask as coco_mask
from scipy import ndimage
from torchvision.ops import masks_to_boxes

from em_data.labels.annotations import (
    draw_semantic_mask,
    make_annotation,
    make_yolo_index,
    make_yolo_lines,
)
from em_data.labels.masks import draw_instances, draw_whole_mask, fit_box
from em_data.labels.outlines import join_outlines, trace_outlines
from em_data.micrograph import Defect

SHAPE = (37, 52)


def random_masks(num=60, seed=0):
    """Blobs, noise, lines and rings, which touch borders and have holes and several pieces."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        shape = tuple(rng.integers(1, 30, 2))
        field = rng.random(shape)
        sigma = rng.choice([0, 1, 2])
        mask = ndimage.gaussian_filter(field, sigma) if sigma else field
        mask = mask >= np.quantile(mask, rng.uniform(0, 0.9))
        yield mask


def defect_of(mask, origin=(3, 5), kind="loop"):
    x, y = origin
    fitted = fit_box((x, y, x + mask.shape[1], y + mask.shape[0]), mask)
    return Defect(kind, *fitted)


def fill(polygon, shape):
    """The pixels whose centres are inside, by the even-odd rule."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    crossings = np.zeros(shape, int)
    for (x0, y0), (x1, y1) in zip(polygon, [*polygon[1:], polygon[0]]):
        if y0 != y1:
            passes = (y0 <= y) != (y1 <= y)
            crossings += passes & (x0 + (y - y0) * (x1 - x0) / (y1 - y0) < x)
    return crossings % 2 == 1


def test_outlines_enclose_the_mask_and_nothing_else():
    for mask in random_masks():
        outlines = trace_outlines(mask, (2, 1))
        padded = np.pad(mask, ((1, 9), (2, 9)))
        assert np.array_equal(fill(join_outlines(outlines), padded.shape), padded)
        count = np.sum([fill(outline, padded.shape) for outline in outlines], axis=0)
        assert np.array_equal(count % 2 == 1, padded)
        background = ~np.pad(mask, 1)
        holes = ndimage.label(background, np.ones((3, 3)))[1] - 1
        assert len(outlines) == ndimage.label(mask)[1] + holes


def test_an_outline_has_corners_only():
    mask = np.zeros((6, 7), bool)
    mask[1:5, 2:6] = True
    assert sorted(trace_outlines(mask)[0]) == [(2, 1), (2, 5), (6, 1), (6, 5)]
    assert trace_outlines(np.zeros((3, 3), bool)) == []
    assert len(trace_outlines(np.eye(3, dtype=bool))) == 3


def test_coco_is_read_back_to_the_bit(tmp_path):
    """Polygons and run lengths, by faster-coco-eval; boxes by torchvision."""
    defects = [
        defect_of(mask[: SHAPE[0] - 5, : SHAPE[1] - 3]) for mask in random_masks() if mask.any()
    ]
    annotations = [
        make_annotation(each, SHAPE, id=i, image_id=1, category_id=1)
        for i, each in enumerate(defects, start=1)
    ]
    assert 0.1 < np.mean([isinstance(a["segmentation"], list) for a in annotations]) < 0.9
    images = [{"id": 1, "file_name": "a.png", "height": SHAPE[0], "width": SHAPE[1]}]
    categories = [{"id": 1, "name": "loop"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    coco = COCO(str(tmp_path / "coco.json"))
    for defect, annotation in zip(defects, coco.loadAnns(coco.getAnnIds())):
        mask = draw_whole_mask(defect, SHAPE)
        assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)
        assert annotation["area"] == mask.sum() == coco_mask.area(coco.annToRLE(annotation))
        x0, y0, x1, y1 = masks_to_boxes(torch.from_numpy(mask)[None])[0].tolist()
        assert annotation["bbox"] == [x0, y0, x1 + 1 - x0, y1 + 1 - y0]


def test_a_box_alone_has_no_segmentation():
    annotation = make_annotation(Defect("dot", (1, 2, 5, 9)), SHAPE)
    assert annotation["segmentation"] == []
    assert (annotation["bbox"], annotation["area"]) == ([1, 2, 4, 7], 28)


def read_yolo(text, shape):
    """As ultralytics reads a file: if one line is a polygon, all are."""
    rows = [line.split() for line in text.splitlines()]
    numbers = [np.array(row[1:], float) for row in rows]
    scale = np.array([shape[1], shape[0]])
    if any(len(each) > 4 for each in numbers):
        return [(int(r[0]), n.reshape(-1, 2) * scale) for r, n in zip(rows, numbers)]
    boxes = [(n[:2] - n[2:] / 2, n[:2] + n[2:] / 2) for n in numbers]
    return [
        (int(r[0]), np.array([low, [high[0], low[1]], high, [low[0], high[1]]]) * scale)
        for r, (low, high) in zip(rows, boxes)
    ]


@pytest.mark.parametrize("with_masks", [True, False])
def test_yolo_is_read_back_to_the_bit(with_masks):
    kinds = ["line", "loop"]
    defects = [Defect("line", (4, 3, 20, 9)), Defect("loop", (0, 0, SHAPE[1], SHAPE[0]))]
    if with_masks:
        defects += [defect_of(each[:30, :40]) for each in random_masks(20) if each[:30, :40].any()]
    text = make_yolo_lines(defects, kinds, SHAPE)
    found = read_yolo(text, SHAPE)
    assert len(found) == len(defects)
    for (kind, polygon), defect in zip(found, defects):
        assert kinds[kind] == defect.kind
        assert 0 <= polygon.min() <= polygon.max() <= max(SHAPE) + 1e-6
        rounded = np.rint(polygon).astype(int).tolist()
        assert np.abs(polygon - rounded).max() < 1e-4
        assert np.array_equal(fill(rounded, SHAPE), draw_whole_mask(defect, SHAPE))
    assert make_yolo_lines([], kinds, SHAPE) == ""


def test_names_of_kinds_may_be_any_text():
    kinds = [
        "a: b",
        '"quoted" \\',
        "# no comment",
        "- 1",
        "yes",
        "Versetzung ½⟨111⟩ 🌀",
        "a'b",
        "{x}",
    ]
    index = yaml.safe_load(make_yolo_index(kinds, 0.5))
    assert index["names"] == dict(enumerate(kinds))
    assert (index["train"], index["val"], index["pixel_size_nm"]) == ("images", "images", 0.5)
    assert "pixel_size_nm" not in yaml.safe_load(make_yolo_index(kinds, None))


def test_masks_of_instances_and_kinds():
    kinds = ["dot", "loop"]
    defects = [Defect("loop", (0, 0, 6, 6)), Defect("dot", (4, 4, 8, 8))]
    instances = draw_instances(defects, (10, 10))
    semantic = draw_semantic_mask(defects, kinds, (10, 10))
    assert (instances.dtype, semantic.dtype) == (np.uint16, np.uint8)
    assert np.array_equal(np.unique(instances), [0, 1, 2])
    assert instances[5, 5] == 2  # later ones lie on top
    assert np.array_equal(semantic, np.array([0, 2, 1])[instances])
    many = [f"kind {i}" for i in range(300)]
    last = draw_semantic_mask([Defect("kind 299", (0, 0, 1, 1))], many, (2, 2))
    assert last[0, 0] == 300
