"""Read files of `torch.save` as data: tensors, containers, and a `Record` for all else.

`torch.load(weights_only=True)` reads the file and executes nothing in it. Classes that it does not
know, such as Lightning's callbacks or DALL-E's layers, are replaced by classes without behaviour.

Limits: tar files (torch before 0.1.10), other pickle protocols than 2, and whole modules in files
of torch before 1.6 are refused. A file that is made to waste time or memory can do so, up to the
sizes that `copy_tensor` accepts.
"""

import io
import pickle
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # begins the files of torch before 1.6
MAX_REPEATED = 2**20  # elements of a tensor that repeats its storage
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
PACKED |= {b"7z\xbc\xaf": "7z"}
STANDARD_MODULES = {*sys.stdlib_module_names, "commands", "nt"}
BLOCKED = {"nt", "os", "posix", "sys"}  # torch refuses even to name what is in them
DATA = {
    *("argparse", "collections", "copyreg", "datetime", "decimal", "fractions", "functools"),
    *("numpy._core.multiarray", "numpy._core.numeric", "numpy.core.multiarray", "pathlib", "uuid"),
    *("builtins.bytes", "builtins.frozenset", "builtins.object", "builtins.slice", "numpy.dtype"),
    *("numpy.ndarray", "types.SimpleNamespace", "typing.Any"),
}
"""Modules and names that a file may call, beside classes outside of the standard library."""


class _Kind(type):
    """The class of `Record` classes, equal to `dict`: torch fills only what it takes for a dict."""

    def __eq__(cls, other):
        return cls is other or other is dict

    __hash__ = type.__hash__


class Record(list, metaclass=_Kind):
    """A pickled object as data: its class's name, constructor arguments, attributes and items.

    It is a list because torch appends only to lists. It has no behaviour of the original class.
    """

    class_name = "object"

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.args, self.state, self.items = args, {}, []
        return self

    def __init__(self, *args, **kwargs):
        super().__init__()

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]  # unlike lists, a record can be a key

    def __setstate__(self, state):
        is_pair = isinstance(state, tuple) and len(state) == 2  # attributes and slots
        for part in state if is_pair else (state,):
            self.state |= part if isinstance(part, dict) else {}

    def __setitem__(self, key, value):
        self.items.append((key, value))


def read_torch_checkpoint(path):
    """Return what `torch.save` wrote to `path`; tensors of a zip file are memory-mapped.

    Raises `ValueError` with one sentence and the way out if the file is of another kind, is
    damaged, or calls anything that is not data. Nothing in the file is executed.
    """
    path = Path(path)
    head = refuse_other_kinds(path)
    if b"torch_utils.persistence" in head or b"dnnlib" in head:
        raise ValueError(
            f"{path} is a StyleGAN pickle; convert it with python -m em_stylegan.load_official."
        )
    is_zip = head.startswith(b"PK")
    if not is_zip and not head.startswith(MAGIC):
        raise ValueError(
            f"{path} was not written by torch.save: save its tensors again with torch.save, or as "
            "safetensors."
        )
    try:
        if is_zip:
            _check_archive(path)
            names, source = get_unsafe_globals_in_checkpoint(path), str(path)
        else:
            source = io.BytesIO(path.read_bytes())
            names = _list_names(source)
        stand_ins = [(_create_stand_in(name), name) for name in names]
        with safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged file can raise anything
        hint = (
            " Load it where it was written, and save its state_dict with torch.save."
            if isinstance(error, pickle.UnpicklingError)
            else ""
        )
        raise ValueError(
            f"{path} cannot be read as a torch checkpoint: {_find_reason(error)}.{hint}"
        ) from error


def refuse_other_kinds(path) -> bytes:
    """Return the first 512 bytes of a file; refuse kinds of files that are no checkpoint."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the file.")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty: download it again.")
    for start, name in PACKED.items():
        if head.startswith(start):
            raise ValueError(f"{path} is packed with {name}: unpack it and give the file inside.")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file: download the file with `git lfs pull`."
        )
    if head.lstrip()[:1] == b"<":
        raise ValueError(
            f"{path} is a web page, not a checkpoint: open its address in a browser and save the "
            "file."
        )
    if head[257:262] == b"ustar":
        raise ValueError(
            f"{path} is a tar archive: unpack it. If torch before 0.1.10 wrote it as a checkpoint, "
            "load it with torch 1.0 and save it again with torch.save."
        )
    length = struct.unpack("<Q", head[:8].ljust(8, b"\0"))[0]
    if head[8:9] == b"{" and length < path.stat().st_size:
        raise ValueError(
            f"{path} is a safetensors file, not a torch checkpoint: give the folder that it "
            "belongs to, with its config.json."
        )
    return head


def copy_tensor(tensor) -> torch.Tensor:
    """Return a copy of a tensor of a checkpoint, float32 if it is a floating-point one."""
    num_stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > max(num_stored, MAX_REPEATED):
        raise ValueError(f"a tensor repeats its {num_stored} numbers to {tensor.numel():.3g}.")
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True).contiguous()


def flatten_module(module, prefix="") -> dict:
    """Return {dotted name: tensor} of a pickled module with its `__dict__` in `state`."""
    tensors = {
        prefix + name: value
        for kind in ("_parameters", "_buffers")
        for name, value in module.state.get(kind, {}).items()
        if value is not None
    }
    for name, child in module.state.get("_modules", {}).items():
        if child is not None:
            tensors |= flatten_module(child, f"{prefix}{name}.")
    return tensors


def _check_archive(path):
    """Refuse a zip archive that torch would misread: it ignores checksums and compression."""
    with zipfile.ZipFile(path) as archive:
        parts = {name.rpartition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in parts:
            raise ValueError(
                "it is a TorchScript program; save its state_dict with torch.save instead"
            )
        if "data.pkl" not in parts:
            raise ValueError("it is a zip archive without torch's data.pkl")
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("its parts are compressed; unpack it and save it with torch.save")
            if entry.CRC:  # 0 in files that torch wrote without checksums
                with archive.open(entry) as part:
                    while part.read(2**24):
                        pass


def _list_names(file):
    """Return the names of classes and functions in the first four pickles of a file."""
    names = {
        argument.replace("__builtin__ ", "builtins ").replace("copy_reg ", "copyreg ")
        for _ in range(4)
        for opcode, argument, _ in pickletools.genops(file)
        if opcode.name == "GLOBAL"
    }
    file.seek(0)
    return [name.replace(" ", ".") for name in names]


def _create_stand_in(name):
    """Return a `Record` class for a class, and a function that refuses to be called otherwise."""
    module, _, attribute = name.rpartition(".")
    is_class = attribute[:1].isupper() and module.split(".")[0] not in STANDARD_MODULES
    if is_class or module in DATA or name in DATA:
        return type(Record)(attribute, (Record,), {"class_name": name})

    def refuse(*args):
        raise ValueError(f"it would call {name}, which is no data (nothing of it was run)")

    return refuse() if module in BLOCKED else refuse


def _find_reason(error):
    """Return what went wrong, without torch's advice to load the file unsafely."""
    if isinstance(error, zipfile.BadZipFile):
        return "it is cut short or damaged; download it again"
    text = re.sub(r".*WeightsUnpickler error:\s*", "", str(error), flags=re.DOTALL).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
