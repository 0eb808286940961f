"""Micrographs streamed from the Hub: the same tiles and the same split as of the whole set, and
nothing of it on the disk.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from huggingface_hub import constants

from em_data import DataConfig, load_data
from em_data.push import PushConfig, push_folder
from em_data.sources import open_source
from support.hub_server import make_environment

NUM, SIDE, RESOLUTION = 12, 256, 64
FOOTER_BYTES = 2**16  # of a Parquet file, which pyarrow asks for first
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(
        "em_data.push.SHARD_BYTES", 4 * SIDE**2
    )  # several files, each of several row groups
    monkeypatch.setattr("em_data.push.ROW_GROUP_BYTES", SIDE**2)
    monkeypatch.setattr(
        "em_data.sources.rows.BLOCK_BYTES", 2**12
    )  # as small beside the files as it is beside real ones


@pytest.fixture
def pushed(tmp_path, hub):
    """Noise, which no compression shrinks: 8 and 16 bits, three specimens, two pixel sizes; on the
    Hub in several files.
    """
    random = np.random.default_rng(0)
    for i in range(NUM):
        dtype = np.uint16 if i >= NUM - 3 else np.uint8
        levels = random.integers(0, np.iinfo(dtype).max, (SIDE, SIDE), dtype, endpoint=True)
        path = tmp_path / "micrographs" / f"specimen {i % 3}" / f"frame_{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, levels, metadata={"pixel_size_nm": 0.25 if i % 2 else 0.5})
    push_folder(PushConfig(str(tmp_path / "micrographs"), "you/set"), say=lambda text: None)
    return hub


def count_sent(hub, since=0):
    """Bytes of large files that the stand-in has sent."""
    return sum(num for path, num in hub.sent[since:] if path.startswith("/lfs-storage/"))


def make_config(tmp_path, name="tiles", **changes):
    return DataConfig(
        **{"resolution": RESOLUTION, "cache_dir": str(tmp_path / name), "held_out_fraction": 0.3}
        | changes
    )


def size_of(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("split", ["micrograph", "specimen"])
def test_a_streamed_set_is_the_fetched_one(pushed, tmp_path, split):
    config = make_config(tmp_path, "streamed", split=split)
    streamed = load_data("hub-stream:you/set", config, log=lambda text: None)
    whole = sum(
        e.size
        for path, e in pushed.files("you/set", kind="datasets").items()
        if path.endswith(".parquet")
    )
    num_files = sum(path.endswith(".parquet") for path in pushed.files("you/set", kind="datasets"))
    assert num_files > 2
    assert not size_of(constants.HF_HUB_CACHE)
    assert not size_of(tmp_path / "datasets")
    footers = (
        3 * num_files * FOOTER_BYTES
    )  # each file is opened for its list, for its columns and for its rows
    # each row once; the columns of facts, one of them the class, cost some requests of 4 kB each
    assert whole < count_sent(pushed) < 1.1 * whole + footers
    fetched = load_data(
        "hub:you/set", make_config(tmp_path, "fetched", split=split), log=lambda text: None
    )
    assert size_of(constants.HF_HUB_CACHE) >= whole
    differ = {key for key in fetched.summary if fetched.summary[key] != streamed.summary[key]}
    assert differ == {"source"}
    assert fetched.summary["bits"] == 16
    assert fetched.summary["num_tiles"] == NUM * (SIDE // RESOLUTION) ** 2
    for side in ("train", "held_out"):
        a, b = getattr(fetched, side), getattr(streamed, side)
        assert a.fingerprint == b.fingerprint
        np.testing.assert_array_equal(a.raw(range(a.num_tiles)), b.raw(range(b.num_tiles)))
        assert a.rows["pixel_size_nm"][:] == b.rows["pixel_size_nm"][:]
    held_out = set(fetched.summary["held_out"])
    assert held_out
    assert not held_out & set(streamed.train.rows["micrograph"])
    before = len(
        pushed.sent
    )  # what was cut on one road serves the other, and only the list is read again
    load_data("hub-stream:you/set", config, log=lambda text: None)
    load_data("hub:you/set", config, log=lambda text: None)
    assert count_sent(pushed, before) < num_files * FOOTER_BYTES + 0.2 * whole


def test_one_commit_is_streamed_though_another_comes(pushed, tmp_path):
    commit = pushed.repos["datasets", "you/set"].branches["main"]
    opened = open_source("hub-stream:you/set", make_config(tmp_path), tmp_path)
    first = opened.entries[0].read()
    (tmp_path / "micrographs" / "specimen 0" / "frame_0.tif").unlink()
    push_folder(PushConfig(str(tmp_path / "micrographs"), "you/set"), say=lambda text: None)
    np.testing.assert_array_equal(
        opened.entries[0].read().image, first.image
    )  # asked for again: the stream begins again
    assert opened.entries[-1].read().image.dtype == np.uint16
    assert (
        len(open_source("hub-stream:you/set", make_config(tmp_path), tmp_path).entries) == NUM - 1
    )
    assert (
        len(open_source(f"hub-stream:you/set@{commit}", make_config(tmp_path), tmp_path).entries)
        == NUM
    )
    few = open_source("hub-stream:you/set", make_config(tmp_path, num_micrographs=3), tmp_path)
    assert len(few.entries) == 3


def test_a_stream_that_breaks_leaves_no_half_of_the_tiles(pushed, tmp_path):
    config = make_config(tmp_path)
    pushed.fail("GET", "/lfs-storage/", status=500, skip=12, times=10_000)
    with pytest.raises(
        ValueError, match=r"streaming you/set: the Hub has a fault of its own \(500\)"
    ) as raised:
        load_data("hub-stream:you/set", config, log=lambda text: None)
    assert "\n" not in str(raised.value)
    assert not size_of(tmp_path / "tiles" / "tiles")
    pushed.faults.clear()
    fault = pushed.fail(
        "GET", "/lfs-storage/", cut_after=1000, skip=6, times=2
    )  # mended by the client itself
    data = load_data("hub-stream:you/set", config, log=lambda text: None)
    assert fault.times == 0
    assert data.summary["num_micrographs"] == NUM


def test_what_cannot_be_streamed_is_said(pushed, tmp_path, monkeypatch):
    def load(name):
        return load_data(f"hub-stream:{name}", make_config(tmp_path), log=lambda text: None)

    with pytest.raises(ValueError, match="there is no such repository"):
        load("you/nothing")
    with pytest.raises(ValueError, match="there is no such revision"):
        load("you/set@v9")
    name = next(
        path for path in pushed.files("you/set", kind="datasets") if path.endswith("00001.parquet")
    )
    pushed.tamper(
        "you/set", name, kind="datasets"
    )  # one byte in the middle of an image: its own checksum tells
    said = []
    data = load_data("hub-stream:you/set", make_config(tmp_path), log=said.append)
    assert data.summary["num_micrographs"] == NUM - 1
    assert "damaged PNG chunk" in "".join(said)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids it; unset it, or use hub:you/set"):
        load("you/set")


PROGRAM = """
import json, resource, sys
from em_data import DataConfig, load_data
source, cache, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # no file on this disk may hold more
config = DataConfig(resolution=64, downsample=4, cache_dir=cache, held_out_fraction=0.3)
data = load_data(source, config, log=lambda text: None)
names = ("split_hash", "num_tiles", "pixel_size_nm")
print(json.dumps([data.summary[name] for name in names]))
"""


@pytest.mark.slow  # three processes
def test_in_another_process_where_the_set_does_not_fit_on_the_disk(pushed, tmp_path):
    environment = make_environment(
        pushed, tmp_path / "hf", PYTHONPATH=str(ROOT), HF_TOKEN="write-token"
    )
    results = {}
    for name, limit in (("hub-stream", 150_000), ("hub", 150_000), ("hub ", 10**9)):
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            f"{name.strip()}:you/set",
            str(tmp_path / name),
            str(limit),
        ]
        results[name] = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
    assert results["hub-stream"].returncode == 0, results["hub-stream"].stderr[-2000:]
    assert "a file may not grow so large" in results["hub"].stderr
    whole, streamed = (json.loads(results[name].stdout) for name in ("hub ", "hub-stream"))
    assert streamed == whole
    assert whole[1] == NUM
