"""generate.py --shard and --check: files that are whole or absent, the same whoever writes them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from em_commands import generate as command
from em_data import read_image_folder
from em_data.files import lock
from em_generation.families import find_family
from em_generation.generate import GenerationConfig, generate_images
from em_generation.pairs import PairOptions
from em_generation.shards import work
from em_generation.shards.check import check_shards, compress, describe_check
from em_generation.shards.plan import Plan, ShardOptions, parse_shard
from em_generation.shards.reading import ImageFile
from em_generation.shards.work import generate_shard
from support.models import make_ldm, make_stylegan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and numpy 2
ROOT = Path(__file__).parents[2]
SUFFIX = {"arrow": "arrow", "webdataset": "tar"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stylegan")
    make_stylegan().save_pretrained(folder)
    return str(folder)


def write(model, out, shard="1/1", *, format="arrow", per_file=40, **changes):
    values = {"num_images": 110, "batch_size": 16, "precision": "no", "format": format} | changes
    shards = ShardOptions(shard, images_per_file=per_file)
    config = GenerationConfig(model, str(out), shards=shards, **values)
    return generate_shard(config, command="python generate.py --model m")


def read_files(out):
    return {path.name: path.read_bytes() for path in sorted((Path(out) / "data").iterdir())}


@pytest.mark.parametrize("format", SUFFIX)
@pytest.mark.parametrize("bits", [8, 16])
def test_bytes_are_equal_whatever_the_shards(model, tmp_path, format, bits):
    options = {"format": format, "bits": bits}
    whole = write(model, tmp_path / "a", **options)
    assert whole.files == (0, 1, 2)
    for shard in ("3/3", "1/2", "2/4"):
        write(model, tmp_path / "b", shard, batch_size=50, **options)
    assert write(model, tmp_path / "b", "1/7", **options).num_done_before == 1
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")
    assert check_shards(tmp_path / "b").is_whole

    generate_images(GenerationConfig(model, str(tmp_path / "c"), num_images=110, bits=bits))
    expected = [np.asarray(each["image"]) for each in read_rows(tmp_path / "c")]
    numbers, images = [], []
    for path in sorted((tmp_path / "a" / "data").iterdir()):
        file = ImageFile(path)
        numbers += file.numbers
        images += [file._decode(i) for i in range(len(file))]
    assert numbers == list(range(110))
    assert images[0].dtype == (np.uint8 if bits == 8 else np.uint16)
    np.testing.assert_array_equal(images, expected)


def read_rows(folder):
    import PIL.Image

    return [{"image": PIL.Image.open(path)} for path in sorted(folder.glob("*.png"))]


def test_arrow_is_read_by_datasets_and_by_our_source(model, tmp_path):
    write(model, tmp_path / "out")
    loaded = datasets.load_dataset(
        str(tmp_path / "out" / "data"), split="train", cache_dir=str(tmp_path / "cache")
    )
    saved = datasets.load_from_disk(str(tmp_path / "out"))
    assert loaded["number"][:] == saved["number"][:] == list(range(110))
    images = read_image_folder(tmp_path / "out")
    assert len(images) == 110
    assert images.pixel_size_nm == 0.5
    file = ImageFile(tmp_path / "out" / "data" / "images-000001.arrow")
    assert np.array_equal(images.batch(range(40, 80)), file.batch(range(40)))


def test_tar_is_read_by_datasets_and_by_our_source(model, tmp_path):
    write(model, tmp_path / "out", format="webdataset")
    name = str(tmp_path / "out" / "data")
    loaded = datasets.load_dataset(name, split="train", cache_dir=str(tmp_path / "cache"))
    assert [each["number"] for each in loaded["json"]] == list(range(110))
    file = ImageFile(tmp_path / "out" / "data" / "images-000002.tar")
    pixels = np.asarray(loaded[85]["png"])
    assert np.array_equal(pixels, file._decode(5))


def test_an_unfinished_folder_has_no_index(model, tmp_path):
    write(model, tmp_path, "1/2")
    assert not (tmp_path / "state.json").exists()


def test_check_names_what_is_missing_damaged_and_doubled(model, tmp_path, capsys, monkeypatch):
    write(model, tmp_path, num_images=200)
    expected = read_files(tmp_path)
    data, done = tmp_path / "data", tmp_path / "done"
    (done / "images-000000.json").unlink()
    content = bytearray((data / "images-000001.arrow").read_bytes())
    content[-100] ^= 1
    (data / "images-000001.arrow").write_bytes(content)
    (data / "images-000002.arrow").write_bytes(b"short")
    (done / "images-000003.json").write_text("{}")
    (data / "images-000004 (copy).arrow").write_bytes((data / "images-000004.arrow").read_bytes())
    (data / ".images-000002.arrow.12ab").write_bytes(b"half")

    check = check_shards(tmp_path)
    assert check.missing == (0,)
    assert set(check.damaged) == {1, 2, 3}
    assert check.doubled == {"images-000004 (copy).arrow": "holds images 160 to 199"}
    assert not check.is_whole
    text = describe_check(check)
    assert "1 of 5 files are whole (40 of 200 images)" in text
    assert "Missing: images-000000.arrow (images 0 to 39)" in text
    assert "images-000001.arrow has another SHA-256 than its mark" in text
    assert "images-000002.arrow has 5 bytes instead of" in text
    assert "Write them: python generate.py --model m --shard 1/1" in text
    assert "NUM_SHARDS=5 sbatch --array=1-4 generate.sbatch --model m" in text

    monkeypatch.setattr(sys, "argv", ["generate.py", "--check", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 1
    assert "Doubled: data/images-000004 (copy).arrow" in capsys.readouterr().out

    (data / "images-000004 (copy).arrow").unlink()
    assert write(model, tmp_path, num_images=200).files == (0, 1, 2, 3)
    assert read_files(tmp_path) == expected
    assert check_shards(tmp_path).is_whole


def test_a_file_that_holds_other_images_than_its_mark_is_damaged(model, tmp_path):
    write(model, tmp_path)
    for folder, suffix in (("data", "arrow"), ("done", "json")):
        first, second = (tmp_path / folder / f"images-00000{i}.{suffix}" for i in (0, 1))
        if folder == "data":
            second.write_bytes(first.read_bytes())
        else:
            mark = json.loads(first.read_text()) | {"first": 40, "end": 80}
            second.write_text(json.dumps(mark))
    assert "does not hold the images of its mark" in check_shards(tmp_path).damaged[1]


def test_more_images_extend_the_folder_and_fewer_do_not_shrink_it(model, tmp_path):
    write(model, tmp_path / "a", num_images=50)
    assert write(model, tmp_path / "a", num_images=110).files == (1, 2)
    assert write(model, tmp_path / "a", num_images=50).plan.num_images == 110
    write(model, tmp_path / "b", num_images=110)
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


def test_other_settings_are_refused(model, tmp_path):
    write(model, tmp_path, "1/3")
    with pytest.raises(ValueError, match=r"other settings \(seed differs\)"):
        write(model, tmp_path, "2/3", seed=1)
    with pytest.raises(ValueError, match="images_per_file differs"):
        write(model, tmp_path, "2/3", per_file=50)
    with pytest.raises(ValueError, match="images_per_file"):
        generate_images(GenerationConfig(model, str(tmp_path), format="arrow"))
    with pytest.raises(ValueError, match="no folder of shards"):
        check_shards(tmp_path / "data")


def test_a_stopped_worker_leaves_no_part_of_a_file(model, tmp_path, monkeypatch):
    write(model, tmp_path / "a")
    drawn = []

    def stop(drawer, numbers, config, model, write, *rest):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(draw_missing(drawer, numbers, config, model, write, *rest))

    draw_missing = work.draw_missing
    monkeypatch.setattr(work, "draw_missing", stop)
    with pytest.raises(KeyboardInterrupt):
        write(model, tmp_path / "b")
    assert list(read_files(tmp_path / "b")) == ["images-000000.arrow"]
    monkeypatch.undo()
    assert write(model, tmp_path / "b").files == (1, 2)
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


@pytest.mark.slow
def test_killed_workers_lose_nothing(model, tmp_path):
    """Three workers of overlapping shards are killed, then the same commands run to their end."""
    write(model, tmp_path / "a", num_images=1600, per_file=400)
    words = ["--model", model, "--out", str(tmp_path / "b"), "--num-images", "1600"]
    words += ["--images-per-file", "400", "--format", "arrow", "--precision", "no"]
    words += ["--batch-size", "16"]

    def start(shard):
        argv = [sys.executable, str(ROOT / "generate.py"), *words, "--shard", shard]
        return subprocess.Popen(
            argv,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    first, second = start("1/1"), start("2/2")
    data = tmp_path / "b" / "data"
    limit = time.monotonic() + 120
    while not data.is_dir() or not any(data.iterdir()):
        assert time.monotonic() < limit
        time.sleep(0.01)
    for worker in (first, second):
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert not check_shards(tmp_path / "b").is_whole
    write(model, tmp_path / "b", num_images=1600, per_file=400)
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")
    assert check_shards(tmp_path / "b").is_whole


def test_two_workers_never_write_the_same_file(model, tmp_path):
    plan = Plan(tmp_path, 30, 10, "webdataset")
    (tmp_path / "data").mkdir()
    order, held, free = [], threading.Event(), threading.Event()

    def other():
        with lock(plan.lock(0)):
            held.set()
            free.wait(20)

    def draw(file, path):
        order.append(file)
        path.write_bytes(b"x")
        if len(order) == 2:
            free.set()
        return {}

    thread = threading.Thread(target=other)
    thread.start()
    held.wait(20)
    assert work.write_files(plan, range(3), draw) == [1, 2, 0]
    thread.join()
    assert order == [1, 2, 0]  # the file that another holds comes last
    assert work.write_files(plan, range(3), draw) == []


@pytest.fixture(scope="module")
def labelled_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm")
    pipeline = make_ldm()
    pipeline.register_to_config(pixel_size_nm=4.0)  # some defects lie in 16 pixels
    pipeline.save_pretrained(folder)
    return str(folder)


def write_pairs(model, out, format, labels, shard="1/1"):
    options = find_family("ldm").options(num_inference_steps=2)
    pairs = PairOptions(pairs="simulated", labels=labels)
    values = {"num_images": 6, "batch_size": 4, "precision": "no", "format": format}
    values |= {"pairs": pairs, "shards": ShardOptions(shard, images_per_file=4)}
    return generate_shard(GenerationConfig(model, str(out), options=options, **values))


def test_labels_go_with_their_images(labelled_model, tmp_path):
    write_pairs(labelled_model, tmp_path / "tar", "webdataset", ("coco", "yolo", "masks"))
    for shard in ("2/2", "1/2"):
        write_pairs(labelled_model, tmp_path / "arrow", "arrow", ("coco", "masks"), shard)
    rows = datasets.load_from_disk(str(tmp_path / "arrow"))
    tar = datasets.load_dataset(
        str(tmp_path / "tar" / "data"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows["number"][:] == [each["number"] for each in tar["json"]] == list(range(6))
    num_defects = 0
    for row, sample in zip(rows, tar):
        coco = json.loads(sample["coco"])
        names = {each["id"]: each["name"] for each in coco["categories"]}
        found = coco["annotations"]
        assert [each["bbox"] for each in row["objects"]] == [each["bbox"] for each in found]
        kinds = [names[each["category_id"]] for each in found]
        assert [each["kind"] for each in row["objects"]] == kinds
        for name, column in (("mask", "mask.png"), ("semantic", "semantic.png"), ("image", "png")):
            assert np.array_equal(np.asarray(row[name]), np.asarray(sample[column]))
        assert len(sample["txt"].splitlines()) <= len(found)
        num_defects += len(found)
    assert num_defects > 3
    with pytest.raises(ValueError, match="yolo needs one file per image"):
        write_pairs(labelled_model, tmp_path / "other", "arrow", ("yolo",))


def test_flags_are_refused_with_a_way_out(model, tmp_path):
    base = ["--model", model, "--out", str(tmp_path / "out")]
    for words, message in (
        (["--shard", "1/2"], "--format is png, but shards are arrow or webdataset"),
        (["--format", "webdataset"], "Add --shard 1/1"),
        (["--shard", "3/2", "--format", "arrow"], "--shard is 3/2; give I/N"),
        (["--images-per-file", "5"], "Add --shard 1/1"),
        (["--check", "x"], "only takes the name of a folder"),
        (["--num-images", "20000000"], "Use --format arrow or webdataset with --shard"),
    ):
        with pytest.raises(ValueError, match=message):
            command.parse([*base, *words])
    assert parse_shard("3/20") == (2, 20)
    assert compress([3, 7, 8, 9, 12]) == "3,7-9,12"


def test_workers_that_begin_at_once_do_not_take_each_other_for_strangers(
    model, tmp_path, monkeypatch
):
    """One looks into the new folder at the moment in which another has begun to write there."""
    from em_generation import folder

    def scan_late(out):
        monkeypatch.setattr(folder, "scan_names", scan_names)
        write(model, tmp_path, "1/2")
        return scan_names(out)

    scan_names = folder.scan_names
    monkeypatch.setattr(folder, "scan_names", scan_late)
    (tmp_path / ".locks").mkdir()
    write(model, tmp_path, "2/2")
    assert check_shards(tmp_path).is_whole


def test_strangers_are_refused_also_after_a_look(model, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "start_drawing", start_and_disturb(tmp_path))
    with pytest.raises(ValueError, match="holds other files"):
        write(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"theirs.png", ".locks"}


def start_and_disturb(out):
    def start(*words):
        (out / "theirs.png").write_bytes(b"x")
        return start_drawing(*words)

    start_drawing = work.start_drawing
    return start


def test_check_names_a_missing_index_and_the_command_mends_it(model, tmp_path):
    write(model, tmp_path)
    for name, content in (("state.json", None), ("state.json", "{}"), ("dataset_info.json", None)):
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_text(content)
        found = check_shards(tmp_path)
        assert not found.is_whole
        assert "The index for datasets.load_from_disk is missing" in describe_check(found)
        assert write(model, tmp_path).files == ()
        assert check_shards(tmp_path).is_whole


def test_a_start_writes_the_record_and_the_command_once(model, tmp_path):
    write(model, tmp_path, "1/2")
    names = ("generation.json", ".command")
    before = [(tmp_path / name).stat().st_mtime_ns for name in names]
    write(model, tmp_path, "2/2")
    assert [(tmp_path / name).stat().st_mtime_ns for name in names] == before
