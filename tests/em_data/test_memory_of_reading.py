"""Cutting a large micrograph takes a few times its size, measured in a process of its own."""

import subprocess
import sys

import imagecodecs
import numpy as np
import pytest
import tifffile

SIDE = 4000
CHILD = """
import resource, sys
from em_data import DataConfig, load_tiles

def cut(source):
    config = DataConfig(resolution=256, num_micrographs=1, cache_dir=sys.argv[2])
    load_tiles(source, config, log=lambda text: None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = cut("synthetic")
print(cut(sys.argv[1]) - before)
"""


def make_large(dtype):
    rows = np.random.default_rng(0).integers(20, 200, (100, SIDE)).astype(dtype)
    return np.concatenate([np.roll(rows, 17 * i, axis=1) for i in range(SIDE // 100)])


@pytest.mark.parametrize(
    ("kind", "most"), [("uint16", 3.0), ("int16", 3.0), ("float32", 2.5), ("png", 4.5)]
)
def test_a_large_micrograph_takes_a_few_times_its_size(kind, most, tmp_path):
    image = make_large(np.uint8 if kind == "png" else kind)
    if kind == "int16":
        image[: SIDE // 50] = 900  # more than 0.1 % of the pixels, but no fill value
    folder = tmp_path / "set"
    folder.mkdir()
    if kind == "png":
        (folder / "large.png").write_bytes(imagecodecs.png_encode(image, level=1))
    else:
        tifffile.imwrite(folder / "large.tif", image)
    command = [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "cache")]
    added = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert added < most * image.nbytes
