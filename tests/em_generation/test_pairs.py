"""generate.py --pairs: one command ends in images and labels that others, and we, read back."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import datasets
import faster_coco_eval
import numpy as np
import pytest
import torch
import yaml
from faster_coco_eval import COCO
from PIL import Image
from torchvision.datasets import CocoDetection
from torchvision.ops import masks_to_boxes
from torchvision.utils import draw_segmentation_masks

from em_commands import generate as command
from em_data import DataConfig, from_uint, load_data, load_tiles
from em_data.micrograph import Defect
from em_data.synthetic_micrographs import Specimen, synthesise_micrograph
from em_generation.families import find_family
from em_generation.generate import GenerationConfig, generate_images
from em_generation.label_store import LabelFormat, LabelledArrowStore, Labels
from em_generation.pairs import PairOptions
from em_generation.pairs.appearance import estimate_ground, index_distance, measure_appearance
from em_generation.pairs.instances import collect_instances, paste
from em_generation.pairs.labelled import read_labelled
from em_generation.pairs.makers import CopyPaste, LikeLabelled, Simulated, crop_defect
from support.models import make_ldm, make_stylegan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and numpy 2
ROOT = Path(__file__).parents[2]
KINDS = ("dot", "line", "loop_100", "loop_111")
SMALL = Specimen(loop_median_nm=7, dot_median_nm=2.5, loops_per_um2=5000, dots_per_um2=5000)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm")
    pipeline = make_ldm()
    pipeline.register_to_config(pixel_size_nm=4.0)  # some defects lie in 16 pixels
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder of labelled micrographs, some of whose defects are whole in tiles of 16 pixels."""
    folder = tmp_path_factory.mktemp("labelled")
    micrographs = [synthesise_micrograph(i, 96, 1.0, specimen=SMALL) for i in range(4)]
    formats = LabelFormat(KINDS, ("coco", "masks"), lambda i: Labels(micrographs[i].defects))
    store = LabelledArrowStore(folder, 8, 1.0, formats)
    store.share(range(4), 0, 1)
    store.write(range(4), from_uint(np.stack([each.image for each in micrographs]))[:, None])
    store.finish()
    return str(folder)


def config_for(model, out, pairs="simulated", **changes):
    options = find_family("ldm").options(num_inference_steps=2, size=changes.pop("size", None))
    names = ("labels", "labelled", "strength")
    chosen = {name: changes.pop(name) for name in names if name in changes}
    values = {"num_images": 5, "batch_size": 3, "precision": "no"} | changes
    pairs = PairOptions(pairs=pairs, **chosen)
    return GenerationConfig(model, str(out), options=options, pairs=pairs, **values)


def list_files(folder):
    paths = (path for path in Path(folder).rglob("*") if path.is_file() and path.name[0] != ".")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "pairs"
    generate_images(config_for(model, out, num_images=8, strength=0.4))
    return out


# --------------------------------------------------------------------------- read by other tools


def test_coco_is_read_by_faster_coco_eval_and_torchvision(written):
    faster_coco_eval.init_as_pycocotools()  # torchvision asks for that name
    coco = COCO(str(written / "labels" / "coco.json"))
    assert [coco.imgs[i]["file_name"] for i in sorted(coco.imgs)] == [
        f"{i:06d}.png" for i in range(8)
    ]
    assert [each["name"] for each in coco.cats.values()] == ["loop_111", "loop_100", "dot", "line"]
    found = CocoDetection(str(written / "images"), str(written / "labels" / "coco.json"))
    num_defects = 0
    for image, target in found:
        if not target:
            continue
        assert image.size == (16, 16)
        masks = torch.from_numpy(np.stack([coco.annToMask(each) for each in target])).bool()
        x0, y0, x1, y1 = masks_to_boxes(masks).T
        boxes = torch.stack([x0, y0, x1 + 1 - x0, y1 + 1 - y0], dim=1)
        assert torch.equal(boxes, torch.tensor([each["bbox"] for each in target]).float())
        drawn = draw_segmentation_masks(torch.from_numpy(np.array(image)).movedim(-1, 0), masks)
        assert drawn.shape == (3, 16, 16)
        num_defects += len(target)
    assert num_defects == len(coco.anns) > 8


def test_masks_agree_with_coco(written):
    coco = COCO(str(written / "labels" / "coco.json"))
    for number in range(8):
        instances = np.asarray(Image.open(written / "masks" / f"{number:06d}.png"))
        semantic = np.asarray(Image.open(written / "semantic" / f"{number:06d}.png"))
        expected, kinds = np.zeros((2, 16, 16), int)
        for k, each in enumerate(coco.imgToAnns[number + 1], start=1):
            mask = coco.annToMask(each).astype(bool)
            expected[mask], kinds[mask] = k, each["category_id"]
        assert instances.dtype == np.uint16
        assert np.array_equal(instances, expected)
        assert np.array_equal(semantic, kinds)


def test_yolo_finds_a_text_for_every_image(written):
    """By the rule of ultralytics: /images/ becomes /labels/, and the suffix .txt."""
    index = yaml.safe_load((written / "data.yaml").read_text())
    coco = json.loads((written / "labels" / "coco.json").read_text())
    assert list(index["names"].values()) == [each["name"] for each in coco["categories"]]
    for path in sorted((written / index["train"]).iterdir()):
        text = Path("/labels/".join(str(path).rsplit("/images/", 1))).with_suffix(".txt")
        own = [a for a in coco["annotations"] if a["image_id"] == int(path.stem) + 1]
        lines = text.read_text().splitlines()
        assert [int(line.split()[0]) + 1 for line in lines] == [a["category_id"] for a in own]


def test_imagefolder_shows_boxes_and_masks(written):
    rows = datasets.load_dataset("imagefolder", data_dir=str(written), split="train")
    coco = json.loads((written / "labels" / "coco.json").read_text())
    assert len(rows) == 8
    for row in rows:
        own = [a for a in coco["annotations"] if a["image_id"] == row["number"] + 1]
        names = [coco["categories"][a["category_id"] - 1]["name"] for a in own]
        assert row["objects"]["bbox"] == [a["bbox"] for a in own]
        assert row["objects"]["category"] == names
        assert (row["pixel_size_nm"], row["strength"], row["seed"]) == (4.0, 0.4, 0)
        assert row["image"].size == row["mask"].size == row["semantic"].size == (16, 16)
        assert np.asarray(row["mask"]).max() == len(own) or len(own) > 1


@pytest.mark.parametrize("labels", ["auto", "labels/", "masks/"])
def test_the_folder_is_labelled_data_of_ours(written, tmp_path, labels):
    """As `--data`, to the bit; instance masks keep only what lies on top, and no kinds."""
    options = {"label_bar": "keep", "labels": labels, "cache_dir": str(tmp_path)}
    options |= {"masks": "instances"} if labels == "masks/" else {}
    config = DataConfig(resolution=16, **options)
    tiles = load_data(str(written), config, log=lambda line: None)
    coco, num_defects = COCO(str(written / "labels" / "coco.json")), 0
    for side in (tiles.train, tiles.held_out):
        for tile in range(side.num_tiles):
            found = side.defects(tile * side.num_symmetries)
            number = int(Path(side.rows[tile]["micrograph"]).stem)
            own = coco.imgToAnns[number + 1]
            masks = [coco.annToMask(each).astype(bool) for each in own]
            kinds = [coco.cats[each["category_id"]]["name"] for each in own]
            if labels == "masks/":
                on_top = np.zeros((16, 16), int)
                for k, mask in enumerate(masks, start=1):
                    on_top[mask] = k
                masks = [on_top == k for k in np.unique(on_top) if k]
                kinds = [each.kind for each in found]
            drawn = [np.zeros((16, 16), bool) for _ in found]
            for canvas, defect in zip(drawn, found):
                x0, y0, x1, y1 = defect.box_px
                canvas[y0:y1, x0:x1] = defect.mask
            assert sorted(map(bytes, drawn)) == sorted(map(bytes, masks))
            assert sorted(each.kind for each in found) == sorted(kinds)
            num_defects += len(found)
    assert num_defects > 8


@pytest.mark.parametrize("bits", [8, 16])
def test_arrow_has_labels_as_columns(model, written, tmp_path, bits):
    config = config_for(
        model,
        tmp_path / "out",
        num_images=8,
        strength=0.4,
        format="arrow",
        bits=bits,
        labels=("coco", "masks"),
    )
    generate_images(config)
    rows = datasets.load_from_disk(str(tmp_path / "out"))
    coco = json.loads((written / "labels" / "coco.json").read_text())
    for row in rows:
        own = [a for a in coco["annotations"] if a["image_id"] == row["number"] + 1]
        assert [each["bbox"] for each in row["objects"]] == [a["bbox"] for a in own]
        mask = np.asarray(Image.open(written / "masks" / f"{row['number']:06d}.png"))
        assert np.array_equal(np.asarray(row["mask"]), mask)
        image = np.asarray(row["image"])
        assert image.dtype == (np.uint8 if bits == 8 else np.uint16)
        assert json.loads(row["facts"])["pairs"] == "simulated"
    with pytest.raises(ValueError, match="--labels yolo needs one file per image"):
        generate_images(config_for(model, tmp_path / "other", format="arrow"))


# --------------------------------------------------------------------- seeds, kills and settings


@pytest.mark.parametrize("pairs", ["simulated", "like labelled", "copy-paste"])
def test_labels_and_images_depend_on_seed_and_number_alone(model, labelled, tmp_path, pairs):
    options = {} if pairs == "simulated" else {"labelled": labelled}
    pairs = pairs.replace("like labelled", "simulated")
    for name, changes in {
        "a": {},
        "b": {"batch_size": 16},
        "c": {"num_images": 2},
        "d": {"seed": 1},
    }.items():
        config = config_for(model, tmp_path / name, pairs, **options, **changes)
        generate_images(config)
    a, b, c, d = (list_files(tmp_path / name) for name in "abcd")
    for name in a:
        if name.startswith(("labels", "masks", "semantic", "records")) or name == "metadata.jsonl":
            assert a[name] == b[name], name
            assert (
                "/" not in name or name not in c or name.endswith("coco.json") or a[name] == c[name]
            )
    settings = json.loads(a["generation.json"])["settings"]
    expected = "the simulator" if not options else f"4 labelled images, {Path(labelled).name}"
    assert settings["layouts"] == expected
    pixels = [
        np.stack(
            [
                np.asarray(Image.open(tmp_path / n / "images" / f"{i:06d}.png"), int)
                for i in range(5)
            ]
        )
        for n in "ab"
    ]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert a["labels/coco.json"] != d["labels/coco.json"]
    assert json.loads(a["labels/coco.json"])["annotations"]


def test_a_folder_is_completed_and_extended_as_if_made_at_once(model, written, tmp_path):
    out = tmp_path / "out"
    generate_images(config_for(model, out, num_images=3, strength=0.4))
    (out / "images" / "000001.png").unlink()
    (out / "records" / "000002.json").unlink()
    (out / "labels" / ".000000.txt.half").write_text("0 0.1")
    (out / "labels" / "coco.json").unlink()
    generate_images(config_for(model, out, num_images=8, strength=0.4))
    ours, theirs = list_files(out), list_files(written)
    assert ours.keys() == theirs.keys()
    assert not (out / "labels" / ".000000.txt.half").exists()
    for name, content in theirs.items():
        assert ours[name] == content or name.startswith(("images", "generation")), name


@pytest.mark.slow
def test_a_kill_loses_no_label(model, tmp_path):
    """Whenever the process is killed: every image has its labels, and the rest follows."""
    out = tmp_path / "out"
    words = ["--model", model, "--out", str(out), "--num-images", "40", "--batch-size", "4"]
    words += ["--pairs", "simulated", "--num-inference-steps", "2", "--precision", "no"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), *words], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while len(list(out.glob("images/0*.png"))) < 6 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    images = {path.stem for path in out.glob("images/0*.png")}
    assert len(images) >= 6
    for folder, suffix in (("records", "json"), ("labels", "txt"), ("masks", "png")):
        assert images <= {path.stem for path in out.glob(f"{folder}/0*.{suffix}")}
    (config, read) = command.parse(words)
    generate_images(config, read)
    coco = json.loads((out / "labels" / "coco.json").read_text())
    assert len(coco["images"]) == 40


def test_other_labels_need_another_folder(model, written):
    with pytest.raises(ValueError, match=r"made with other settings \(labels differs\)"):
        generate_images(config_for(model, written, strength=0.4, labels=("coco",)))
    plain = dataclasses.replace(config_for(model, written), pairs=None)
    with pytest.raises(ValueError, match=r"other settings .*pairs"):
        generate_images(plain)


@pytest.mark.parametrize("name", ["coco", "yolo", "masks"])
def test_only_what_is_asked_for_is_written(model, tmp_path, name):
    generate_images(config_for(model, tmp_path / "out", num_images=2, labels=(name,)))
    files = {each.split("/")[0] for each in list_files(tmp_path / "out")}
    own = {"coco": {"labels"}, "yolo": {"labels", "data.yaml"}, "masks": {"masks", "semantic"}}
    assert files == {"images", "records", "metadata.jsonl", "generation.json"} | own[name]


def test_large_images_have_large_labels(model, tmp_path):
    changes = {"num_images": 16, "size": "24x40", "format": "tiff", "bits": 16}
    config = config_for(model, tmp_path / "out", **changes)
    generate_images(config)
    coco = COCO(str(tmp_path / "out" / "labels" / "coco.json"))
    assert {(each["height"], each["width"]) for each in coco.imgs.values()} == {(24, 40)}
    assert {each["file_name"][-4:] for each in coco.imgs.values()} == {".tif"}
    assert np.asarray(Image.open(tmp_path / "out" / "masks" / "000000.png")).shape == (24, 40)
    boxes = np.array([each["bbox"] for each in coco.anns.values()])
    assert boxes[:, 0].max() > 20
    assert (boxes[:, :2] + boxes[:, 2:]).max(axis=0).tolist() <= [40, 24]


# ------------------------------------------------------------------------------------ the command


def test_the_command_says_where_pairs_are(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "my pairs"
    words = ["generate.py", "--model", model, "--out", str(out), "--num-images", "3"]
    words += ["--pairs", "simulated", "--labels", "coco", "masks", "--num-inference-steps", "2"]
    monkeypatch.setattr(sys, "argv", words)
    command.run()
    said = capsys.readouterr().out
    assert "3 images with labels in" in said
    assert "(labels/coco.json, masks/)" in said
    assert f"em_data.look '{out}'" in said
    with Image.open(tmp_path / "my pairs-preview.png") as preview:
        assert preview.mode == "RGB"
        colours = np.asarray(preview).reshape(-1, 3)
    assert (colours.max(axis=1) - colours.min(axis=1) > 60).sum() > 100  # outlines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "--strength: only images with labels"),
        ({"labels": ("coco",)}, "--labels: only images with labels"),
        ({"pairs": "simulated", "strength": 2}, "--strength is 2, but must be 0 to 1"),
        ({"pairs": "drawn"}, "--pairs is drawn; choose simulated, copy-paste, mask"),
        ({"pairs": "simulated", "labels": ("voc",)}, "--labels is voc; choose coco, yolo, masks"),
        ({"pairs": "simulated", "labels": ()}, "--labels is empty"),
        ({"pairs": "mask", "strength": 0.5}, "--pairs mask takes neither --strength"),
    ],
)
def test_mistakes_in_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PairOptions(**options)


def test_families_that_cannot_say_so(model, tmp_path):
    make_stylegan().save_pretrained(tmp_path / "gan")
    config = GenerationConfig(
        str(tmp_path / "gan"), str(tmp_path / "a"), pairs=PairOptions(pairs="simulated")
    )
    with pytest.raises(ValueError, match="is a StyleGAN2, which cannot start from an image"):
        generate_images(config)
    with pytest.raises(ValueError, match="is a LDM, which does not draw images for masks"):
        generate_images(config_for(model, tmp_path / "b", "mask"))
    with pytest.raises(ValueError, match=r"it is unknown which micrographs .* --labelled"):
        generate_images(config_for(model, tmp_path / "c", "copy-paste"))
    assert not list(tmp_path.glob("*/generation.json"))


# ------------------------------------------------------------------------- what is drawn or pasted


def test_simulated_pictures_have_the_models_grey_levels():
    rng = np.random.default_rng(0)
    references = 0.2 + 0.1 * rng.standard_normal((64, 64, 64)) + 0.1 * rng.random((64, 1, 1))
    maker = Simulated(references, 1.0, seed=3)
    pictures = np.stack([maker.start(i, (64, 64))[0] for i in range(48)])
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    np.testing.assert_allclose(
        np.quantile(pictures, levels), np.quantile(references, levels), atol=0.04
    )
    picture, layout = maker.start(7, (40, 64))
    assert picture.shape == (40, 64)
    for defect in layout:
        x0, y0, x1, y1 = defect.box_px
        assert 0 <= x0 < x1 <= 64
        assert 0 <= y0 < y1 <= 40
        assert defect.mask.shape == (y1 - y0, x1 - x0)
    edges = [d.mask.mean() and pictures is not None for d in layout]
    assert edges


def ring_image(size=64, centre=(30, 34), radius=9, ground=0.3):
    y, x = np.mgrid[:size, :size]
    distance = np.hypot(y - centre[0], x - centre[1])
    image = ground - 0.5 * np.exp(-(((distance - radius) / 1.5) ** 2))
    mask = distance <= radius + 1
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return image.astype(np.float32), Defect("loop", tuple(map(int, box)), inside)


def test_the_look_of_defects_is_measured_and_drawn_again():
    image, defect = ring_image()
    look = measure_appearance([image], [[defect]])
    assert look.strengths["loop"] == pytest.approx([1], abs=0.05)
    drawn = 0.3 + look.draw([defect], image.shape, np.random.default_rng(0))
    assert np.abs(drawn - image).mean() < 0.02
    ground = estimate_ground(image, [defect])
    assert np.abs(ground - 0.3).max() < 0.05
    mask = np.pad(np.ones((3, 3), bool), 2)
    assert index_distance(mask)[3].tolist() == [5, 6, 7, 8, 7, 6, 5]


def test_an_instance_is_pasted_as_it_is_under_all_symmetries():
    image, defect = ring_image()
    (instance,) = collect_instances(image, [defect])
    assert np.array_equal(instance.turn(0).mask, instance.mask)
    seen = {instance.turn(i).pixels.tobytes() for i in range(8)}
    assert 1 <= len(seen) <= 8
    ground = np.full((64, 64), -0.2, np.float32)
    pasted = paste(ground, instance, (30.5, 34.5))
    assert pasted.mask.sum() == defect.mask.sum()
    x0, y0, x1, y1 = pasted.box_px
    ring = ground[y0:y1, x0:x1][pasted.mask]
    expected = image[defect.box_px[1] : defect.box_px[3], defect.box_px[0] : defect.box_px[2]]
    np.testing.assert_allclose(ring, expected[defect.mask] - 0.5, atol=0.02)
    assert np.abs(ground[:5] + 0.2).max() < 1e-6
    assert paste(ground, instance, (-30, 0)) is None
    cut = paste(ground, instance, (0, 0))
    assert cut.box_px[:2] == (0, 0)
    assert 0 < cut.mask.sum() < defect.mask.sum()


def test_neighbours_are_not_copied_without_a_label():
    image, defect = ring_image()
    x1 = defect.box_px[2]
    other = Defect("dot", (x1 + 1, 28, x1 + 4, 31))
    image[28:31, x1 + 1 : x1 + 4] = -1
    loop, dot = collect_instances(image, [defect, other])
    column = np.flatnonzero((loop.pixels < -1).any(axis=0))
    assert len(column)
    assert loop.opacity[:, column][loop.pixels[:, column] < -1].max() == 0
    assert dot.mask.all(axis=None) or dot.mask.sum() == 9


def test_a_cut_defect_keeps_its_part():
    mask = np.ones((10, 10), bool)
    assert crop_defect(Defect("dot", (0, 0, 10, 10), mask), (20, 20)).box_px == (0, 0, 10, 10)
    cut = crop_defect(Defect("dot", (15, 0, 25, 10), mask), (8, 20))
    assert (cut.box_px, cut.mask.shape) == ((15, 0, 20, 8), (8, 5))
    assert crop_defect(Defect("dot", (30, 0, 40, 10), mask), (8, 20)) is None


def test_makers_repeat_themselves(labelled):
    tiles = load_tiles(labelled, DataConfig(resolution=16), log=lambda line: None)
    found = read_labelled(tiles, name="four", seed=0, say=lambda line: None)
    for maker in (LikeLabelled(found, 5), CopyPaste(found, 5)):
        once, again = (maker.start(3, (16, 16))[0] for _ in range(2))
        assert np.array_equal(once, again)
        pasted = [maker.finish(i, np.zeros((32, 32), np.float32), []) for i in range(20)]
        assert any(pasted) == isinstance(maker, CopyPaste)
