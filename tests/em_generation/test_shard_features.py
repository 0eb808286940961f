"""evaluate.py --features-of and --merge: many workers' features equal those of one evaluation."""

import json
import sys

import numpy as np
import pytest
import torch

from em_commands import evaluate as command
from em_data import read_image_folder
from em_evaluation import compute_features
from em_evaluation.distances import frechet_distance
from em_evaluation.extractor import Extractor
from em_evaluation.images import read_images
from em_evaluation.moments import Moments
from em_generation.generate import GenerationConfig
from em_generation.shards import features, merge
from em_generation.shards.features import find_folder, read_feature_file, write_features
from em_generation.shards.merge import merge_features
from em_generation.shards.plan import ShardOptions
from em_generation.shards.work import generate_shard
from support.models import make_stylegan

NUM, PER_FILE = 160, 48


class Blocks(Extractor):
    """Means of blocks of 4 x 4 pixels, and their squares."""

    name, identity, num_features = "blocks", "blocks 4 x 4", 32

    def _features(self, images):
        means = torch.nn.functional.avg_pool2d(images, 4).flatten(1)
        return torch.cat([means, 100 * means**2], 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stylegan")
    make_stylegan().save_pretrained(folder)
    return str(folder)


def generate(model, out, **changes):
    values = {"num_images": NUM, "batch_size": 16, "precision": "no", "format": "arrow"} | changes
    shards = ShardOptions("1/1", images_per_file=PER_FILE)
    generate_shard(GenerationConfig(model, str(out), shards=shards, **values))


@pytest.fixture(scope="module")
def images(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "out"
    generate(model, out)
    return out


@pytest.fixture
def out(images, tmp_path):
    """A folder of shards without features of its own."""
    copy = tmp_path / "out"
    copy.mkdir()
    for path in images.iterdir():
        if path.name in ("data", "done"):
            (copy / path.name).symlink_to(path)
        elif path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def read_features(out):
    return {path.name: path.read_bytes() for path in find_folder(out, Blocks()).iterdir()}


def test_merged_features_equal_those_of_one_evaluation(out):
    extractor = Blocks()
    for shard in ("2/3", "1/3", "3/3"):
        write_features(out, shard, [extractor], batch_size=16)
    merged = merge_features(find_folder(out, extractor), NUM, seed=0)
    folder = read_image_folder(out)
    rows = compute_features(read_images(folder, NUM), extractor, batch_size=16, use_cache=False)
    assert rows is not None
    whole = Moments.of(rows)
    assert merged.moments.num == NUM
    np.testing.assert_allclose(merged.moments.mean, whole.mean, rtol=1e-9)
    scale = np.abs(whole.scatter).max()
    np.testing.assert_allclose(merged.moments.scatter, whole.scatter, rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_array_equal(merged.kept, rows.astype(np.float16))
    sample = merge_features(find_folder(out, extractor), 30, seed=0)
    assert len(set(sample.numbers)) == len(sample.kept) == 30
    np.testing.assert_array_equal(sample.kept, rows[sample.numbers].astype(np.float16))


def test_bytes_are_equal_whatever_the_shards(out):
    assert write_features(out, "1/1", [Blocks()], batch_size=16) == 4
    expected = read_features(out)
    for path in find_folder(out, Blocks()).iterdir():
        path.unlink()
    for shard in ("2/2", "1/4", "1/1"):
        write_features(out, shard, [Blocks()], batch_size=16)
    assert read_features(out) == expected
    assert write_features(out, "1/1", [Blocks()], batch_size=16) == 0


def test_damaged_features_are_written_again(out):
    write_features(out, "1/1", [Blocks()])
    expected = read_features(out)
    paths = sorted(find_folder(out, Blocks()).iterdir())
    content = bytearray(paths[0].read_bytes())
    content[-1] ^= 1
    paths[0].write_bytes(content)
    paths[1].write_bytes(b"short")
    with pytest.raises(ValueError, match=r"images-000000.safetensors is damaged: its SHA-256"):
        read_feature_file(paths[0])
    with pytest.raises(ValueError, match=r"images-000001.safetensors is damaged"):
        merge_features(find_folder(out, Blocks()), 10, seed=0)
    said = []
    assert write_features(out, "1/1", [Blocks()], log=said.append) == 2
    assert len(said) == 2
    assert read_features(out) == expected


def test_missing_images_and_missing_features_are_named(model, tmp_path):
    generate(model, tmp_path)
    (tmp_path / "done" / "images-000001.json").unlink()
    with pytest.raises(ValueError, match=r"lacks whole files of images: images-000001.arrow"):
        write_features(tmp_path, "1/1", [Blocks()])
    assert len(read_features(tmp_path)) == 3
    folder = find_folder(tmp_path, Blocks())
    with pytest.raises(ValueError, match="features of images 48 to 95 are missing"):
        merge_features(folder, 10, seed=0)
    generate(model, tmp_path)
    assert write_features(tmp_path, "1/1", [Blocks()]) == 1
    (folder / "images-000003.safetensors").rename(tmp_path / "x")
    with pytest.raises(ValueError, match="features of images 144 to 159 are missing"):
        merge_features(folder, 10, seed=0)
    (tmp_path / "x").rename(folder / "images-000003.safetensors")
    (folder / "images-000009.safetensors").write_bytes(
        (folder / "images-000000.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="features of images 0 to 47 are doubled"):
        merge_features(folder, 10, seed=0)


def test_features_of_changed_images_are_written_again(model, tmp_path):
    generate(model, tmp_path, num_images=NUM - 30)
    write_features(tmp_path, "1/1", [Blocks()])
    generate(model, tmp_path)
    assert write_features(tmp_path, "1/1", [Blocks()], log=lambda line: None) == 2
    assert merge_features(find_folder(tmp_path, Blocks()), 5, seed=0).moments.num == NUM


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    command.main()


def test_commands_print_the_distance_of_all_images(out, model, tmp_path, monkeypatch, capsys):
    for module in (merge,):
        monkeypatch.setattr(module, "create_extractors", lambda *_: [Blocks()])
    generate(model, tmp_path / "real", seed=5, num_images=100)
    run(monkeypatch, "--features-of", out, "--shard", "1/2")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--merge", out, "--reference", tmp_path / "real", "--out", tmp_path / "e")
    assert stop.value.code == 2
    run(monkeypatch, "--features-of", out, "--shard", "2/2")
    words = ("--reference", tmp_path / "real", "--out", tmp_path / "e")
    words += ("--num-images", 100, "--cache-dir", tmp_path / "cache")
    run(monkeypatch, "--merge", out, *words)
    printed = capsys.readouterr().out
    assert "Frechet distance of all images to 100 real ones" in printed
    assert "Of 100 images drawn at random" in printed
    result = json.loads((tmp_path / "e" / "merged.json").read_text())
    row = result["measurements"][0]["rows"]["out"]
    options = {"batch_size": 16, "use_cache": False}
    a, b = (
        compute_features(read_images(read_image_folder(folder), num), Blocks(), **options)
        for folder, num in ((out, NUM), (tmp_path / "real", 100))
    )
    found = row["frechet_distance"]
    assert found["value"] == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert found["low"] < found["value"] < found["high"]
    assert row["num_images"] == NUM
    assert set(row["kept"]) >= {"precision", "recall", "frechet_distance"}

    run(monkeypatch, "--merge", find_folder(out, Blocks()), *words)  # a folder of features alone
    again = json.loads((tmp_path / "e" / "merged.json").read_text())
    (name,) = again["measurements"][0]["rows"]
    assert again["measurements"][0]["rows"][name] == row


def test_flags_that_a_step_does_not_use_are_refused(out, monkeypatch, capsys):
    for words, message in (
        (["--features-of", out, "--models", "x"], "--features-of has no use for --models"),
        (["--features-of", out, "--merge", out], "Give one of them"),
        (["--shard", "1/2"], "--shard needs --features-of"),
        (["--merge", out / "data"], "holds no features"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, *words)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("change", ["unmarked", "written anew"])
def test_images_that_change_meanwhile_get_no_features(model, tmp_path, monkeypatch, change):
    """A generator extends the last file while another process computes its features."""
    out = tmp_path / "out"
    generate(model, out)
    compute, mark = features.compute_features, out / "done" / "images-000003.json"

    def compute_and_change(images, *words, **options):
        found = compute(images, *words, **options)
        if len(images) < PER_FILE:  # the last file
            mark.unlink()
            if change == "written anew":
                generate(model, out, num_images=NUM + 8)
        return found

    monkeypatch.setattr(features, "compute_features", compute_and_change)
    with pytest.raises(ValueError, match=r"lacks whole files of images: images-000003\.arrow"):
        write_features(out, "1/1", [Blocks()])
    monkeypatch.undo()
    generate(model, out, num_images=NUM + 8)
    assert write_features(out, "1/1", [Blocks()]) == 1
    assert merge_features(find_folder(out, Blocks()), 1, 0).moments.num == NUM + 8


def test_features_of_other_images_are_not_merged(model, tmp_path):
    out = tmp_path / "out"
    generate(model, out)
    write_features(out, "1/1", [Blocks()])
    files = merge.list_feature_files(find_folder(out, Blocks()))
    merge.check_images(out, files)
    generate(model, out, num_images=NUM + 8)  # the last file is another one now
    with pytest.raises(ValueError, match=r"not those of the present images: images-000003\.arrow"):
        merge.check_images(out, files)
    (out / "done" / "images-000000.json").unlink()
    with pytest.raises(ValueError, match=r"images-000000\.arrow .* images-000003\.arrow"):
        merge.check_images(out, files)
    merge.check_images(find_folder(out, Blocks()), files)  # nothing to compare with
