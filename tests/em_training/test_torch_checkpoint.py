"""Files of `torch.save` give their tensors and numbers; whatever else is in them stays a name, and nothing is ever run."""

import argparse
import collections
import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from em_training.safe_pickle import Record, StoredArray, check_extent, flatten_module
from em_training.torch_checkpoint import read_torch_checkpoint
from em_training.torch_unpickler import StoredTensor

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
]
DTYPES += [torch.int64, torch.bool, torch.complex64, torch.complex128]
FORMATS = {"zip": {}, "stream": {"_use_new_zipfile_serialization": False}}


def save(contents, path, kind="zip", **options):
    torch.save(contents, path, **FORMATS[kind], **options)
    return path


def read_all(contents):
    """Plain contents with every tensor read."""
    if isinstance(contents, StoredTensor):
        return contents.read()
    if isinstance(contents, dict):
        return {key: read_all(value) for key, value in contents.items()}
    if isinstance(contents, list | tuple):
        return type(contents)(read_all(value) for value in contents)
    return contents


class Callback:
    """Stands for a Lightning callback: an instance of a class that the reader cannot know."""

    def __init__(self):
        self.best = torch.tensor(0.25)
        self.folder = "logs"

    def __setstate__(self, state):
        raise AssertionError("the class was used")


class Dotted(dict):
    """Stands for Lightning's AttributeDict."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.activation = torch.nn.functional.relu


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_type(tmp_path, kind, dtype):
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    contents = {
        "whole": values,
        "part": values[1],
        "turned": values.transpose(0, 2),
        "empty": values[:0],
        "one": values[0, 1, 2],
    }
    stored = read_torch_checkpoint(save(contents, tmp_path / "a.ckpt", kind))
    for name, expected in contents.items():
        assert (stored[name].shape, stored[name].dtype) == (tuple(expected.shape), dtype)
        tensor = stored[name].read()
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_lightning_checkpoint(tmp_path, kind):
    state_dict = Net().state_dict()  # an OrderedDict with the attribute _metadata
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(3))])
    contents = {
        "epoch": 3,
        "state_dict": state_dict,
        "callbacks": {
            Callback: {"best_model_score": torch.tensor(0.5)},
            "EarlyStopping": {"wait": 1},
        },
        "instances": [Callback()],
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": Dotted(rate=1e-4),
        "options": argparse.Namespace(batch_size=4),
        "score": np.float64(0.25),
        "steps": np.int32(7),
        "array": np.arange(6.0).reshape(2, 3),
        "plain": (
            1,
            2.5,
            None,
            True,
            "µm",
            b"bytes",
            {1, 2},
            collections.defaultdict(list),
            torch.Size([2, 3]),
        ),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "parameter": nn.Parameter(torch.ones(2)),
    }
    stored = read_torch_checkpoint(save(contents, tmp_path / "a.ckpt", kind))
    tensors = read_all(stored["state_dict"])
    assert list(tensors) == list(state_dict)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state_dict.items())
    assert stored["plain"] == (1, 2.5, None, True, "µm", b"bytes", {1, 2}, {}, (2, 3))
    assert (stored["score"], stored["steps"], stored["device"], stored["dtype"]) == (
        0.25,
        7,
        "cpu",
        torch.float16,
    )
    assert isinstance(stored["array"], StoredArray)
    assert stored["array"].array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert stored["parameter"].read().tolist() == [1, 1]
    assert stored["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-3
    callback = stored["instances"][0]
    assert isinstance(callback, Record)
    assert callback.class_name.endswith("test_torch_checkpoint.Callback")
    assert callback.state["folder"] == "logs"
    assert callback.state["best"].read() == 0.25
    assert stored["hyper_parameters"].items == [("rate", 1e-4)]
    assert stored["options"].state == {"batch_size": 4}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
def test_module_pickled_whole(tmp_path, kind):
    net = Net()
    stored = read_torch_checkpoint(save(net, tmp_path / "net.pkl", kind))
    assert stored.class_name.endswith("test_torch_checkpoint.Net")
    tensors = {name: tensor.read() for name, tensor in flatten_module(stored).items()}
    assert set(tensors) == set(net.state_dict())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in net.state_dict().items())


def test_shared_storage_is_not_read_whole(tmp_path):
    big = torch.arange(1000.0)
    stored = read_torch_checkpoint(save({"a": big[10:20], "b": big[15:40:5]}, tmp_path / "a.ckpt"))
    assert stored["a"].read().untyped_storage().nbytes() == 40
    assert stored["b"].read().tolist() == [15, 20, 25, 30, 35]


def test_unused_classes_are_never_imported(tmp_path):
    path = tmp_path / "a.ckpt"
    save({"a": Callback(), "state_dict": {}}, path)
    data = rewrite(
        path,
        lambda pickled: pickled.replace(
            Callback.__module__.encode(), b"x" * len(Callback.__module__)
        ),
    )
    assert b"x" * len(Callback.__module__) in data
    assert "x" * len(Callback.__module__) not in sys.modules
    stored = read_torch_checkpoint(path)
    assert stored["a"].class_name == "x" * len(Callback.__module__) + ".Callback"
    assert "x" * len(Callback.__module__) not in sys.modules


def rewrite(path, change, **entries):
    """Write the archive again with data.pkl changed, and other entries by the end of their name."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            if name.endswith("data.pkl"):
                data = changed = change(data)
            archive.writestr(name, entries.get(name.split("/", 1)[1].replace("/", "_"), data))
    return changed


def test_other_byte_order(tmp_path):
    values = torch.tensor([1.5, -2.25, 3.0])
    path = save(
        {"a": values, "b": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)},
        tmp_path / "a.ckpt",
    )
    complex_bytes = np.array([1, 2, 3, -4], ">f4").tobytes()
    rewrite(
        path,
        lambda data: data,
        byteorder=b"big",
        data_0=values.numpy().astype(">f4").tobytes(),
        data_1=complex_bytes,
    )
    stored = read_torch_checkpoint(path)
    assert torch.equal(stored["a"].read(), values)
    assert stored["b"].read().tolist() == [1 + 2j, 3 - 4j]


def test_archive_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"a": torch.arange(3)}, tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_torch_checkpoint(path)["a"].read().tolist() == [0, 1, 2]


def write_tar(path, storage, size, stride, offset=0, extra=0):
    """A file as torch before 0.1.10 wrote it: one storage, one tensor, and a dictionary that names the tensor by number."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return 7 if isinstance(obj, torch.Tensor) else None

    parts = {}
    out = io.BytesIO()
    pickle.dump(1, out, 2)
    out.write(pickle.dumps((3, "cpu", torch.FloatStorage), 2))
    out.write(struct.pack("<q", len(storage) + extra) + np.array(storage, "<f4").tobytes())
    pickle.dump(
        [(4, 3, 1, len(storage) - 1)], out, 2
    )  # a view of the storage without its first element
    parts["storages"] = out.getvalue()
    out = io.BytesIO()
    pickle.dump(1, out, 2)
    out.write(pickle.dumps((7, 4, torch.FloatTensor), 2))
    out.write(
        struct.pack("<i4x", len(size))
        + struct.pack(f"<{2 * len(size)}q", *size, *stride)
        + struct.pack("<q", offset)
    )
    parts["tensors"] = out.getvalue()
    out = io.BytesIO()
    Pickler(out, 2).dump({"state_dict": {"a": torch.zeros(1)}, "epoch": 2})
    parts["pickle"] = out.getvalue()
    with tarfile.open(path, "w:") as archive:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_tar_archive(tmp_path):
    write_tar(tmp_path / "a.pth", [9, 1, 2, 3, 4, 5, 6], (2, 3), (3, 1))
    stored = read_torch_checkpoint(tmp_path / "a.pth")
    assert stored["epoch"] == 2
    assert stored["state_dict"]["a"].read().tolist() == [[1, 2, 3], [4, 5, 6]]
    write_tar(tmp_path / "b.pth", [9, 1, 2, 3, 4, 5, 6], (2, 3), (3, 1), offset=1)
    with pytest.raises(ValueError, match="reaches beyond its storage"):
        read_torch_checkpoint(tmp_path / "b.pth")
    write_tar(tmp_path / "c.pth", [9, 1, 2], (1,), (1,), extra=10**12)
    with pytest.raises(ValueError, match="cut short"):
        read_torch_checkpoint(tmp_path / "c.pth")


class Call:
    """Pickles as the call function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def evil_calls(target):
    python = f"open({str(target)!r}, 'w')"
    return {
        "os.system": Call(os.system, f"touch {target}"),
        "eval": Call(eval, python),
        "exec": Call(exec, python),
        "open": Call(open, str(target), "w"),
        "getattr": Call(getattr, "", "join"),
        "__import__": Call(__import__, "this"),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(target)]),
        "torch.load": Call(torch.load, str(target)),
        "torch.hub": Call(torch.hub.load, "a/b", "c"),
        "numpy.load": Call(np.load, str(target)),
        "pickle.loads": Call(pickle.loads, b"N."),
        "_load_from_bytes": Call(torch.storage._load_from_bytes, b"N."),
        "operator": Call(__import__("operator").attrgetter("system")),
    }


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", evil_calls(""))
@pytest.mark.parametrize("depth", ["top", "among tensors", "as callback"])
def test_malicious_call_runs_nothing(tmp_path, kind, name, depth):
    target = tmp_path / "target"
    evil = evil_calls(target)[name]
    contents = {"state_dict": {"a": torch.ones(2)}}
    if depth == "among tensors":
        contents["state_dict"]["b"] = evil
    elif depth == "as callback":
        contents["callbacks"] = {"x": [evil]}
    else:
        contents = evil
    path = save(contents, tmp_path / "evil.ckpt", kind)
    with pytest.raises(
        ValueError,
        match=r"evil\.ckpt cannot be read as a torch checkpoint: it would call .*nothing of it was run",
    ):
        read_torch_checkpoint(path)
    assert not target.exists()


class SetState:
    """Pickles as an instance whose state would be set by `__setstate__`."""

    def __init__(self, target):
        self.target = str(target)

    def __setstate__(self, state):
        open(state["target"], "w").close()


def test_set_state_is_not_called(tmp_path):
    path = save({"a": SetState(tmp_path / "target")}, tmp_path / "evil.ckpt")
    assert read_torch_checkpoint(path)["a"].state == {"target": str(tmp_path / "target")}
    assert not (tmp_path / "target").exists()


def pickle_into(path, instructions):
    """An archive whose data.pkl is these instructions."""
    save({"a": torch.arange(4.0)}, path)
    rewrite(path, lambda data: instructions)
    return path


def text(word):
    return b"\x8c" + bytes([len(word)]) + word.encode()


def named(module, name):
    return text(module) + text(name) + b"\x93"


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        # attributes reached through a dotted name, called
        (
            named("collections", "OrderedDict.__init__.__globals__") + b")R",
            "would call collections.OrderedDict.__init__",
        ),
        (named("torch", "Tensor.__class__") + b")R", "would call torch.Tensor.__class__"),
        (named("torch", "nn.Module") + b")R", "would call torch.nn.Module"),
        # BUILD on a maker, on a type of storage, on a class of records, on a tensor's stand-in
        (named("torch", "Size") + b"}" + text("_function") + b"Nsb", "may not alter its reader"),
        (
            named("torch", "Size") + b"N}" + text("_function") + b"Ns\x86b",
            "may not alter its reader",
        ),
        (
            named("torch", "FloatStorage") + b"}" + text("dtype") + b"Nsb",
            "may not alter its reader",
        ),
        (
            named("a", "Class") + b"}" + text("__new__") + b"Nsb",
            "gives a state to a type, which takes none",
        ),
        (
            named("collections", "OrderedDict") + b"}" + text("get") + b"Nsb",
            "gives a state to a type, which takes none",
        ),
        # a class that is none, an object that is none
        (named("torch", "Size") + b")\x81", "not a type object"),
        (named("a", "Class") + b")R)R", "not callable"),
        (b"(" + text("a") + text("b") + b"tQ", "refers to objects outside the file"),
        (
            named("copyreg", "_reconstructor") + named("torch", "Size") + b"NN\x87R",
            "malformed object",
        ),
        (
            named("builtins", "bytearray")
            + b"\x8a\x06"
            + (10**12).to_bytes(6, "little")
            + b"\x85R",
            "malformed bytes",
        ),
        # numbered beyond all objects: Python would reserve 64 GiB
        (b"Nr\xff\xff\xff\xff", "numbers its"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "cut short or damaged"),
    ],
)
def test_what_a_pickle_may_not_do(tmp_path, instructions, message):
    path = pickle_into(tmp_path / "evil.ckpt", b"\x80\x04" + instructions + b".")
    with pytest.raises(ValueError, match=message):
        read_torch_checkpoint(path)


def tensor_pickle(count="4", size="4", stride="1", offset="0"):
    """Protocol 0 instructions of a tensor in storage 0, with these numbers."""

    def numbers(texts):
        return "(" + "".join(f"I{n}\n" for n in texts.split()) + "t"

    storage = f"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI{count}\ntQ"
    return f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n{numbers(size)}{numbers(stride)}I00\nNtR.".encode()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"size": "5"}, "beyond its storage"),
        ({"offset": "1"}, "beyond its storage"),
        ({"stride": "2"}, "beyond its storage"),
        ({"size": "1000000000000", "stride": "0"}, r"repeats its storage to 1e\+12 elements"),
        ({"size": "1000000 1000000", "stride": "0 0"}, "repeats its storage"),
        ({"size": "-1"}, "malformed tensor"),
        ({"offset": "-1"}, "malformed tensor"),
        ({"size": "2 2"}, "malformed tensor"),
        ({"count": "1000000000000"}, "the file does not hold them"),
        ({"count": "-4"}, "malformed storage"),
    ],
)
def test_absurd_sizes(tmp_path, numbers, message):
    assert read_torch_checkpoint(
        pickle_into(tmp_path / "a.ckpt", tensor_pickle())
    ).read().tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=message):
        read_torch_checkpoint(pickle_into(tmp_path / "b.ckpt", tensor_pickle(**numbers)))


def test_repeated_storage_of_moderate_size_is_read(tmp_path):
    path = save(torch.tensor([3.0]).expand(5, 4), tmp_path / "a.ckpt")
    assert torch.equal(read_torch_checkpoint(path).read(), torch.full((5, 4), 3.0))
    assert check_extent(1, 0, (5, 4), (0, 0)) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_every_truncation_is_an_error(tmp_path, kind):
    data = save(
        {"state_dict": Net().state_dict(), "epoch": 1}, tmp_path / "a.ckpt", kind
    ).read_bytes()
    short = tmp_path / "short.ckpt"
    for length in [*range(0, len(data) - 1, max(1, len(data) // 150)), len(data) - 1]:
        short.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"short\.ckpt (cannot be read|is empty)"):
            read_torch_checkpoint(short)


def test_damage_is_noticed(tmp_path):
    path = save({"a": torch.arange(100.0)}, tmp_path / "a.ckpt")
    data = bytearray(path.read_bytes())
    position = data.index(np.float32(50).tobytes() + np.float32(51).tobytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_torch_checkpoint(path)["a"].read()


def write_script(path):
    script = torch.jit.script(torch.nn.ReLU())
    torch.jit.save(script, path)


def write_safetensors(path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, path)


def write_zip(path, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("readme.txt", "text")


def write_compressed(path):
    save({"a": torch.zeros(100)}, path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning"
)
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html>"), "is a web page"),
        (
            lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "git lfs pull",
        ),
        (lambda path: path.write_bytes(bytes(range(64))), "not written by torch.save"),
        (lambda path: path.write_bytes(pickle.dumps({"G_ema": 1})), "not written by torch.save"),
        (
            lambda path: path.write_bytes(b"ctorch_utils.persistence\n_reconstruct\n."),
            "is a StyleGAN pickle",
        ),
        (lambda path: path.mkdir(), "is a folder"),
        (write_safetensors, "is a safetensors file"),
        (write_zip, "without torch's data.pkl"),
        (write_compressed, "parts are compressed"),
        (write_script, "TorchScript program"),
        (lambda path: path.write_bytes(gzip.compress(b"N.")), "is packed with gzip"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, write, message):
    write(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        read_torch_checkpoint(tmp_path / "a.ckpt")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_checkpoint(tmp_path / "none.ckpt")
