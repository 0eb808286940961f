import json

import numpy as np
import PIL.Image
import pytest

from em_data.labels import (
    draw_contact_sheet,
    draw_instance_mask,
    encode_runs,
    make_coco,
    write_labelled,
)
from em_data.micrograph import DEFECT_KINDS, Defect, Micrograph
from em_data.reading import read_micrograph
from em_data.synthetic import main
from em_data.synthetic_micrographs import synthesise_micrograph


def decode_runs(counts, shape):
    values = np.zeros(len(counts), dtype=bool)
    values[1::2] = True
    return np.repeat(values, counts).reshape(shape, order="F")


@pytest.mark.parametrize("fill", [0.0, 0.3, 1.0])
def test_runs_decode_to_the_mask(fill):
    mask = np.random.default_rng(0).random((7, 11)) < fill
    counts = encode_runs(mask)
    assert sum(counts) == 77
    assert np.array_equal(decode_runs(counts, mask.shape), mask)


def test_coco_holds_every_defect_whole():
    micrograph = synthesise_micrograph(1, size=96)
    coco = json.loads(json.dumps(make_coco([micrograph])))
    assert len(coco["annotations"]) == len(micrograph.defects) > 5
    names = {category["id"]: category["name"] for category in coco["categories"]}
    for annotation, defect in zip(coco["annotations"], micrograph.defects):
        x0, y0, x1, y1 = defect.box_px
        mask = decode_runs(annotation["segmentation"]["counts"], annotation["segmentation"]["size"])
        assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert np.array_equal(mask[y0:y1, x0:x1], defect.mask)
        assert annotation["area"] == mask.sum() == defect.mask.sum()
        assert names[annotation["category_id"]] == defect.kind


def test_a_later_defect_lies_above_an_earlier_one():
    whole = np.zeros((8, 8), dtype=bool)
    whole[1:3, 5:8] = True
    defects = [
        Defect("loop_111", (0, 0, 4, 4), np.ones((4, 4), dtype=bool)),
        Defect("dot", (2, 2, 5, 5), np.ones((3, 3), dtype=bool)),
        Defect("line", (5, 1, 8, 3), whole),  # a mask of the whole picture
        Defect("dot", (0, 6, 2, 8)),  # no mask: its box
    ]
    mask = draw_instance_mask(Micrograph(np.zeros((8, 8), dtype=np.uint8), "x", defects=defects))
    assert mask.dtype == np.uint16
    assert [int((mask == k).sum()) for k in range(5)] == [64 - 12 - 9 - 6 - 4, 12, 9, 6, 4]


def test_unlabelled_micrographs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="x has no labels"):
        write_labelled([Micrograph(np.zeros((8, 8), dtype=np.uint8), "x")], tmp_path)


def test_the_contact_sheet_shows_boxes_in_the_colour_of_their_kind():
    boxes = [(x, 20, x + 10, 30) for x in range(4, 74, 14)]
    defects = [Defect(kind, box) for kind, box in zip(DEFECT_KINDS, boxes)]
    image = np.full((64, 64), 90, dtype=np.uint8)
    micrographs = [Micrograph(image, str(i), defects=defects) for i in range(3)]
    sheet = draw_contact_sheet(micrographs)
    assert sheet.size == (128, 128)
    corners = [sheet.getpixel((4 + 14 * i, 20)) for i in range(4)]
    assert len(set(corners)) == 4
    assert sheet.getpixel((0, 0)) == (90, 90, 90)
    assert max(draw_contact_sheet(micrographs, max_side=50).size) <= 50


def test_the_command_writes_what_the_reader_reads(tmp_path, capsys):
    options = ["--num", "5", "--size", "64", "--seed", "2", "--pixel-size-nm", "0.8"]
    main([*options, "--out", str(tmp_path)])
    assert "5 micrographs" in capsys.readouterr().out
    coco = json.loads((tmp_path / "labels" / "coco.json").read_text())
    assert len({entry["specimen"] for entry in coco["images"]}) == 2
    for i, entry in enumerate(coco["images"]):
        made = synthesise_micrograph(2_000_000 + i, 64, 0.8)
        read = read_micrograph(tmp_path / "images" / entry["file_name"])
        assert np.array_equal(read.image, made.image)
        assert read.pixel_size_nm == pytest.approx(0.8)
        mask = np.asarray(PIL.Image.open(tmp_path / "masks" / entry["file_name"]))
        assert np.array_equal(mask, draw_instance_mask(made))
    assert (tmp_path / "labels" / "contact_sheet.png").stat().st_size > 1000


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--num", "0", "--out", str(tmp_path / "x")])
    assert "number of synthetic micrographs" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
