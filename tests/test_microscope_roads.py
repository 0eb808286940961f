"""From a look at microscopes' files to the report of a model that was trained on them."""

import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from support.microscope_files import make_dm, write_velox

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def draw(seed, num=1):
    """Return uint16 [num, 128, 192]: frames of bright discs, with noise of their own."""
    rng = np.random.default_rng(seed)
    scene = ndimage.gaussian_filter(rng.normal(size=(128, 192)), 3)
    scene = 20000 + 20000 * (scene > scene.std())
    return (scene + rng.normal(0, 2000, (num, 128, 192))).clip(0, 65535).astype(np.uint16)


def write_stack(folder):
    options = {"imagej": True, "resolution": (1 / 2.0, 1 / 2.0)}
    axes = {"axes": "TYX", "unit": "nm"}
    tifffile.imwrite(folder / "heat.tif", draw(0, 12), metadata=axes, **options)
    for i in range(3):
        one = {"axes": "YX", "unit": "nm"}
        tifffile.imwrite(folder / f"area{i}.tif", draw(1 + i)[0], metadata=one, **options)


def write_mixed(folder):
    """Three formats, each with a pixel size of its own: 0.5, 1 and 2 nm."""
    for i in range(2):
        dm = make_dm([(draw(i)[0], {"scale": 0.5, "unit": "nm"})])
        (folder / f"gatan{i}.dm4").write_bytes(dm)
        per_nm = {"resolution": (1.0, 1.0), "metadata": {"unit": "nm"}}
        tifffile.imwrite(folder / f"imagej{i}.tif", draw(10 + i)[0], imagej=True, **per_nm)
        picture = Image.fromarray((draw(20 + i)[0] // 257).astype(np.uint8))
        picture.save(folder / f"picture{i}.png", dpi=(0.0254 / 2e-9,) * 2)


def write_emd(folder):
    """Three scans, each of 2 frames of one detector and a picture of another."""
    for i in range(3):
        haadf, bright = (np.moveaxis(draw(10 * i + k, 2 - k), 0, -1) for k in range(2))
        write_velox(folder / f"scan{i}.emd", {"HAADF": (haadf, 5e-10), "BF": (bright, 5e-10)})


@pytest.fixture(autouse=True)
def extra():
    reason = 'RosettaSciIO is not installed: pip install "em-synthesis[microscopes]"'
    pytest.importorskip("rsciio", reason=reason)
    pytest.importorskip("h5py", reason=reason)


def run(*words):
    result = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def go(write, tmp_path):
    """Return what the look and the training print, the report, and its page.

    The training has the flags that the look recommends, as it prints them.
    """
    data, cache = tmp_path / "data", ("--tiles.cache-dir", tmp_path / "cache")
    data.mkdir()
    write(data)
    looked = run("-m", "em_data.look", data, "--out", tmp_path / "look", *cache)
    flags = re.findall(r"--data \S+ (--tiles\.resolution.*)", looked)[-1]
    words = ["--data", data, "--out", tmp_path / "run", *shlex.split(flags)]
    trained = run("train_gan.py", "test", *words, "--generator.channel-base", "256")
    out = ("--num-images", "12", "--out", tmp_path / "report")
    run("evaluate.py", "--models", tmp_path / "run", *out)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    return looked, trained, report, (tmp_path / "report" / "report.html").read_text()


def list_held_out(report):
    """Return {file: its held-out micrographs}."""
    names = report["dataset"]["held_out"]
    files = sorted({name.partition("#")[0] for name in names})
    return {file: [name for name in names if name.partition("#")[0] == file] for file in files}


def read_text(page):
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", page)).split())


def test_a_stack_of_12_frames(tmp_path):
    looked, trained, report, page = go(write_stack, tmp_path)
    assert "data: 15 micrographs in 4 files" in looked
    assert "stacks: 1 file of 12 frames. Frames of one file are kept on one side" in looked
    assert "pixel size: 2 nm\n" in looked
    assert "Neighbouring frames of stacks are almost equal" in looked
    said = "heat.tif#0000: stack of 12 frames: each is a micrograph; no split parts them"
    assert said in looked
    assert said in trained
    assert said in page
    held_out = list_held_out(report)
    assert 0 < len(held_out) < 4
    frames = [f"heat.tif#{i:04d}" for i in range(12)]
    assert held_out.get("heat.tif", frames) == frames
    assert report["dataset"]["pixel_size_nm"] == pytest.approx(2)
    assert "2.00 nm per pixel" in read_text(page)


def test_a_folder_of_three_formats_with_three_pixel_sizes(tmp_path):
    looked, trained, report, page = go(write_mixed, tmp_path)
    assert "data: 6 micrographs in 6 files" in looked
    assert "pixel size: 0.5 nm (2), 1 nm (2), 2 nm (2)" in looked
    assert "Warning: Pixel sizes differ (0.5 to 2 nm)" in looked
    said = "pixel sizes differ or are partly unknown (0.5 to 2 nm): unknown"
    assert said in trained
    assert said in report["dataset"]["notices"]
    assert said in page
    assert report["dataset"]["pixel_size_nm"] is None
    assert "The pixel size is not known, so there is no scale bar." in read_text(page)
    assert "2 micrographs of 8 bits beside them" in trained


def test_velox_files_of_two_detectors(tmp_path):
    looked, trained, report, page = go(write_emd, tmp_path)
    assert "data: 9 micrographs in 3 files" in looked
    assert "stacks: 3 files of 2 frames." in looked
    assert "pixel size: 0.5 nm\n" in looked
    assert re.search(r"scan0\.emd#\w+(#0000)?: 2 images \((HAADF, BF|BF, HAADF)\)", trained)
    held_out = list_held_out(report)
    assert 0 < len(held_out) < 3
    for file, names in held_out.items():
        assert sorted(names) == [f"{file}#{each}" for each in ("BF", "HAADF#0000", "HAADF#0001")]
    assert report["dataset"]["pixel_size_nm"] == pytest.approx(0.5)
    assert "0.500 nm per pixel" in read_text(page)
