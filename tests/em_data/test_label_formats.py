"""Labels are read in the layouts that people use, and a sentence says what was found."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from faster_coco_eval.core import mask as mask_of

from em_data import load_data
from em_data.labels import encode_runs
from em_data.labels.placing import fill_polygon
from em_data.micrograph import IS_CUT
from em_data.sources import open_source

SHAPE = (48, 64)
BOXES = {"void": [(2, 3, 10, 12), (20, 5, 26, 9)], "loop": [(30, 20, 50, 40)]}


def draw_truth():
    """Return {kind: mask}; void fills its boxes, and a loop is a triangle."""
    void, loop = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    for x0, y0, x1, y1 in BOXES["void"]:
        void[y0:y1, x0:x1] = True
    loop[20:40, 30:50] = np.tril(np.ones((20, 20), bool))
    return {"loop": loop, "void": void}


def list_polygons(box, kind):
    x0, y0, x1, y1 = box
    corners = [x0, y0, x1, y0, x1, y1, x0, y1]
    # a pixel's centre on the diagonal is inside
    return [[x0, y0 - 0.5, x1 + 0.5, y1, x0, y1]] if kind == "loop" else [corners]


@pytest.fixture
def folder(tmp_path, noise):
    """Three images: the first has labels, the second has none inside, the third is not labelled."""
    folder = tmp_path / "data"
    for name in "abc":
        save(noise(ord(name), SHAPE), folder / "images" / f"{name}.png")
    return folder


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def read(folder, config):
    source = open_source(folder, config, folder.parent / "cache")
    return source, [entry.read() for entry in source.entries]


def draw(micrograph):
    masks = {}
    for each in micrograph.defects:
        mask = masks.setdefault(each.kind, np.zeros(micrograph.image.shape, bool))
        x0, y0, x1, y1 = each.box_px
        mask[y0:y1, x0:x1] |= True if each.mask is None else each.mask
    return masks


def assert_truth(micrographs, truth=None):
    first, second, third = micrographs
    drawn = draw(first)
    for kind, mask in (truth or draw_truth()).items():
        assert np.array_equal(drawn.pop(kind), mask), kind
    assert not drawn
    assert second.defects == []
    assert third.defects is None


def compress(mask):
    runs = mask_of.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": runs["counts"].decode()}


def make_coco(form):
    coco = {
        "images": [
            {"id": i, "file_name": f"{name}.png", "height": SHAPE[0], "width": SHAPE[1]}
            for i, name in enumerate("ab", 5)
        ],
        "categories": [{"id": 3, "name": "void"}, {"id": 9, "name": "loop"}],
        "annotations": [],
    }
    for kind, category in (("void", 3), ("loop", 9)):
        for box in BOXES[kind]:
            x0, y0, x1, y1 = box
            mask = np.zeros(SHAPE, bool)
            mask[y0:y1, x0:x1] = draw_truth()[kind][y0:y1, x0:x1]
            segmentation = {
                "polygons": lambda box=box, kind=kind: list_polygons(box, kind),
                "one polygon": lambda box=box, kind=kind: list_polygons(box, kind)[0],
                "run lengths": lambda mask=mask: {"size": SHAPE, "counts": encode_runs(mask)},
                "compressed": lambda mask=mask: compress(mask),
                "boxes": lambda: None,
            }[form]()
            annotation = {"id": len(coco["annotations"]), "image_id": 5, "category_id": category}
            annotation |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": segmentation}
            coco["annotations"].append(annotation)
    return coco


@pytest.mark.parametrize("form", ["polygons", "one polygon", "run lengths", "compressed", "boxes"])
@pytest.mark.parametrize(
    "place", ["labels/coco.json", "annotations/instances_train.json", "x.json"]
)
def test_coco(folder, config, form, place):
    write(folder / place, make_coco(form))
    source, micrographs = read(folder, config())
    truth = draw_truth()
    if form == "boxes":
        truth["loop"][20:40, 30:50] = True
        assert all(each.mask is None for each in micrographs[0].defects)
    assert_truth(micrographs, truth)
    assert [each.kind for each in micrographs[0].defects] == ["void", "void", "loop"]
    assert source.labels == f"{place} (COCO, 2 images)"
    assert not source.ignored


@pytest.mark.parametrize("names", ["data.yaml", "classes.txt", "labels/classes.txt", None])
@pytest.mark.parametrize("form", ["boxes", "polygons"])
@pytest.mark.parametrize("place", ["labels", "labels_yolo", "images", ""])
def test_yolo(folder, config, names, form, place):
    lines = []
    for number, kind in enumerate(("void", "loop")):
        for box in BOXES[kind]:
            x0, y0, x1, y1 = box
            numbers = np.array([x0 + x1, y0 + y1, 2 * (x1 - x0), 2 * (y1 - y0)]) / 2
            if form == "polygons":
                numbers = np.array(list_polygons(box, kind)[0])
            shares = (numbers.reshape(-1, 2) / SHAPE[::-1]).ravel().tolist()
            lines.append(" ".join(map(str, [number, *shares])))
    write(folder / place / "a.txt", "\n".join(lines))
    write(folder / place / "b.txt", "")
    if names:
        yaml = "names: {0: void, 1: loop}\n"
        write(folder / names, yaml if names.endswith("yaml") else "void\nloop\n")
    _, micrographs = read(folder, config())
    truth = draw_truth()
    if form == "boxes":
        truth["loop"][20:40, 30:50] = True
    if not names:
        truth = {"class 0": truth["void"], "class 1": truth["loop"]}
    assert_truth(micrographs, truth)


LAYOUTS = {
    "masks": "masks/{}.png",
    "labels": "labels/{}.png",
    "suffix": "images/{}_mask.png",
    "prefix": "images/mask_{}.png",
    "tiff": "segmentation/{}.tif",
    "segs": "segs/{}_seg.png",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("content", ["kinds", "instances", "colours", "palette"])
def test_masks(folder, config, layout, content):
    truth = draw_truth()
    levels = truth["void"] * 1 + truth["loop"] * 2
    names = {"1": "void", "2": "loop"}
    empty = np.zeros(SHAPE, np.uint8)
    if content == "instances":
        for number, (x0, y0, x1, y1) in zip((1, 3), BOXES["void"]):
            levels[y0:y1, x0:x1] = number
        levels, names = levels.astype(np.uint16), {}
    for name, pixels in (("a", levels), ("b", empty)):
        image = PIL.Image.fromarray(pixels.astype(np.uint16 if content == "instances" else "uint8"))
        if content in ("colours", "palette"):
            image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        if content == "colours":
            image, names = image.convert("RGB"), {"#ff0000": "void", "#00ff00": "loop"}
        path = folder / LAYOUTS[layout].format(name)
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    if names:
        write(folder / "classes.txt", "\n".join(f"{key} {name}" for key, name in names.items()))
    source, micrographs = read(folder, config())
    if content == "instances":
        truth = {"defect": truth["void"] | truth["loop"]}
    assert_truth(micrographs, truth)
    assert len(micrographs[0].defects) == 3
    form = "instances" if content == "instances" else "kinds"
    assert f"masks of {form}, 2 images" in source.labels


def test_kinds_without_names_are_numbers_and_a_mask_per_instance_is_one(folder, config):
    truth = draw_truth()
    save(truth["void"] * np.uint8(7) + truth["loop"] * np.uint8(9), folder / "masks" / "a.png")
    _, (micrograph, *_) = read(folder, config(masks="kinds"))
    assert [each.kind for each in micrograph.defects] == ["7", "7", "9"]
    (folder / "masks" / "a.png").unlink()
    for i, mask in enumerate((truth["void"], truth["loop"])):
        save(mask * np.uint8(255), folder / "masks" / f"a_mask_{i}.png")
    _, (micrograph, *_) = read(folder, config(masks="instances"))
    assert [int(each.mask.sum()) for each in micrograph.defects] == [
        int(truth[kind].sum()) for kind in ("void", "loop")
    ]


def test_folders_tell_images_of_one_name_apart(tmp_path, noise, config):
    for part in ("train", "test"):
        save(noise(len(part), SHAPE), tmp_path / "set" / part / "images" / "1.png")
        mask = np.zeros(SHAPE, np.uint8)
        mask[: len(part), :9] = 1
        save(mask, tmp_path / "set" / part / "masks" / "1.png")
    save(noise(1, SHAPE), tmp_path / "set" / "other" / "1.png")
    source, (other, *both) = read(tmp_path / "set", config())
    assert other.defects is None
    used = [each.defects for each in both if each.defects is not None]
    assert [each[0].box_px[3] for each in used] == [4]  # one set is used, the other is named
    assert any("other labels: train/masks/" in line for line in source.ignored)


def test_metadata_jsonl_of_an_imagefolder(folder, config):
    rows = [
        {"file_name": "a.png", "objects": {"bbox": [], "categories": []}},
        {"file_name": "b.png", "objects": {"bbox": [], "categories": []}, "label": "x"},
    ]
    for kind, boxes in BOXES.items():
        for x0, y0, x1, y1 in boxes:
            rows[0]["objects"]["bbox"].append([x0, y0, x1 - x0, y1 - y0])
            rows[0]["objects"]["categories"].append(kind)
    write(folder / "images" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    source, micrographs = read(folder, config())
    truth = draw_truth()
    truth["loop"][20:40, 30:50] = True
    assert_truth(micrographs, truth)
    assert source.labels == "images/metadata.jsonl (objects, 2 images)"
    assert [each.class_name for each in micrographs] == [None, "x", None]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_classes_of_a_table(folder, config, mark):
    rows = [["image", "material"], ["a.png", "steel"], ["images/b.png", "titanium"]]
    write(folder / "list.csv", "\n".join(mark.join(row) for row in rows))
    source, micrographs = read(folder, config())
    assert [each.class_name for each in micrographs] == ["steel", "titanium", None]
    assert source.classes == "column material of list.csv"
    assert source.ignored == ["1 images have no class in column material of list.csv"]
    _, micrographs = read(folder, config(classes="none"))
    assert {each.class_name for each in micrographs} == {None}


def test_classes_of_folders(tmp_path, noise, config):
    for i, name in enumerate(("steel/s1", "steel/s2", "train/iron/s1", "images")):
        save(noise(i, SHAPE), tmp_path / "set" / name / f"{i}.png")
    _, micrographs = read(tmp_path / "set", config(classes="folder"))
    classes = {each.name: each.class_name for each in micrographs}
    assert [classes[name] for name in sorted(classes)] == [None, "steel", "steel", "iron"]
    said = []
    data = load_data(tmp_path / "set", config(classes="folder"), log=said.append)
    assert data.summary["classes"] == {"iron": 1, "steel": 2}
    assert "classes from the folders: 3 of 4 micrographs (iron: 1, steel: 2)" in said


def encode(pixels):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("form", ["dictionary", "list"])
def test_objects_and_classes_of_a_data_set(tmp_path, noise, config, form):
    boxes = [[x0, y0, x1 - x0, y1 - y0] for each in BOXES.values() for x0, y0, x1, y1 in each]
    fields = {"bbox": List(Value("float32")), "category": ClassLabel(names=["void", "loop"])}
    values = [{"bbox": box, "category": c} for box, c in zip(boxes, [0, 0, 1])]
    objects = [values, [], None]
    feature = List(fields)
    if form == "dictionary":
        feature = {key: List(each) for key, each in fields.items()}
        objects = [{key: [v[key] for v in each] for key in fields} for each in (values, [])]
        objects.append(None)
    features = {"image": Image(), "objects": feature, "label": ClassLabel(names=["steel", "iron"])}
    rows = {"image": [encode(noise(i, SHAPE)) for i in range(3)], "label": [1, 0, None]}
    dataset = Dataset.from_dict(rows | {"objects": objects}, features=Features(features))
    dataset.save_to_disk(tmp_path / "set")
    source, micrographs = read(tmp_path / "set", config())
    truth = draw_truth()
    truth["loop"][20:40, 30:50] = True
    assert_truth(micrographs, truth)
    assert [each.class_name for each in micrographs] == ["iron", "steel", None]
    assert (source.labels, source.classes) == ("column objects (objects)", "column label")


def test_masks_of_a_data_set(tmp_path, noise, config):
    truth = draw_truth()
    levels = truth["void"] * np.uint8(1) + truth["loop"] * np.uint8(2)
    features = Features({"image": Image(), "mask": Image()})
    masks = [encode(levels), encode(np.zeros(SHAPE, np.uint8)), None]
    rows = {"image": [encode(noise(i, SHAPE)) for i in range(3)], "mask": masks}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    source, micrographs = read(tmp_path / "set", config())
    assert_truth(micrographs, {"1": truth["void"], "2": truth["loop"]})
    assert source.labels == "column mask (masks of kinds)"


def test_one_of_several_sets_is_used_and_named_and_another_can_be_chosen(folder, config):
    write(folder / "coco.json", make_coco("polygons"))
    save(draw_truth()["void"].astype(np.uint8), folder / "masks" / "a.png")
    source, _ = read(folder, config())
    assert source.ignored == [
        "other labels: masks/ (masks, 1 images). coco.json is used; choose with --tiles.labels."
    ]
    source, micrographs = read(folder, config(labels="masks", masks="kinds"))
    assert source.labels == "masks/ (masks of kinds, 1 images)"
    assert [each.kind for each in micrographs[0].defects] == ["1", "1"]
    source, micrographs = read(folder, config(labels="none"))
    assert all(each.defects is None for each in micrographs)
    with pytest.raises(ValueError, match=r"tiles.labels is x, but .* coco.json .* masks/"):
        read(folder, config(labels="x"))


def test_coordinates_follow_cropped_pixels(tmp_path, noise, config):
    import tifffile

    pixels = noise(0, SHAPE).astype(np.float32)
    pixels[:2], pixels[:, -6:] = np.nan, np.nan
    (tmp_path / "data").mkdir()
    tifffile.imwrite(tmp_path / "data" / "a.tif", pixels)
    coco = make_coco("polygons")
    coco["images"] = [coco["images"][0] | {"file_name": "a.tif"}]
    write(tmp_path / "data" / "coco.json", coco)
    _, (micrograph,) = read(tmp_path / "data", config())
    assert micrograph.image.shape == (46, 58)
    for kind, mask in draw(micrograph).items():
        assert np.array_equal(mask, draw_truth()[kind][2:, :-6])
    assert [each.metadata.get(IS_CUT, False) for each in micrograph.defects] == [False] * 3
    coco["annotations"][0]["segmentation"] = list_polygons((50, 1, 60, 9), "void")
    write(tmp_path / "data" / "coco.json", coco)
    _, (micrograph,) = read(tmp_path / "data", config())
    first, *others = micrograph.defects
    assert first.box_px == (50, 0, 58, 7)
    assert first.metadata[IS_CUT]
    assert not any(each.metadata.get(IS_CUT) for each in others)


def test_other_labels_are_other_tiles(folder, config):
    options = {"symmetries": "none"}
    before = load_data(folder, config(**options), log=lambda _: None)
    write(folder / "coco.json", make_coco("polygons"))
    after = load_data(folder, config(**options), log=lambda _: None)
    assert after.summary["fingerprint"] != before.summary["fingerprint"]
    assert after.summary["kinds"] == {"loop": 1, "void": 2}


def test_a_polygon_has_the_pixels_whose_centres_it_holds():
    rng = np.random.default_rng(0)
    columns, rows = np.meshgrid(np.arange(12) + 0.5, np.arange(9) + 0.5)
    for _ in range(20):
        points = rng.uniform(-3, 14, (rng.integers(3, 9), 2))
        inside = np.zeros((9, 12), bool)
        for (x, y), (u, v) in zip(points, np.roll(points, -1, axis=0)):
            is_crossed = (y <= rows) != (v <= rows)
            with np.errstate(divide="ignore", invalid="ignore"):
                inside ^= is_crossed & (columns > x + (rows - y) * (u - x) / (v - y))
        assert np.array_equal(fill_polygon(points, (9, 12)), inside)


def test_a_background_other_than_0_is_said_and_can_be_named(folder, config):
    truth = draw_truth()
    save(np.where(truth["loop"], np.uint8(2), np.uint8(1)), folder / "masks" / "a.png")
    _, (micrograph, *_) = read(folder, config(masks="kinds"))
    assert any("level 1 covers" in each for each in micrograph.metadata["notices"])
    write(folder / "classes.txt", "1 Background\n2 loop\n")
    _, (micrograph, *_) = read(folder, config())
    assert {each.kind for each in micrograph.defects} == {"loop"}
    assert not any("covers" in each for each in micrograph.metadata["notices"])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_masks_are_turned_by_their_own_tag_and_others_of_a_turned_image_are_refused(
    folder, config, suffix
):
    tag = PIL.Image.Exif()
    tag[274] = 3
    with PIL.Image.open(folder / "images" / "a.png") as image:
        image.copy().save(folder / "images" / "a.png", exif=tag)
    mask = PIL.Image.fromarray(draw_truth()["loop"] * np.uint8(255))
    (folder / "masks").mkdir(exist_ok=True)
    path = folder / "masks" / f"a.{suffix}"
    mask.save(path)
    _, (micrograph, *_) = read(folder, config(masks="kinds"))
    assert micrograph.defects is None
    assert any("turned by its orientation tag (3)" in e for e in micrograph.metadata["notices"])
    mask.save(path, **({"exif": tag} if suffix == "png" else {"tiffinfo": {274: 3}}))
    _, (micrograph, *_) = read(folder, config(masks="kinds"))
    drawn = np.zeros(micrograph.image.shape, bool)
    for each in micrograph.defects:
        x0, y0, x1, y1 = each.box_px
        drawn[y0:y1, x0:x1] |= each.mask
    assert np.array_equal(drawn, draw_truth()["loop"][::-1, ::-1])


def test_a_table_in_another_encoding_is_said(folder, config):
    (folder / "table.csv").write_bytes("file_name,class\na.png,Stähle\n".encode("latin-1"))
    source, _ = read(folder, config())
    assert sum("table.csv cannot be read as a table" in each for each in source.ignored) == 1
