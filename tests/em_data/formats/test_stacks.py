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


CHANNELS = FRAMES[:4].reshape(2, 2, 40, 56)  # of two detectors, or of two times
HYPERSTACKS = {  # file, and axes of its leading two dimensions
    "imagej": (tiff(CHANNELS, imagej=True, metadata={"axes": "TCYX"}), "TC"),
    "imagej with slices": (tiff(CHANNELS, imagej=True, metadata={"axes": "ZCYX"}), "TC"),
    "ome": (ome(CHANNELS, "TCYX"), "TC"),
    "ome, channels apart": (ome(CHANNELS, "CTYX", bigtiff=True), "CT"),
    "ome, compressed": (ome(CHANNELS, "CTYX", compression="zlib"), "CT"),
    "described": (tiff(CHANNELS, photometric="minisblack", metadata={"axes": "CTYX"}), "CT"),
}


@pytest.mark.parametrize("kind", HYPERSTACKS)
def test_channels_are_named_apart_from_frames(kind):
    data, axes = HYPERSTACKS[kind]
    read = {each.name: each for each in read_micrographs(data, name="x.tif")}
    assert sorted(read) == [f"x.tif#C{channel}#{i:04d}" for channel in (1, 2) for i in (0, 1)]
    for name, each in read.items():
        channel, frame = int(name[7]) - 1, int(name[-1])
        assert each.metadata["frame"] == frame
        at = (frame, channel) if axes == "TC" else (channel, frame)
        assert np.array_equal(each.image, CHANNELS[at])
    notices = next(iter(read.values())).metadata["notices"]
    assert "stack of 2 frames: each is a micrograph; no split parts them" in notices
    assert any(each.startswith("2 channels, named #C1 to #C2") for each in notices)
    every_second = [each.name for each in read_micrographs(data, name="x.tif", frame_step=2)]
    assert sorted(every_second) == ["x.tif#C1#0000", "x.tif#C2#0000"]


def test_two_detectors_of_one_scan_are_no_stack():
    data = tiff(FRAMES[:2], imagej=True, metadata={"axes": "CYX", "mode": "composite"})
    read = list(read_micrographs(data, name="x.tif"))
    assert [each.name for each in read] == ["x.tif#C1", "x.tif#C2"]
    assert not any("frame" in each.metadata for each in read)
    assert not any("stack" in notice for notice in read[0].metadata["notices"])
    maps = tiff(FRAMES, imagej=True, metadata={"axes": "CYX", "mode": "composite"})
    assert [each.name for each in read_micrographs(maps, name="x")] == [
        f"x#C{i}" for i in range(1, 6)
    ]


def test_a_stack_told_as_many_channels_is_read_as_frames_and_said():
    """tifffile writes the frames of a stack so if it is given no axes."""
    for data in (STACKS["imagej"], tiff(FRAMES, ome=True, photometric="minisblack")):
        first, *_ = read = list(read_micrographs(data, name="x"))
        assert [each.name for each in read] == [f"x#{i:04d}" for i in range(5)]
        assert any("tells 5 channels and no frames" in each for each in first.metadata["notices"])


def test_a_damaged_header_tells_no_channels():
    data = HYPERSTACKS["imagej"][0].replace(b"channels=2", b"channels=0")
    assert [each.name for each in read_micrographs(data, name="x")] == [
        f"x#{i:04d}" for i in range(4)
    ]
    for size in (b"1", b"9", b"99999999999"):
        data = HYPERSTACKS["ome"][0].replace(b'SizeT="2"', b'SizeT="%s"' % size)
        assert len({each.name for each in read_micrographs(data, name="x")}) == 4


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
