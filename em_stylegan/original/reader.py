"""Read network pickles of stylegan2-ada-pytorch and stylegan3 as data.

A pickle acts on the outside only by calling what `find_class` returns. Here that is a few functions
that build tensors, numbers and containers; every other name is refused, so nothing in a file is
executed.
"""

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from em_training.torch_checkpoint import refuse_other_kinds


@dataclass
class Network:
    """A pickled network as data: the name of its class, and its `__dict__` in `state`."""

    class_name: str
    state: dict


class _DType:
    """A numpy type that is being read."""

    def __init__(self, name, *_):
        self.name, self.byte_order = name, "="

    def __setstate__(self, state):
        self.byte_order = state[1]

    def read(self, data, **options):
        dtype = np.dtype(self.name)
        if dtype.kind not in "fiub":
            raise pickle.UnpicklingError(f"an array of type {self.name!r} holds no numbers")
        order = self.byte_order.replace("|", "=")
        return np.frombuffer(data, dtype.newbyteorder(order), **options).copy()


class StoredArray:
    """A numpy array that was read, in `array`."""

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        self.array = _read_array(data, dtype, shape, "F" if is_fortran else "C")


class _Function:
    """A function that a pickle may call and cannot alter."""

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a pickle may not alter its reader")


def _read_array(data, dtype, shape, order="C", *_):
    return dtype.read(data).reshape(shape, order=order)


def _read_storage(data):
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("expected the storage of a tensor")
    return storage


def _read_tensor(storage, offset, size, stride, *_):
    whole = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    return whole.as_strided(size, stride, offset)  # refuses to reach beyond the storage


def _read_network(meta):
    if not isinstance(meta["class_name"], str) or not isinstance(meta["state"], dict):
        raise pickle.UnpicklingError("malformed network")
    return Network(meta["class_name"], meta["state"])


ALLOWED = {
    ("_codecs", "encode"): _Function(lambda text, _="latin1": text.encode("latin1")),
    ("builtins", "bytearray"): bytearray,
    ("builtins", "bytes"): bytes,
    ("builtins", "complex"): complex,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "set"): set,
    ("builtins", "slice"): slice,
    ("collections", "OrderedDict"): OrderedDict,
    ("dnnlib.util", "EasyDict"): OrderedDict,
    ("numpy", "dtype"): _Function(_DType),
    ("numpy", "ndarray"): _Function(lambda *_: None),  # only an argument of `_reconstruct`
    ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *_: data),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_read_tensor),
    ("torch.storage", "_load_from_bytes"): _Function(_read_storage),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Function(_read_network),
}
for _core in ("numpy.core", "numpy._core"):
    ALLOWED |= {
        (f"{_core}.multiarray", "_reconstruct"): _Function(lambda *_: StoredArray()),
        (f"{_core}.multiarray", "scalar"): _Function(
            lambda dtype, data: dtype.read(data, count=1)[0].item()
        ),
        (f"{_core}.numeric", "_frombuffer"): _Function(_read_array),
    }


class OfficialUnpickler(pickle.Unpickler):
    """Builds tensors, numbers, containers and `Network`s, and refuses every other name."""

    def find_class(self, module, name):
        module = module.replace("__builtin__", "builtins")  # its name in protocol 2
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        what = (
            "a pickle of the TensorFlow version; convert it with stylegan3's legacy.py"
            if module.startswith("dnnlib.tflib")
            else "which is no part of a StyleGAN pickle"
        )
        raise pickle.UnpicklingError(f"it names {module}.{name}, {what}")


def read_pickle(path) -> dict:
    """Return the dictionary of a network pickle, with every network as a `Network`.

    Raises `ValueError` with the file, the reason and the way out if it is none.
    """
    path = Path(path)
    if refuse_other_kinds(path).startswith(b"PK"):
        raise ValueError(
            f"{path} is a zip archive: unpack it if it holds a pickle. If torch.save wrote it, it "
            "is no official StyleGAN's: stylegan2-ada-pytorch and stylegan3 write plain pickles, "
            "network-snapshot-*.pkl."
        )
    try:
        with path.open("rb") as file:
            contents = OfficialUnpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{path} is not a StyleGAN pickle that can be read safely: {error}"
        ) from error
    if isinstance(contents, Network):
        raise ValueError(
            f"{path} holds a {contents.class_name} on its own: load it with the original code and "
            "pickle it again as {'G_ema': network}, or {'D': network} for a discriminator."
        )
    if not isinstance(contents, dict) or not any(
        isinstance(value, Network) for value in contents.values()
    ):
        raise ValueError(
            f"{path} holds no network: expected a dictionary with 'G_ema', 'G' or 'D', as in "
            "network-snapshot-*.pkl."
        )
    return contents
