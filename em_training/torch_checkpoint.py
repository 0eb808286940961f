"""Files of `torch.save` read as data: tensors, numbers and plain containers; nothing that is in them is run or imported.

All three formats: the zip archive of today, the stream of pickles before it, and the tar archive before that. Tensors stay in
the file until they are asked for, so that a checkpoint's optimizer costs nothing.
"""

import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

from em_training.safe_pickle import SafeUnpickler, check_extent, check_key, check_opcodes
from em_training.torch_unpickler import (
    FileInMemory,
    Storage,
    StorageType,
    StoredTensor,
    TorchUnpickler,
)

MAGIC = 0x1950A86A20F9469CFC6C


def read_torch_checkpoint(path):
    """What `torch.save` wrote to `path`, as plain data: tensors as `StoredTensor`, numpy arrays as `StoredArray`, instances of
    classes as `Record`.

    Raises `ValueError` in one sentence, with the way out, when the file is another kind, is cut short or damaged, or holds a
    program: nothing in it is ever run.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the checkpoint's file.")
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        reader = _find_reader(path, head)
        try:
            return reader(path, file)
        except (
            Exception
        ) as error:  # a damaged file can raise anything; whatever it raises, nothing of it was run
            reason = error if str(error) else type(error).__name__
            raise ValueError(f"{path} cannot be read as a torch checkpoint: {reason}.") from error


def read_stored_storage(data):
    """The `Storage` that a tensor outside of `torch.save`, pickled on its own, holds as a file of its own in `data`.

    Raises what can be raised by damaged bytes; nothing in them is ever run.
    """
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("malformed storage")
    storage = _read_stream(FileInMemory(bytes(data)), io.BytesIO(data))
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("expected the storage of a tensor")
    return storage


PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
}


def refuse_other_kinds(path, head):
    """Raise `ValueError` with the way out when a file that begins with the 512 bytes `head` is of a kind that holds no checkpoint."""
    if not head:
        raise ValueError(f"{path} is empty: fetch it again.")
    for start, name in PACKED.items():
        if head.startswith(start):
            raise ValueError(
                f"{path} is packed with {name}: unpack it, and give the file that was in it."
            )
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a pointer of Git LFS, not the file: fetch it with `git lfs pull`."
        )
    if head.lstrip()[:1] == b"<":
        raise ValueError(
            f"{path} is a web page, not a checkpoint: open its address in a browser and save the file itself."
        )
    if (
        len(head) > 8
        and head[8:9] == b"{"
        and struct.unpack("<Q", head[:8])[0] < path.stat().st_size
    ):
        raise ValueError(
            f"{path} is a safetensors file, not a torch checkpoint: give the folder that it belongs to, with its config.json."
        )


def _find_reader(path, head):
    refuse_other_kinds(path, head)
    if head.startswith(b"PK"):
        return _read_zip
    if head[257:262] == b"ustar":
        return _read_tar
    return _read_stream


def _unpickle(file, load_storage):
    check_opcodes(file)
    return TorchUnpickler(file, load_storage).load()


def _read_zip(path, file):
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise ValueError("it is cut short or damaged; fetch it again") from error
    names = {info.filename: info for info in archive.infolist()}
    root = next(
        (
            name[: -len("data.pkl")]
            for name in names
            if name.count("/") == 1 and name.endswith("/data.pkl")
        ),
        None,
    )
    if root is None:
        raise ValueError("it is a zip archive without torch's data.pkl")
    if root + "constants.pkl" in names:
        raise ValueError(
            "it is a TorchScript program, which only running it would open; save its state_dict with torch.save"
        )
    if any(info.compress_type != zipfile.ZIP_STORED for info in names.values()):
        raise ValueError(
            "its parts are compressed, which torch.save never does; unpack it and save it again with torch.save"
        )
    byte_order = names.get(root + "byteorder")
    big_endian = byte_order is not None and _read_entry(file, byte_order) == b"big"
    storages = {}

    def load_storage(pid):
        dtype, key, count = _read_pid(pid)
        if key not in storages:
            info = names.get(f"{root}data/{key}")
            storage = Storage(path, dtype, count)
            if info is None or info.file_size < storage.num_bytes:
                raise ValueError(
                    f"storage {key} says it has {count} elements, and the file does not hold them"
                )
            storage.start, storage.big_endian = _find_entry(file, info), big_endian
            storage.crc = info.CRC if info.file_size == storage.num_bytes else 0
            storages[key] = storage
        return storages[key]

    return _unpickle(io.BytesIO(_read_entry(file, names[root + "data.pkl"])), load_storage)


def _find_entry(file, info):
    """Where the contents of an entry of a zip archive begin."""
    file.seek(info.header_offset + 26)
    return info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


def _read_entry(file, info):
    # zipfile would refuse archives that torch wrote without checksums, which have 0 in their place
    file.seek(_find_entry(file, info))
    data = file.read(info.file_size)
    if len(data) != info.file_size or (info.CRC and zlib.crc32(data) != info.CRC):
        raise ValueError("it is cut short or damaged; fetch it again")
    return data


def _read_pid(pid):
    """Type, name and length of a storage from what stands for it in the pickle."""
    if (
        type(pid) is not tuple
        or len(pid) < 5
        or pid[0] != "storage"
        or not isinstance(pid[1], StorageType)
    ):
        raise pickle.UnpicklingError("it refers to objects outside the file")
    if type(pid[2]) not in (str, int):
        raise pickle.UnpicklingError("malformed storage")
    return pid[1].dtype, str(pid[2]), pid[4]


def _read_stream(path, file):
    """The format of torch 0.1.10 to 1.5: four pickles, then the storages in the order of their names."""
    _check_magic(file)
    for _ in range(2):  # its version and the machine that wrote it
        system = _unpickle(file, _refuse_pid)
    storages, views = {}, []

    def load_storage(pid):
        if (
            type(pid) is tuple and len(pid) > 1 and pid[0] == "module"
        ):  # a class, with its source text
            return pid[1]
        dtype, key, count = _read_pid(pid)
        if key not in storages:
            storages[key] = Storage(path, dtype, count)
        if len(pid) > 5 and pid[5] is not None:
            _, offset, size = pid[5]
            view = Storage(path, dtype, size)
            check_extent(count, offset, (size,), (1,))
            views.append((view, storages[key], offset))
            return view
        return storages[key]

    contents = _unpickle(file, load_storage)
    big_endian = isinstance(system, dict) and not system.get("little_endian", True)
    for key in _unpickle(file, _refuse_pid):
        _place(storages[check_key(key)], file, big_endian)
    if any(storage.start is None for storage in storages.values()):
        raise ValueError("it does not hold all of its storages")
    for view, storage, offset in views:
        view.start, view.big_endian = storage.start + offset * storage.dtype.itemsize, big_endian
    return contents


def _place(storage, file, big_endian=False):
    """Let the storage begin at the file's position, after its length, and pass over it."""
    (count,) = struct.unpack(">q" if big_endian else "<q", file.read(8))
    if count != storage.num_elements:
        raise ValueError(f"a storage of {storage.num_elements} elements says that it has {count}")
    storage.start, storage.big_endian = file.tell(), big_endian
    end = storage.start + storage.num_bytes
    if end > file.seek(0, io.SEEK_END):
        raise ValueError("it is cut short; fetch it again")
    file.seek(end)


def _check_magic(file):
    start = file.read(4096)
    file.seek(0)
    if b"torch_utils.persistence" in start or b"dnnlib" in start:
        raise ValueError(
            "it is a StyleGAN pickle; convert it with python -m em_stylegan.load_official"
        )
    try:
        check_opcodes(io.BytesIO(start[:64]))
        is_magic = SafeUnpickler(io.BytesIO(start[:64])).load() == MAGIC
    except Exception:
        is_magic = False
    if not is_magic:
        raise ValueError(
            "it was not written by torch.save; save its tensors again with torch.save, or as safetensors"
        )
    check_opcodes(file)
    SafeUnpickler(file).load()


def _refuse_pid(pid):
    raise pickle.UnpicklingError("it refers to objects outside the file")


def _read_tar(path, file):
    """The format before torch 0.1.10: storages, tensors and a pickle that names them by number."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        members = {member.name: member for member in archive.getmembers() if member.isfile()}
    if not {"storages", "tensors", "pickle"} <= set(members):
        raise ValueError("it is a tar archive without torch's storages, tensors and pickle")
    file.seek(members["storages"].offset_data)
    storages = {}
    for _ in range(_read_count(file)):
        key, _, storage_type = _unpickle(file, _refuse_pid)
        (count,) = struct.unpack("<q", file.read(8))
        storages[check_key(key)] = Storage(path, storage_type.dtype, count)
        file.seek(-8, io.SEEK_CUR)
        _place(storages[key], file)
    for key, root, offset, size in _unpickle(file, _refuse_pid):
        check_extent(storages[check_key(root)].num_elements, offset, (size,), (1,))
        view = storages[check_key(key)] = Storage(path, storages[root].dtype, size)
        view.start = storages[root].start + offset * view.dtype.itemsize
    file.seek(members["tensors"].offset_data)
    tensors = dict(storages)
    for _ in range(_read_count(file)):
        key, storage_key, _ = _unpickle(file, _refuse_pid)
        (dims,) = struct.unpack("<i4x", file.read(8))
        if not 0 <= dims <= 64:
            raise ValueError("a tensor has an absurd number of dimensions")
        size, stride = (struct.unpack(f"<{dims}q", file.read(8 * dims)) for _ in range(2))
        (offset,) = struct.unpack("<q", file.read(8))
        tensors[check_key(key)] = StoredTensor(
            storages[check_key(storage_key)], offset, size, stride
        )

    file.seek(members["pickle"].offset_data)
    return _unpickle(file, lambda pid: pid[0] if type(pid) is tuple else tensors[int(pid)])


def _read_count(file):
    count = _unpickle(file, _refuse_pid)
    if type(count) is not int:
        raise ValueError("malformed count")
    return count
