"""Files of `torch.save` give their tensors and containers; everything else stays a record, and
nothing is run.
"""

import argparse
import builtins
import collections
import datetime
import gzip
import operator
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from em_training.torch_checkpoint import Record, copy_tensor, flatten_module, read_torch_checkpoint

REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8]
DTYPES = [*REAL, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64]
FORMATS = {"zip": {}, "stream": {"_use_new_zipfile_serialization": False}}
both_formats = pytest.mark.parametrize("kind", FORMATS)


def save(contents, path, kind="zip", **options):
    torch.save(contents, path, **FORMATS[kind], **options)
    return path


class Callback:
    """Stands for a Lightning callback: an instance of a class that the reader cannot know."""

    def __init__(self, **state):
        self.__dict__.update(state)

    def __setstate__(self, state):
        raise AssertionError("the class was used")


class Slotted:
    __slots__ = ("rate",)


class Dotted(dict):
    """Stands for Lightning's AttributeDict."""


class Listed(list):
    """Stands for a list of another class."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.activation = torch.nn.functional.relu
        self.nothing = None


@both_formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_type(tmp_path, kind, dtype):
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    contents = {"whole": values, "part": values[1], "turned": values.transpose(0, 2)}
    contents |= {
        "empty": values[:0],
        "one": values[0, 1, 2],
        "wide": values[:1, :1].expand(5, 6, 4),
    }
    stored = read_torch_checkpoint(save(contents, tmp_path / "a.ckpt", kind))
    for name, expected in contents.items():
        assert stored[name].dtype == dtype
        assert torch.equal(stored[name], expected)
        copy = copy_tensor(stored[name])
        assert copy.dtype == (torch.float32 if dtype.is_floating_point else dtype)
        assert torch.equal(copy, expected.to(copy.dtype))
        assert copy.untyped_storage().nbytes() == copy.numel() * copy.element_size()


@both_formats
def test_lightning_checkpoint(tmp_path, kind):
    state_dict = Net().state_dict()  # an OrderedDict with the attribute _metadata
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    slotted = Slotted()
    slotted.rate = 0.5
    now = datetime.datetime(2021, 4, 3, tzinfo=datetime.UTC)
    plain = (1, 2.5, None, True, "µm", b"bytes", {1, 2}, torch.Size([2, 3]), 2**40, -(2**70))
    contents = {
        "state_dict": state_dict,
        "callbacks": {Callback: {"best": torch.tensor(0.5)}, "EarlyStopping": {"wait": 1}},
        "instances": [Callback(best=torch.tensor(0.25), folder="logs"), slotted],
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": Dotted(rate=1e-4, nested=Dotted(a=1)),
        "list": Listed([1, 2]),
        "options": argparse.Namespace(batch_size=4),
        "others": [np.float64(0.25), np.int32(7), np.arange(6.0).reshape(2, 3), np.dtype("f4")],
        "more": [now, pathlib.PurePosixPath("a/b"), collections.deque([1]), frozenset([1])],
        "default": collections.defaultdict(list, a=[1]),
        "keys": {pathlib.PurePosixPath("a"): 1, ("b", 2): 2},
        "plain": plain,
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "parameter": nn.Parameter(torch.ones(2)),
    }
    stored = read_torch_checkpoint(save(contents, tmp_path / "a.ckpt", kind))
    assert list(stored["state_dict"]) == list(state_dict)
    assert all(torch.equal(stored["state_dict"][n], tensor) for n, tensor in state_dict.items())
    assert stored["plain"] == plain
    assert (stored["device"], stored["dtype"]) == (torch.device("cpu"), torch.float16)
    assert stored["parameter"].tolist() == [1, 1]
    assert stored["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-3
    assert torch.equal(
        stored["optimizer_states"][0]["state"][0]["exp_avg"],
        optimizer.state_dict()["state"][0]["exp_avg"],
    )
    first, second = stored["instances"]
    assert isinstance(first, Record)
    assert first.class_name.endswith("test_torch_checkpoint.Callback")
    assert (first.state["folder"], first.state["best"]) == ("logs", 0.25)
    assert second.state == {"rate": 0.5}
    assert next(iter(stored["callbacks"])).class_name == first.class_name
    name, nested = stored["hyper_parameters"].items[1]
    assert (stored["hyper_parameters"].items[0], name) == (("rate", 1e-4), "nested")
    assert nested.items == [("a", 1)]
    assert list(stored["list"]) == [1, 2]
    assert stored["default"].items == [("a", [1])]
    assert stored["options"].state == {"batch_size": 4}
    assert stored["keys"]["b", 2] == 2
    assert all(isinstance(value, Record) for value in stored["others"] + stored["more"])


def test_module_pickled_whole(tmp_path):
    net = Net()
    stored = read_torch_checkpoint(save(net, tmp_path / "net.pkl"))
    assert stored.class_name.endswith("test_torch_checkpoint.Net")
    tensors = flatten_module(stored)
    assert set(tensors) == set(net.state_dict())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
@pytest.mark.parametrize("options", [FORMATS["stream"], {"pickle_protocol": 4}], ids=str)
def test_what_torch_cannot_read_safely_is_refused_with_the_way_out(tmp_path, options):
    torch.save(Net(), tmp_path / "net.pkl", **options)
    with pytest.raises(
        ValueError, match=r"net\.pkl cannot be read .* save its state_dict with torch"
    ):
        read_torch_checkpoint(tmp_path / "net.pkl")


def test_unknown_classes_are_never_imported(tmp_path):
    module = "x" * len(Callback.__module__)
    path = save({"a": Callback(), "state_dict": {}}, tmp_path / "a.ckpt")
    rewrite(path, lambda data: data.replace(Callback.__module__.encode(), module.encode()))
    assert read_torch_checkpoint(path)["a"].class_name == f"{module}.Callback"
    assert module not in sys.modules


def rewrite(path, change, compression=zipfile.ZIP_STORED, **entries):
    """Write the archive again with data.pkl changed, and other entries by the end of their name."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in contents.items():
            data = change(data) if name.endswith("data.pkl") else data
            archive.writestr(name, entries.get(name.split("/", 1)[1].replace("/", "_"), data))
    return path


def test_other_byte_order(tmp_path):
    values, complex_values = torch.tensor([1.5, -2.25, 3.0]), torch.tensor([1 + 2j, 3 - 4j])
    path = rewrite(
        save({"a": values, "b": complex_values}, tmp_path / "a.ckpt"),
        lambda data: data,
        byteorder=b"big",
        data_0=values.numpy().astype(">f4").tobytes(),
        data_1=np.array([1, 2, 3, -4], ">f4").tobytes(),
    )
    stored = read_torch_checkpoint(path)
    assert torch.equal(stored["a"], values)
    assert torch.equal(stored["b"], complex_values)


def test_archive_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"a": torch.arange(3)}, tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_torch_checkpoint(path)["a"].tolist() == [0, 1, 2]


class Call:
    """Pickles as the call function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


EVIL = {
    "os.system": lambda target: Call(os.system, f"touch {target}"),
    "eval": lambda target: Call(eval, f"open({str(target)!r}, 'w')"),
    "exec": lambda target: Call(exec, f"open({str(target)!r}, 'w')"),
    "open": lambda target: Call(open, str(target), "w"),
    "getattr": lambda target: Call(getattr, "", "join"),
    "__import__": lambda target: Call(__import__, "this"),
    "Popen": lambda target: Call(subprocess.Popen, ["touch", str(target)]),
    "torch.load": lambda target: Call(torch.load, str(target)),
    "torch.save": lambda target: Call(torch.save, {}, str(target)),
    "torch.hub": lambda target: Call(torch.hub.load, "a/b", "c"),
    "torch.from_file": lambda target: Call(torch.from_file, str(target), True, 4),
    "numpy.load": lambda target: Call(np.load, str(target)),
    "pickle.loads": lambda target: Call(pickle.loads, b"N."),
    "_load_from_bytes": lambda target: Call(torch.storage._load_from_bytes, b"N."),
    "operator": lambda target: Call(operator.attrgetter("system")),
    "call of a call": lambda target: Call(Call, Call(builtins.print, str(target))),
}


@both_formats
@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("place", ["top", "among tensors", "as callback"])
def test_malicious_call_runs_nothing(tmp_path, kind, name, place, capsys):
    target = tmp_path / "target"
    evil = EVIL[name](target)
    contents = {
        "top": evil,
        "among tensors": {"state_dict": {"a": torch.ones(2), "b": evil}},
        "as callback": {"state_dict": {"a": torch.ones(2)}, "callbacks": {"x": [evil]}},
    }[place]
    path = save(contents, tmp_path / "evil.ckpt", kind)
    with pytest.raises(
        ValueError,
        match=r"evil\.ckpt cannot be read as a torch checkpoint: it would call .*nothing of it "
        r"was run",
    ):
        read_torch_checkpoint(path)
    assert not target.exists()
    assert not capsys.readouterr().out


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


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def text(word):
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


STATE = b"}" + text("__call__") + b"Ns"
TRICKS = {
    # attributes of what is allowed, called
    "dotted name": named("collections", "OrderedDict.__init__.__globals__") + b")R",
    "attribute of a class": named("torch", "Tensor.__class__") + b")R",
    # BUILD on a function, a type, a type of storage, a class of records
    "state of a function": named("torch._utils", "_rebuild_tensor_v2") + STATE + b"b",
    "slots of a function": named("torch._utils", "_rebuild_tensor_v2") + b"N" + STATE + b"\x86b",
    "state of a refusal": named("builtins", "eval") + STATE + b"b",
    "state of a type": named("torch", "Size") + STATE + b"b",
    "state of a storage type": named("torch", "FloatStorage") + STATE + b"b",
    "state of a record's class": named("a", "Class") + STATE + b"b",
    "state of a dictionary": b"}" + STATE + b"b",
    # NEWOBJ and REDUCE of what is no class and no function
    "new function": named("builtins", "eval") + b")\x81",
    "new rebuild": named("torch._utils", "_rebuild_tensor_v2") + b")\x81",
    "call of a record": named("a", "Class") + b")R)R",
    # REDUCE of allowed functions with other arguments than theirs
    "rebuild with eval": named("torch._tensor", "_rebuild_from_type_v2")
    + named("builtins", "eval")
    + named("torch", "Tensor")
    + b"("
    + text("1")
    + b"tN(N"
    + b"t\x86R",
    "rebuild of text": named("torch._utils", "_rebuild_parameter") + b"(" + text("a") + b"NNtR",
    "object outside the file": b"(" + text("a") + text("b") + b"tQ",
    "items of a list": b"]K\x00Ns",
    "appended to a dictionary": b"}Na",
    "other opcodes": b"(ios\nsystem\n",
    "no end": b"}",
}


@pytest.mark.parametrize("name", TRICKS)
def test_what_a_pickle_may_not_do(tmp_path, name):
    end = b"" if name == "no end" else b"."
    path = save({"a": torch.arange(4.0)}, tmp_path / "evil.ckpt")
    rewrite(path, lambda data: b"\x80\x02" + TRICKS[name] + end)
    before = torch._utils._rebuild_tensor_v2.__dict__.copy()
    with pytest.raises(
        ValueError, match=r"evil\.ckpt cannot be read as a torch checkpoint"
    ) as caught:
        read_torch_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert torch._utils._rebuild_tensor_v2.__dict__ == before


def tensor_pickle(count="4", size="4", stride="1", offset="0"):
    """A pickle of a tensor in storage 0, with these numbers."""

    def number(word):
        value = int(word)
        data = value.to_bytes(8, "little", signed=True)
        return b"\x8a\x08" + data

    def numbers(words):
        return b"(" + b"".join(map(number, words.split())) + b"t"

    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu")
    storage += number(count) + b"tQ"
    call = named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + number(offset)
    return b"\x80\x02" + call + numbers(size) + numbers(stride) + b"\x89NtR."


@pytest.mark.parametrize(
    "numbers",
    [
        {"size": "5"},
        {"offset": "1"},
        {"stride": "2"},
        {"size": "-1"},
        {"offset": "-1"},
        {"size": "2 2"},
        {"count": "1000000000000", "size": "1000000000000"},
        {"count": "-4"},
        {"size": "1000000000000", "stride": "0"},
        {"size": "1000000 1000000", "stride": "0 0"},
    ],
    ids=str,
)
def test_absurd_sizes(tmp_path, numbers):
    def read(**numbers):
        path = save({"a": torch.arange(4.0)}, tmp_path / "a.ckpt")
        return copy_tensor(read_torch_checkpoint(rewrite(path, lambda _: tensor_pickle(**numbers))))

    assert read().tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"cannot be read|repeats its 4 numbers to 1e"):
        read(**numbers)


@both_formats
def test_every_truncation_is_an_error(tmp_path, kind):
    contents = {"state_dict": Net().state_dict(), "epoch": 1}
    data = save(contents, tmp_path / "a.ckpt", kind).read_bytes()
    short = tmp_path / "short.ckpt"
    for length in [*range(0, len(data) - 1, max(1, len(data) // 150)), len(data) - 1]:
        short.write_bytes(data[:length])
        with pytest.raises(
            ValueError, match=r"short\.ckpt (cannot be read|is empty|was not written)"
        ):
            read_torch_checkpoint(short)


def test_damage_is_noticed(tmp_path):
    path = save({"a": torch.arange(100.0)}, tmp_path / "a.ckpt")
    data = bytearray(path.read_bytes())
    data[data.index(np.float32(50).tobytes() + np.float32(51).tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_torch_checkpoint(path)


def write_script(path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)


def write_safetensors(path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, path)


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "text")


def write_compressed(path):
    rewrite(save({"a": torch.zeros(9)}, path), lambda data: data, zipfile.ZIP_DEFLATED)


def write_tar(path):
    with tarfile.open(path, "w:") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


def write_bytes(data):
    return lambda path: path.write_bytes(data)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning"
)
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_bytes(b""), "is empty"),
        (write_bytes(b"<!DOCTYPE html>"), "is a web page"),
        (write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (write_bytes(bytes(range(64))), "not written by torch.save"),
        (write_bytes(pickle.dumps({"G_ema": 1})), "not written by torch.save"),
        (write_bytes(b"ctorch_utils.persistence\n_reconstruct\n."), "is a StyleGAN pickle"),
        (write_bytes(gzip.compress(b"N.")), "is packed with gzip"),
        (lambda path: path.mkdir(), "is a folder"),
        (write_safetensors, "is a safetensors file"),
        (write_zip, "without torch's data.pkl"),
        (write_compressed, "parts are compressed"),
        (write_script, "is a TorchScript program"),
        (write_tar, "is a tar archive"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, write, message):
    write(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message) as caught:
        read_torch_checkpoint(tmp_path / "a.ckpt")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_checkpoint(tmp_path / "none.ckpt")
