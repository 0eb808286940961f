"""Stacks of frames: every frame is a micrograph, and no split parts them."""

import io

import numpy as np
import pytest
import tifffile

from em_data import load_data, read_micrograph
from em_data.reading import read_micrographs

RNG = np.random.default_rng(3)
FRAMES = RNG.integers(0, 65536, (5, 40, 56), dtype=np.uint16)


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def pages(arrays, **options):
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for array in arrays:
            writer.write(array, contiguous=False, metadata=None, **options)
    return buffer.getvalue()


def ome(array, axes, **options):
    return tiff(array, ome=True, metadata={"axes": axes}, photometric="minisblack", **options)


def imagej_with_one_page():
    """More frames than pages, as ImageJ writes beyond 4 GB."""
    data = tiff(FRAMES, imagej=True)
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        position = tif.pages[0].offset
    num_tags = int.from_bytes(data[position : position + 2], "big")
    end = position + 2 + 12 * num_tags
    return data[:end] + bytes(4) + data[end + 4 :]


STACKS = {
    "imagej": tiff(FRAMES, imagej=True),
    "imagej hyperstack of one channel": tiff(
        FRAMES[:, None], imagej=True, metadata={"axes": "TCYX"}
    ),
    "imagej with one page": imagej_with_one_page(),
    "pages": pages(FRAMES),
    "compressed pages": pages(FRAMES, compression="zlib"),
    "big-endian": tiff(FRAMES, byteorder=">", photometric="minisblack"),
    "one page, described": tiff(FRAMES, photometric="minisblack", truncate=True),
    "volume in one page": tiff(
        FRAMES, photometric="minisblack", volumetric=True, tile=(16, 16, 16)
    ),
    "ome": ome(FRAMES, "TYX"),
    "ome z": ome(FRAMES, "ZYX", bigtiff=True),
}


@pytest.mark.parametrize("kind", STACKS)
def test_every_frame_is_a_micrograph_with_its_number(kind, tmp_path):
    path = tmp_path / "stack.tif"
    path.write_bytes(STACKS[kind])
    read = list(read_micrographs(path, name="stack.tif"))
    assert [each.name for each in read] == [f"stack.tif#{i:04d}" for i in range(5)]
    assert [each.metadata["frame"] for each in read] == [0, 1, 2, 3, 4]
    for each, frame in zip(read, FRAMES, strict=True):
        assert each.image.dtype == np.uint16
        assert np.array_equal(each.image, frame)
    notice = "stack of 5 frames: each is a micrograph; no split parts them"
    assert [notice in each.metadata["notices"] for each in read] == [True] + [False] * 4


def test_every_kth_frame_is_read():
    read = list(read_micrographs(STACKS["pages"], name="x", frame_step=2))
    assert [each.metadata["frame"] for each in read] == [0, 2, 4]
    assert all(np.array_equal(each.image, FRAMES[each.metadata["frame"]]) for each in read)


def test_one_micrograph_of_a_stack_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"x\.tif: a stack of frames.*file of its own"):
        read_micrograph(STACKS["pages"], name="x.tif")


def test_frame_that_cannot_be_used_is_named_and_the_others_go_on():
    frames = FRAMES.astype(np.float32) / 7
    frames[1, ::2] = np.nan
    frames = iter(read_micrographs(pages(frames), name="x"))
    next(frames)
    with pytest.raises(ValueError, match="x#0001: 1120 pixels are NaN"):
        next(frames)
    assert [each.metadata["frame"] for each in frames] == [2, 3, 4]


def test_frame_that_is_cut_short_is_named_and_the_others_go_on():
    data = imagej_with_one_page()[: 5 * 40 * 56 * 2 - 500]
    frames = read_micrographs(data, name="x")
    assert [next(frames).metadata["frame"] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="x#0004: truncated"):
        next(frames)
    assert next(frames, None) is None


def save_stacks(folder, num):
    for i in range(num):
        stack = RNG.integers(0, 256, (6, 32, 48), dtype=np.uint8)
        tifffile.imwrite(folder / f"{i}.tif", stack, photometric="minisblack")


def test_no_split_parts_the_frames_of_a_stack(tmp_path, config):
    save_stacks(tmp_path, 4)
    data = load_data(tmp_path, config(held_out_fraction=0.25), log=lambda text: None)
    held_out = data.summary["held_out"]
    assert len(held_out) == 6
    assert len({name.split("#")[0] for name in held_out}) == 1
    assert data.summary["num_micrographs"] == 24
    assert any("stack of 6 frames" in notice for notice in data.summary["notices"])


def test_frame_step_gives_other_tiles(tmp_path, config):
    save_stacks(tmp_path, 2)
    few, every = (
        load_data(tmp_path, config(frame_step=step), log=lambda text: None) for step in (4, 1)
    )
    assert few.summary["num_micrographs"] == 4
    assert every.summary["num_micrographs"] == 12
    assert few.summary["fingerprint"] != every.summary["fingerprint"]


def test_lone_stack_cannot_be_split_and_the_error_says_what_to_do(tmp_path, config):
    save_stacks(tmp_path, 1)
    said = r"only one stack of 6 frames, which no split parts, \(0\.tif\).*--tiles\.split leaky"
    with pytest.raises(ValueError, match=said):
        load_data(tmp_path, config(), log=lambda text: None)
    data = load_data(tmp_path, config(split="leaky"), log=lambda text: None)
    assert data.summary["num_micrographs"] == 6


def test_bad_frames_of_a_stack_are_told_a_few_by_name(tmp_path, config):
    stack = RNG.integers(0, 256, (12, 32, 48), dtype=np.uint8)
    stack[2:] = 7
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    data = load_data(tmp_path, config(split="leaky"), log=lambda text: None)
    ignored = data.summary["ignored"]
    assert ignored[0] == "a.tif#0002: constant: every pixel is 7"
    assert ignored[5] == "a.tif: 5 more frames cannot be used"
    assert data.summary["num_micrographs"] == 2
