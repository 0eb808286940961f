"""What is read as data costs no more than its length: small pickles neither hang the reader nor fill the memory nor reach what it made."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from em_training.safe_pickle import (
    MAX_DEPTH,
    Record,
    SafeUnpickler,
    check_key,
    check_opcodes,
    flatten_module,
)
from em_training.torch_checkpoint import read_stored_storage

BOMB = b")" + b"2\x86" * 60  # (), then each tuple twice in the next: 2^60 leaves


def text(word):
    return b"\x8c" + bytes([len(word)]) + word.encode()


def named(module, name):
    return text(module) + text(name) + b"\x93"


def call(module, name, *arguments):
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


DTYPE = call("numpy", "dtype", text("f8"))
BOMBS = {
    "key": b"}" + BOMB + b"Ns",
    "keys": b"}(" + BOMB + b"NNNu",
    "key of DICT": b"(" + BOMB + b"Nd",
    "key within a key": b"}" + BOMB + b"\x85Ns",
    "key of an OrderedDict": named("collections", "OrderedDict") + b")R" + BOMB + b"Ns",
    "item of OrderedDict's list": call("collections", "OrderedDict", b"]](" + BOMB + b"Nea"),
    "item of a set": b"\x8f(" + BOMB + b"\x90",
    "item of a frozenset": b"(" + BOMB + b"\x91",
    "set": call("builtins", "set", b"](" + BOMB + b"e"),
    "frozenset": call("builtins", "frozenset", BOMB),
    "slice as a key": b"}" + call("builtins", "slice", BOMB) + b"Ns",
    "size as a key": b"}" + call("torch", "Size", BOMB) + b"Ns",
    "name of a type": call("numpy", "dtype", BOMB),
    "byte order of a type": DTYPE + b"(K\x03" + BOMB + b"tb",
    "device": call("torch", "device", BOMB),
    "layout": call("torch.serialization", "_get_layout", BOMB),
    "encoded text": call("_codecs", "encode", BOMB),
    "name of a storage": b"("
    + text("storage")
    + named("torch", "FloatStorage")
    + BOMB
    + text("cpu")
    + b"K\x04tQ",
}
READ = """
import io, sys
from em_training.safe_pickle import check_opcodes
from em_training.torch_checkpoint import _read_pid
from em_training.torch_unpickler import TorchUnpickler
for line in sys.stdin:
    file = io.BytesIO(bytes.fromhex(line))
    check_opcodes(file)
    try:
        TorchUnpickler(file, _read_pid).load()
        print("read", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


def test_nested_tuples_do_not_hang_the_reader():
    lines = "".join(
        (b"\x80\x04" + instructions + b".").hex() + "\n" for instructions in BOMBS.values()
    )
    # in another process: what hashes such a tuple cannot be interrupted
    done = subprocess.run(
        [sys.executable, "-c", READ], input=lines, capture_output=True, text=True, timeout=60
    )
    answers = dict(zip(BOMBS, done.stdout.splitlines(), strict=True))
    assert {
        name: answer for name, answer in answers.items() if not answer.startswith("UnpicklingError")
    } == {}
    assert "a dictionary or set with a tuple as a key, or within one" in answers["key"]


def load(instructions):
    file = io.BytesIO(b"\x80\x04" + instructions + b".")
    check_opcodes(file)
    return SafeUnpickler(file).load()


@pytest.mark.parametrize(
    "key",
    ["name", b"name", 3, -(2**63), True, None, 0.5, 1j, ("a", 1), (), Record, torch.float32],
    ids=repr,
)
def test_keys_that_are_read(key):
    assert check_key(key) is key


def test_dictionaries_and_sets_are_read_as_ever():
    contents = {
        "a": {1: {"b"}, ("c", 2): frozenset({0.5, None})},
        b"d": [{}, set()],
        2**63: {"x": -1, "y": (1, (2, 3))},
    }
    for protocol in (2, 3, 4, 5):
        assert SafeUnpickler(io.BytesIO(pickle.dumps(contents, protocol))).load() == contents


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (b"}\x8a\x09" + (2**65).to_bytes(9, "little") + b"Ns", "a long number as a key"),
        (b"}(" + b"N" * 65 + b"tNs", "a key of 65 parts"),
        (b"]K\x00Ns", "puts items into a list"),
        (b"}Na", "puts items into a dict"),
        (b"N(NNe", "puts items into a NoneType"),
        (b"](N\x90", "puts items into a list"),
        (b"}}b", "gives a state to a dict, which takes none"),
        (DTYPE + b"}b", "malformed array"),
        (DTYPE + b"(K\x03" + text("O") + b"tb", "malformed array"),
    ],
)
def test_what_is_filled_and_set(instructions, message):
    with pytest.raises(pickle.UnpicklingError, match=message):
        load(instructions)


@pytest.mark.parametrize("data", [10**12, [0] * 8, "text", None], ids=type)
def test_storages_are_bytes(data):
    with pytest.raises(pickle.UnpicklingError, match="malformed storage"):
        read_stored_storage(data)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool], ids=str
)
def test_storages_of_tensors_that_were_pickled_on_their_own(dtype):
    values = torch.arange(6).to(dtype)
    _, arguments = values._typed_storage().__reduce__()
    storage = read_stored_storage(*arguments)
    assert (storage.dtype, storage.num_elements) == (dtype, 6)
    assert torch.equal(torch.frombuffer(storage.read(0, 6), dtype=dtype), values)


def module(**children):
    return Record.named("Module", {"_modules": children, "_parameters": {"weight": np.zeros(1)}})


def test_modules_are_flattened_by_name():
    found = flatten_module(module(a=module(c=module()), b=None, d=module()))
    assert list(found) == ["weight", "a.weight", "a.c.weight", "d.weight"]


def test_modules_without_an_end():
    inner = module()
    inner.state["_modules"]["self"] = inner
    with pytest.raises(ValueError, match="lie in each other without an end"):
        flatten_module(inner)
    shared = module()
    for _ in range(MAX_DEPTH - 1):
        shared = module(a=shared, b=shared)
    with pytest.raises(ValueError, match="lie in each other without an end"):
        flatten_module(shared)
