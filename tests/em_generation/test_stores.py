"""Where images go: files and Arrow tables, after kills and beside other processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from em_data import load_data, read_image_folder
from em_data.config import DataConfig
from em_data.files import lock
from em_data.sources import open_source
from em_diffusion.drawing import LDMDrawer
from em_generation.generate import generate_images, write_preview
from em_generation.store import ArrowStore, FileStore, cut_into_shards
from support.commands import TORCHRUN
from support.generation import config_for, read
from support.models import make_ldm, make_stylegan

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bits", [8, 16])
def test_arrow_holds_the_levels_of_the_files(model, tmp_path, bits, monkeypatch):
    import datasets
    import tifffile

    monkeypatch.setattr(
        "em_generation.store.cut_into_shards", lambda numbers: cut_into_shards(numbers, size=4)
    )
    options = {"bits": bits, "num_images": 11, "batch_size": 16}
    generate_images(config_for(model, tmp_path / "files", format="tiff", **options))
    record = generate_images(config_for(model, tmp_path / "arrow", format="arrow", **options))
    assert record["timed_images"] == 11
    expected = np.stack([tifffile.imread(tmp_path / "files" / f"{i:06d}.tif") for i in range(11)])
    dataset = datasets.load_from_disk(str(tmp_path / "arrow"))
    assert isinstance(dataset.features["image"], datasets.Image)
    assert dataset[0]["image"].mode == {8: "L", 16: "I;16"}[bits]
    assert dataset.with_format("numpy")[0]["image"].dtype == f"uint{bits}"
    np.testing.assert_array_equal(dataset.with_format("numpy")[:]["image"], expected)
    assert dataset["number"][:] == list(range(11))
    assert len(list((tmp_path / "arrow").glob("*.arrow"))) == 3
    images, files = read_image_folder(tmp_path / "arrow"), read_image_folder(tmp_path / "files")
    assert len(images) == len(files) == 11
    assert images.shape == files.shape
    assert torch.equal(images.batch(range(2, 11)), files.batch(range(2, 11)))
    # and as a source of micrographs, by the folder's name alone
    side = expected.shape[1]
    config = DataConfig(
        resolution=side, num_micrographs=None, downsample=1, cache_dir=str(tmp_path / "cache")
    )
    lines = []
    data = load_data(str(tmp_path / "arrow"), config, log=lines.append)
    num_left_out = "\n".join(lines).count("one grey level")  # untrained StyleGANs draw such images
    assert data.summary["num_micrographs"] + num_left_out == 11
    opened = open_source(str(tmp_path / "arrow"), config, None)
    assert len(opened.entries) == 11
    np.testing.assert_array_equal(opened.entries[3].read().image, expected[3])
    assert opened.entries[3].read().image.dtype == expected.dtype


def test_arrow_goes_on_after_a_kill_and_grows(model, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(
        "em_generation.store.cut_into_shards", lambda numbers: cut_into_shards(numbers, size=4)
    )
    config = config_for(model, tmp_path, format="arrow", num_images=10, batch_size=16)
    generate_images(config)

    def levels():
        dataset = datasets.load_from_disk(str(tmp_path)).with_format("numpy")[:]
        assert dataset["number"].tolist() == list(
            range(len(dataset["number"]))
        )  # no duplicate, no gap, in order
        return dataset["image"]

    whole, fingerprint = levels(), datasets.load_from_disk(str(tmp_path))._fingerprint
    (tmp_path / "images-000004-000008.arrow").unlink()
    (tmp_path / ".images-000004-000008.arrow.123").write_bytes(b"half")
    generate_images(config)
    np.testing.assert_array_equal(levels(), whole)
    assert not list(tmp_path.glob(".images*"))
    generate_images(replace(config, num_images=17))
    assert len(levels()) == 17
    np.testing.assert_array_equal(levels()[:10], whole)
    assert datasets.load_from_disk(str(tmp_path))._fingerprint != fingerprint
    with pytest.raises(ValueError, match="format, stored_as differ"):
        generate_images(replace(config, format="png"))


def test_shards_are_runs_within_blocks():
    assert cut_into_shards([0, 1, 2, 3, 4, 6, 9, 10], size=4) == [
        range(4),
        range(4, 5),
        range(6, 7),
        range(9, 11),
    ]
    assert cut_into_shards([]) == []


@pytest.mark.parametrize("format", ["png", "arrow"])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_what_is_missing_without_gap_or_duplicate(tmp_path, format, num_processes):
    make = (
        (lambda: ArrowStore(tmp_path, 8, None))
        if format == "arrow"
        else (lambda: FileStore(tmp_path, "png", 8, None))
    )
    missing = [i for i in range(1500) if i % 700 > 5]
    shares = [make().share(missing, rank, num_processes) for rank in range(num_processes)]
    assert sorted(number for share in shares for number in share) == missing
    assert max(map(len, shares)) - min(map(len, shares)) <= (256 if format == "arrow" else 1)


def test_a_scan_of_50000_files_takes_moments(tmp_path):
    import time

    for i in range(50_000):
        os.close(os.open(tmp_path / f"{i:06d}.png", os.O_CREAT))
    started = time.process_time()
    assert FileStore(tmp_path, "png", 8, None).find_missing(50_010) == list(range(50_000, 50_010))
    assert time.process_time() - started < 2


def test_images_with_and_without_grain_are_drawn_at_once(tmp_path, monkeypatch):
    """They equal those of two generations to the byte, also after a kill between the folders."""
    make_ldm().save_pretrained(tmp_path / "ldm")

    def make(name, grain=True, num_images=37):
        out = tmp_path / name
        sizes = {"num_images": num_images, "batch_size": 16}
        return config_for(tmp_path / "ldm", out, grain=grain, **sizes)

    def read_files(name):
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")}

    generate_images(make("grain"))
    generate_images(make("bare", False))
    draw, calls = LDMDrawer._denoise, []

    def count(self, rngs, *arguments, **options):
        calls.append(len(rngs))
        return draw(self, rngs, *arguments, **options)

    monkeypatch.setattr(LDMDrawer, "_denoise", count)
    generate_images(make("grain-2"), bare=make("bare-2", False))
    generate_images(make("bare-2", False))
    assert calls == [16, 16, 16]
    assert read_files("grain-2") == read_files("grain")
    assert read_files("bare-2") == read_files("bare")
    for name, of in (("grain-2", "grain"), ("bare-2", "bare")):
        records = [
            json.loads((tmp_path / each / "generation.json").read_text()) for each in (name, of)
        ]
        assert records[0]["settings"] == records[1]["settings"]
        assert records[0]["num_images"] == 37

    for folder, numbers in (("bare-2", (3, 5)), ("grain-2", (4, 5))):
        for number in numbers:
            (tmp_path / folder / f"{number:06d}.png").unlink()
    calls.clear()
    generate_images(make("grain-2"), bare=make("bare-2", False))
    generate_images(make("bare-2", False))
    assert calls == [16, 16, 16]  # number 5 for both, 4, 3; padded
    assert read_files("grain-2") == read_files("grain")
    assert read_files("bare-2") == read_files("bare")


def test_no_folder_is_made_for_a_model_without_grain(tmp_path):
    pipeline = make_ldm()
    pipeline.grain = None
    pipeline.save_pretrained(tmp_path / "ldm")
    config = config_for(tmp_path / "ldm", tmp_path / "images")
    bare = config_for(tmp_path / "ldm", tmp_path / "bare", grain=False)
    generate_images(config, bare=bare)
    assert len(read(tmp_path / "images")) == 7
    assert not (tmp_path / "bare").exists()


@pytest.mark.parametrize("options", [{"size": "8x9"}, {}])
def test_a_refused_generation_leaves_nothing(tmp_path, monkeypatch, options):
    def refuse(*images):
        raise ValueError("images are too bad in size")

    make_ldm().save_pretrained(tmp_path / "ldm")
    monkeypatch.setattr("em_generation.sampling.write_when_ready", refuse)  # without a wrong size
    out = tmp_path / "images" / "new"
    with pytest.raises(ValueError, match="size"):
        generate_images(config_for(tmp_path / "ldm", out, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["ldm"]
    out.mkdir(parents=True)
    with pytest.raises(ValueError, match="size"):
        generate_images(config_for(tmp_path / "ldm", out, **options))
    assert list(out.iterdir()) == []


def test_two_generations_in_one_folder_are_refused(model, tmp_path):
    with (
        lock(tmp_path / ".lock"),
        pytest.raises(ValueError, match="Another process generates into"),
    ):
        generate_images(config_for(model, tmp_path))
    generate_images(config_for(model, tmp_path, num_images=1))


@pytest.mark.parametrize("format", ["png", pytest.param("arrow", marks=pytest.mark.slow)])
def test_kills_leave_whole_images_and_the_rest_is_filled_in(tmp_path, format):
    """kill -9 in the middle, then two processes, then one: equal to one run, to the bit."""
    import datasets

    make_ldm().save_pretrained(tmp_path / "ldm")
    flags = [
        "--model",
        tmp_path / "ldm",
        "--num-images",
        "1200",
        "--batch-size",
        "16",
        "--precision",
        "no",
        "--format",
        format,
        "--num-inference-steps",
        "2",
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "generate.py", "--out", tmp_path / "killed", *flags]
    torchrun = [
        *TORCHRUN,
        *command[1:],
    ]

    def count():
        names = [
            path.name
            for path in (tmp_path / "killed").glob("[!.]*")
            if path.suffix in (".png", ".arrow")
        ]
        return len(names)

    reached = 0
    for arguments in (command, command):
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and count() <= reached:
            pass
        assert process.poll() is None, "it came to its end before it was killed"
        process.kill()
        process.wait()
        assert count() > reached  # nothing is lost
        reached = count()
    subprocess.run(
        torchrun, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300
    )
    subprocess.run(
        [sys.executable, "generate.py", "--out", tmp_path / "whole", *flags],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    if format == "arrow":
        killed, whole = (
            datasets.load_from_disk(str(tmp_path / name)).with_format("numpy")[:]
            for name in ("killed", "whole")
        )
        assert killed["number"].tolist() == list(range(1200))
        np.testing.assert_array_equal(killed["image"], whole["image"])
    else:
        assert len(read(tmp_path / "killed")) == 1200
        np.testing.assert_array_equal(read(tmp_path / "killed"), read(tmp_path / "whole"))
        assert not list((tmp_path / "killed").glob(".0*"))
    assert json.loads((tmp_path / "killed" / "generation.json").read_text())["num_images"] == 1200


def test_the_preview_lies_beside_the_images_and_is_none_of_them(tmp_path):
    make_stylegan().save_pretrained(tmp_path / "stylegan2")
    for form in ("png", "arrow"):
        out = tmp_path / form / "images"
        generate_images(config_for(tmp_path / "stylegan2", out, num_images=5, format=form))
        path = write_preview(out)
        assert path == tmp_path / form / "images-preview.png"
        with Image.open(path) as picture:
            # 3 by 2 of 16 pixels, gaps of 2, enlarged, and the strip of the scale bar
            assert picture.size == (520, 340 + 36)
        assert len(read_image_folder(out)) == 5


def test_images_of_a_diverged_model_are_refused(tmp_path):
    pipeline = make_stylegan()
    with torch.no_grad():
        next(pipeline.generator.synthesis_network.parameters()).fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "stylegan2")
    with pytest.raises(ValueError, match=r"not finite.*diverged"):
        generate_images(config_for(tmp_path / "stylegan2", tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_full_disk_is_a_sentence_and_a_closed_output_changes_nothing(tmp_path, monkeypatch):
    import errno

    make_stylegan().save_pretrained(tmp_path / "stylegan2")
    config = config_for(tmp_path / "stylegan2", tmp_path / "out")

    def full(self, numbers, images):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(FileStore, "write", full)
        with pytest.raises(OSError, match=r"out cannot be written.*saved before is whole"):
            generate_images(config)

    flags = ["--model", config.model, "--out", config.out, "--num-images", "7", "--precision", "no"]
    process = subprocess.Popen(
        [sys.executable, "generate.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 7


def test_a_narrow_preview_is_enlarged(tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    with Image.open(write_preview(tmp_path)) as preview:
        assert preview.size == (512, 512)
