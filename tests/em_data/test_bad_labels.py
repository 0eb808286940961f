"""Bad labels: a clear word for each, nothing dropped in silence, nothing guessed."""

import json
import re

import numpy as np
import PIL.Image
import pytest

from em_data import DataConfig, load_data
from em_data.labels import encode_runs, read_coco
from em_data.sources import open_source

SHAPE = (48, 64)
NAMES = ("a", "b", "c")
BOX = {"bbox": [4, 5, 10, 8]}


def save(pixels, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path, **options)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def coco(*annotations, **changes):
    """Write COCO labels of image a; each annotation has a number and category 1."""

    def make(folder):
        content = {
            "images": [{"id": 1, "file_name": "a.png", "height": SHAPE[0], "width": SHAPE[1]}],
            "categories": [{"id": 1, "name": "void"}],
            "annotations": [
                {"id": i, "image_id": 1, "category_id": 1} | each
                for i, each in enumerate(annotations)
            ],
        }
        write(folder / "coco.json", content | changes)

    return make


def polygon(*points, **more):
    return {"segmentation": [[coordinate for point in points for coordinate in point]]} | more


def runs(mask, size=SHAPE):
    return {"segmentation": {"size": list(size), "counts": encode_runs(mask)}}


def yolo(*lines):
    return lambda folder: write(folder / "labels" / "a.txt", "\n".join(lines) + "\n")


def mask(pixels, name="masks/a.png", **options):
    return lambda folder: save(pixels, folder / name, **options)


def table(text):
    return lambda folder: write(folder / "metadata.csv", text)


def jsonl(**row):
    return lambda folder: write(folder / "metadata.jsonl", json.dumps({"file_name": "a.png"} | row))


def both(*writers):
    return lambda folder: [each(folder) for each in writers]


FULL = np.ones(SHAPE, bool)
HALF = np.pad(np.ones((20, 20), np.uint8), ((0, 28), (0, 44)))
COLOURS = np.random.default_rng(0).integers(0, 255, (*SHAPE, 3), np.uint8)
SMOOTH = np.tile(np.arange(64, dtype=np.uint8), (48, 1)) // 2 * (np.indices(SHAPE)[0] % 2 == 0)
FULL_8_BITS = np.kron(np.arange(256, dtype=np.uint8).reshape(16, 16), np.ones((3, 4), np.uint8))
SQUARE = ((4, 5), (14, 5), (14, 13), (4, 13))
IMAGE = {"id": 1, "file_name": "a.png", "height": SHAPE[0], "width": SHAPE[1]}

# name: (what writes the labels, number of defects of image a or None without labels, a sentence)
BAD = {
    "a polygon that ends one pixel beyond": (
        coco(polygon((0, 0), (65, 0), (65, 49), (0, 49))),
        1,
        r"labels .*: 1 of 3 micrographs, 1 def",
    ),
    "a polygon far beyond the image": (
        coco(polygon((-9, 0), (20, 0), (20, 9), (-9, 9))),
        1,
        r"1 of 1 labels reach beyond the image",
    ),
    "a box beyond the image": (
        coco({"bbox": [50, 40, 30, 30]}),
        1,
        r"a.png: 1 of 1 labels reach beyond .* cut off",
    ),
    "a box outside of the image": (
        coco({"bbox": [70, 5, 10, 10]}, BOX),
        1,
        r"1 of 2 labels not used: they lie outside .*48 x 64",
    ),
    "an annotation without a shape": (
        coco({}, BOX),
        1,
        r"1 of 2 labels not used: they have neither a box nor an outline",
    ),
    "no annotations": (coco(), 0, r"1 of 3 micrographs, 0 defects"),
    "a polygon of two points": (
        coco(polygon((1, 1), (5, 5)), BOX),
        1,
        r"1 of 2 labels not used: they have no area",
    ),
    "a polygon thinner than a pixel": (
        coco(polygon((4.6, 4.6), (20.6, 4.6), (20.6, 4.7))),
        1,
        r"1 of 1 labels thinner than a pixel",
    ),
    "a polygon of an odd number of numbers": (
        coco({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}),
        None,
        r"annotation 0: a polygon of 7 numbers",
    ),
    "a box without area": (
        coco({"bbox": [4, 4, 0, 9]}),
        0,
        r"1 of 1 labels not used: they have no area",
    ),
    "reversed corners": (
        coco({"bbox": [14, 13, -10, -8]}),
        1,
        r"1 of 1 labels turned round: their corners",
    ),
    "a coordinate that is no number": (
        coco({"bbox": [float("nan"), 4, 5, 5]}),
        None,
        r"annotation 0 has a coordinate that is no num",
    ),
    "a coordinate that is a text": (
        coco({"bbox": ["left", 4, 5, 5]}),
        None,
        r"annotation 0 has no readable box or segmentation",
    ),
    "an unknown category": (
        coco(BOX | {"category_id": 7}),
        None,
        r"has the category 7, which coco.json does not name",
    ),
    "a category without a name": (
        coco(BOX, categories=[{"id": 1, "name": " "}]),
        ValueError,
        r"coco.json: category 1 has the name",
    ),
    "a crowd": (coco(BOX | {"iscrowd": 1}), 1, r"1 labels are crowds \(iscrowd\)"),
    "run lengths of another sum": (
        coco({"segmentation": {"size": SHAPE, "counts": [5, 6]}}),
        None,
        r"run lengths of 11 pixels",
    ),
    "compressed run lengths of another sum": (
        coco({"segmentation": {"size": SHAPE, "counts": "56"}}),
        None,
        r"compressed run lengths do not",
    ),
    "a mask of another size than its image": (
        coco(runs(np.ones((9, 9), bool), (9, 9))),
        None,
        r"annotation 0 has a mask of 9 x 9 pixels",
    ),
    "an empty mask": (coco(runs(~FULL)), 0, r"1 of 1 labels not used: their masks are empty"),
    "an image of another size": (
        coco(BOX, images=[IMAGE | {"width": 99}]),
        None,
        r"they are of an image of 48 x 99 pixels, but",
    ),
    "annotation ids that occur twice": (
        coco(BOX | {"id": 4}, BOX | {"id": 4}),
        2,
        r"annotation ids occur twice, all are used: 4",
    ),
    "image ids that occur twice": (
        coco(BOX, images=[IMAGE, IMAGE | {"file_name": "b.png"}]),
        ValueError,
        r"coco.json: image ids occur twice: 1.*--tiles.labels none",
    ),
    "an image with two entries": (
        coco(BOX, images=[IMAGE, IMAGE | {"id": 2}]),
        ValueError,
        r"a.png has two entries among the im",
    ),
    "an annotation of an unknown image": (
        coco(BOX | {"image_id": 9}),
        0,
        r"1 annotations of images that it does not list .*image_id 9",
    ),
    "labels of an image that is not there": (
        coco(BOX, images=[IMAGE, IMAGE | {"id": 2, "file_name": "gone.png"}]),
        1,
        r"1 images of coco.json are not in the folder: gone.png",
    ),
    "a damaged file": (
        lambda folder: write(folder / "x.json", '{"images": [], "annotations": ['),
        ValueError,
        r"x.json: it cannot be read .*--tiles.labels none",
    ),
    "a file that is not in COCO's form": (
        coco(BOX, images=[{"file_name": "a.png"}]),
        ValueError,
        r"it is not in COCO's form .*'id'",
    ),
    "a huge file": (
        lambda folder: write(folder / "x.json", '{"images": [], "annotations": []}' + " " * 10**6),
        ValueError,
        r"x.json: .* GB, more than the .* split it by images",
    ),
    "two files that label one image": (
        both(coco(BOX), lambda f: write(f / "b.json", (f / "coco.json").read_text())),
        ValueError,
        r"b.json and coco.json both label a.png. Choose one with --tiles.labels",
    ),
    "LabelMe": (
        lambda folder: write(folder / "a.json", {"shapes": [], "imagePath": "a.png"}),
        None,
        r"1 LabelMe files: labels in this form are not read. Export them as COCO",
    ),
    "YOLO of pixels": (yolo("0 30 20 10 9"), None, r"line 1 has the value 30, but .* 0 to 1"),
    "YOLO of predictions": (
        yolo("0 .5 .5 .1 .1 .9"),
        None,
        r"line 1 has 6 numbers: a box with a confidence",
    ),
    "YOLO with a class of no name": (
        both(yolo("7 .5 .5 .1 .1"), lambda folder: write(folder / "classes.txt", "void\nloop")),
        None,
        r"line 1 has the class 7, but the file of names has 0 to 1",
    ),
    "YOLO of no number": (
        yolo("0 nan .5 .1 .1"),
        None,
        r"line 1 has a coordinate that is no number",
    ),
    "a YOLO file without an image": (
        both(yolo("0 .5 .5 .1 .1"), lambda f: write(f / "labels" / "z.txt", "0 .5 .5 .1 .1")),
        1,
        r"1 label files of labels/ have no image: labels/z.txt",
    ),
    "names that cannot be read": (
        both(yolo("0 .5 .5 .1 .1"), lambda f: write(f / "data.yaml", "names: [")),
        ValueError,
        r"data.yaml names the kinds of labels, but it cannot be read",
    ),
    "a mask image of another size": (
        mask(HALF[:40]),
        None,
        r"they are of an image of 40 x 64 pixels, but the image has 48 x 64",
    ),
    "a mask of many colours": (mask(COLOURS), None, r"the mask has 30\d\d colours"),
    "a mask with smoothed edges": (
        mask(SMOOTH),
        None,
        r"the mask has 31 grey levels, but at most 16",
    ),
    "a JPEG mask": (mask(HALF, "masks/a.jpg"), None, r"the mask is a JPEG, which blurs"),
    "a mask of 16 bits cut to 8": (
        mask(FULL_8_BITS),
        None,
        r"the mask uses all 255 numbers of 8 bits",
    ),
    "a damaged mask": (
        both(mask(HALF), lambda f: (f / "masks/a.png").write_bytes(b"\x89PNG")),
        None,
        r"the mask cannot be read .* Copy it again",
    ),
    "a mask without an image": (
        both(mask(HALF), mask(HALF, "masks/z.png")),
        1,
        r"1 masks of masks/ have no image: masks/z.png",
    ),
    "objects without a kind": (
        jsonl(objects={"bbox": [[1, 2, 3, 4]]}),
        None,
        r"object 1 needs a bbox and a category",
    ),
    "objects of different lengths": (
        jsonl(objects={"bbox": [[1, 2, 3, 4]], "category": [0, 1]}),
        None,
        r"have different lengths",
    ),
    "objects that are null": (jsonl(objects=None), None, r"objects is null. Write an empty list"),
    "a table that is damaged": (
        lambda folder: write(folder / "metadata.jsonl", '{"file_name": '),
        ValueError,
        r"metadata.jsonl cannot be read .*--tiles.classes none",
    ),
    "a class that is a measurement": (
        table("file_name,label\na.png,0.5\nb.png,1.5\n"),
        None,
        r"not used as the class: 0.5 is no name",
    ),
    "a class for each image": (
        table("file_name,label\na.png,x\nb.png,y\nc.png,z\n"),
        None,
        r"each of its 3 values stands at one",
    ),
    "two rows of one image": (
        table("file_name,label\na.png,x\na.png,y\nb.png,x\n"),
        None,
        r"metadata.csv: a.png has two rows",
    ),
    "a row without an image": (
        table("file_name,label\na.png,x\ngone.png,y\nb.png,x\n"),
        None,
        r"1 rows of .* have no image: gone",
    ),
    "a class that only one side has": (
        table("file_name,label\na.png,x\nb.png,y\nc.png,y\n"),
        None,
        r"classes only in training: [xy]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_labels_get_a_clear_word(tmp_path, noise, config, monkeypatch, case):
    write_labels, expected, sentence = BAD[case]
    folder, said = tmp_path / "data", []
    for name in NAMES:
        save(noise(ord(name), SHAPE), folder / f"{name}.png")
    write_labels(folder)
    monkeypatch.setattr(read_coco, "MAX_BYTES", 10**5)
    if expected is ValueError:
        with pytest.raises(ValueError, match=sentence):
            load_data(folder, config(), log=said.append)
        load_data(folder, config(labels="none", classes="none"), log=said.append)
        return
    data = load_data(folder, config(), log=said.append)
    assert any(re.search(sentence, line) for line in said), said
    assert data.summary["num_micrographs"] == 3
    counts = {each["name"]: each["defects"] for each in data.train.cut.micrographs}
    assert counts["b.png"] is counts["c.png"] is None
    if expected is None:
        assert counts["a.png"] is None
    else:
        assert sum(counts["a.png"].values()) == expected


def test_bad_labels_fail_if_bad_images_do(tmp_path, noise, config):
    folder = tmp_path / "data"
    for name in NAMES:
        save(noise(ord(name), SHAPE), folder / f"{name}.png")
    yolo("0 30 20 10 9")(folder)
    message = r"a.png: its labels in labels/: line 1 has the value 30"
    with pytest.raises(ValueError, match=message):
        load_data(folder, config(on_bad_image="fail"), log=lambda _: None)


def list_places(content, place=()):
    """Yield the keys that lead to each value inside of lists and dictionaries."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*place, key)
        if isinstance(value, dict | list):
            yield from list_places(value, (*place, key))


def test_one_wrong_value_never_ends_in_another_error(tmp_path, noise):
    """A wrong value anywhere in a COCO file: a word about it, or it does not matter."""
    folder = tmp_path / "data"
    for name in "ab":
        save(noise(ord(name), SHAPE), folder / f"{name}.png")
    coco(BOX, polygon(*SQUARE, attributes={"a": 1}, diameter_nm=2.0), runs(FULL))(folder)
    content = json.loads((folder / "coco.json").read_text())
    content["annotations"][2]["segmentation"]["counts"] = [0, FULL.size]
    wrong = [None, "x", -1, float("inf"), [], {}, [[]], [None], "", 2**70, {"a": 1}]
    num = 0
    for i, place in enumerate(list_places(content)):
        for value in (wrong[i % len(wrong)], wrong[(5 * i + 3) % len(wrong)]):
            changed = json.loads(json.dumps(content))
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            write(folder / "coco.json", changed)
            said = "coco.json: ... --tiles.labels none"
            try:
                source = open_source(folder, DataConfig(), tmp_path / "cache")
                num_read = len([entry.read() for entry in source.entries])
            except ValueError as error:
                num_read, said = 2, str(error)
            assert num_read == 2
            assert re.search(r"coco\.json: .*--tiles\.labels none", said)
            num += 1
    assert num > 90
