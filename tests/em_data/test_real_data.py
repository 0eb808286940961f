"""Real micrographs of other laboratories, where they lie beside the project."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from em_data import load_data, read_micrograph

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real micrographs in ../shared/data are not here"
)


@pytest.mark.parametrize(
    ("name", "num_micrographs", "num_tiles", "num_labelled", "kinds"),
    [
        ("steel-316l-loops", 17, 16 * 4 + 16, 16, {"hcloop"}),
        ("superalloy-sem", 45, 23 * 4 + 22 * 16, 45, {"1", "2", "#0000ff", "#ff0000"}),
    ],
)
def test_real_set_is_read_whole_and_its_masks_are_labels(
    name, num_micrographs, num_tiles, num_labelled, kinds, config
):
    said = []
    data = load_data(str(SHARED / name), config(resolution=256), log=said.append)
    assert data.summary["num_micrographs"] == num_micrographs
    assert data.summary["num_tiles"] == num_tiles
    assert data.summary["num_labelled_micrographs"] == num_labelled
    assert set(data.summary["kinds"]) == kinds
    assert any(line.startswith("labels from") for line in said)
    assert not any("mask" in micrograph for micrograph in data.summary["held_out"])
    assert data.train.batch([0]).std() > 0.05


def test_three_channel_jpeg_frames_are_grey(config):
    # leaky: the first two frames are near copies, so no other split can part them
    data = load_data(
        str(SHARED / "ti-neutron-loops"),
        config(resolution=1024, num_micrographs=2, split="leaky"),
        log=lambda line: None,
    )
    assert data.summary["num_tiles"] == 8
    path = next((SHARED / "ti-neutron-loops" / "images").iterdir())
    assert np.array_equal(read_micrograph(path).image, np.array(PIL.Image.open(path))[..., 1])


def test_no_label_bar_is_seen_where_there_is_none():
    for path in sorted(SHARED.glob("**/*.png")):
        if "masks" not in path.parent.as_posix():
            assert not read_micrograph(path).metadata["notices"], path.name
