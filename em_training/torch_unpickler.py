"""What the pickles inside a file of `torch.save` become: tensors that stay in the file, and records of everything else."""

import io
import pickle
import sys
import zlib

import numpy as np
import torch

from em_training.safe_pickle import PLAIN, Maker, Record, SafeUnpickler, check_extent

STANDARD_MODULES = {*sys.stdlib_module_names, "__builtin__", "commands", "copy_reg", "nt"}
DATA_CLASSES = {
    "__builtin__.object",
    "argparse.Namespace",
    "builtins.object",
    "collections.deque",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "datetime.timezone",
    "decimal.Decimal",
    "fractions.Fraction",
    "functools.partial",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "types.SimpleNamespace",
    "typing.Any",
    "uuid.UUID",
}
"""Classes of the standard library that become records; a file that makes another one is refused, as one that calls a function."""


class StoredTensor:
    """A tensor that is still in its file: `shape`, `dtype`, and `read()`."""

    __slots__ = ("_offset", "_span", "_storage", "_stride", "shape")

    def __init__(self, storage, offset, size, stride):
        if not isinstance(storage, Storage):
            raise pickle.UnpicklingError("malformed tensor")
        self.shape, self._stride = tuple(size), tuple(stride)
        self._span = check_extent(storage.num_elements, offset, self.shape, self._stride)
        self._storage, self._offset = storage, offset

    @property
    def dtype(self) -> torch.dtype:
        return self._storage.dtype

    def read(self) -> torch.Tensor:
        """The tensor, on the CPU, with memory of its own; `ValueError` when the file is cut short or damaged there."""
        if not self._span:
            return torch.empty(self.shape, dtype=self.dtype)
        data = self._storage.read(self._offset, self._span)
        return torch.frombuffer(data, dtype=self.dtype).as_strided(self.shape, self._stride)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("malformed tensor")

    def __repr__(self):
        return f"<tensor of {self.dtype} {self.shape}, in its file>"


class Storage:
    """The numbers of tensors: where they lie in the file at `path`, a `Path` or a `FileInMemory`."""

    __slots__ = ("_is_checked", "big_endian", "crc", "dtype", "num_elements", "path", "start")

    def __init__(self, path, dtype, num_elements):
        if type(num_elements) is not int or num_elements < 0:
            raise pickle.UnpicklingError("malformed storage")
        self.path, self.dtype, self.num_elements = path, dtype, num_elements
        self.start, self.crc, self.big_endian, self._is_checked = None, 0, False, False

    @property
    def num_bytes(self):
        return self.num_elements * self.dtype.itemsize

    def __setstate__(self, state):
        raise pickle.UnpicklingError("malformed storage")

    def read(self, offset, count):
        """The bytes of `count` elements from `offset`, in this machine's order."""
        item = self.dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(self.start + offset * item)
            data = bytearray(file.read(count * item))
            if len(data) != count * item:
                raise ValueError(f"{self.path} is cut short: fetch it again.")
            if self.crc and not self._is_checked:
                file.seek(self.start)
                whole = data if count == self.num_elements else file.read(self.num_bytes)
                if zlib.crc32(whole) != self.crc:
                    raise ValueError(
                        f"{self.path} is damaged (a checksum does not fit): fetch it again."
                    )
                self._is_checked = True
        if self.big_endian != (sys.byteorder == "big") and item > 1:
            part = item // 2 if self.dtype.is_complex else item
            data = bytearray(np.frombuffer(data, f"u{part}").byteswap().tobytes())
        return data


class FileInMemory:
    """Bytes that are read as the file of a path would be."""

    __slots__ = ("_data",)

    def __init__(self, data):
        self._data = data

    def open(self, mode):
        return io.BytesIO(self._data)

    def __str__(self):
        return "a file within the file"


class StorageType:
    """The type of a storage, such as torch.FloatStorage."""

    __slots__ = ("dtype",)

    def __init__(self, dtype):
        self.dtype = dtype

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a pickle may not alter its reader")


def _refuse_call(name):
    def refuse(*_):
        raise pickle.UnpicklingError(
            f"it would call {name}, which is no data (nothing of it was run)"
        )

    return Maker(refuse)


def _join_device(*parts):
    if not all(type(part) in (str, int) for part in parts):
        raise pickle.UnpicklingError("malformed device")
    return ":".join(map(str, parts))


def _name_layout(name):
    if type(name) is not str:
        raise pickle.UnpicklingError("malformed layout")
    return name


def _rebuild_from_type(function, _, args, __):
    if not isinstance(function, Maker):
        raise pickle.UnpicklingError("malformed tensor")
    return function(*args)


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_stored_tensor = Maker(
    lambda storage, offset, size, stride, *_: StoredTensor(storage, offset, size, stride)
)
_parameter = Maker(lambda data, *_: data)
TORCH = PLAIN | {
    ("torch._utils", "_rebuild_tensor"): _stored_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _stored_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): Maker(_rebuild_from_type),
    ("torch", "Size"): Maker(lambda size=(): tuple(size)),
    ("torch", "device"): Maker(_join_device),
    ("torch.serialization", "_get_layout"): Maker(_name_layout),
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _STORAGES.values()},
    **{
        (module, name): StorageType(dtype)
        for module in ("torch", "torch.storage", "torch.cuda")
        for name, dtype in _STORAGES.items()
    },
}


class TorchUnpickler(SafeUnpickler):
    """Builds `StoredTensor`s and plain containers; classes become `Record`s, and a call of a function is an error."""

    allowed = TORCH

    def __init__(self, file, load_storage):
        super().__init__(file, encoding="utf-8")
        self._load_storage = load_storage
        self._records = {}

    def find_other(self, module, name):
        full_name = f"{module}.{name}"
        is_class = name[:1].isupper() and name.isidentifier()
        is_standard = module.split(".")[0] in STANDARD_MODULES
        if full_name not in DATA_CLASSES and (is_standard or not is_class):
            return _refuse_call(full_name)
        if full_name not in self._records:
            self._records[full_name] = type(
                name, (Record,), {"__slots__": (), "pickled_name": full_name}
            )
        return self._records[full_name]

    def persistent_load(self, pid):
        return self._load_storage(pid)
