"""Official StyleGAN pickles read as data: networks are `Record`s, and nothing that is in the file is executed.

A pickle is a program for a small machine; all it can do to the outside is to call what `find_class` hands it. Ours hands out makers
of tensors and plain containers, and refuses every other name.
"""

import pickle
from pathlib import Path

from em_training.safe_pickle import PLAIN, Maker, PlainDict, Record, SafeUnpickler, check_opcodes
from em_training.torch_checkpoint import read_stored_storage, refuse_other_kinds
from em_training.torch_unpickler import StoredTensor


def _make_tensor(storage, offset, size, stride, *_):
    return StoredTensor(storage, offset, size, stride)


def _make_network(meta):
    if not isinstance(meta, dict):
        raise pickle.UnpicklingError("malformed network")
    return Record.named(meta.get("class_name"), meta.get("state") or {})


class OfficialUnpickler(SafeUnpickler):
    """An unpickler that builds `StoredTensor`s, numbers and plain containers, networks as `Record`s, and refuses everything else."""

    allowed = PLAIN | {
        ("dnnlib.util", "EasyDict"): PlainDict,
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): Maker(_make_network),
        ("torch._utils", "_rebuild_tensor_v2"): Maker(_make_tensor),
        ("torch._utils", "_rebuild_parameter"): Maker(lambda data, *_: data),
        ("torch.storage", "_load_from_bytes"): Maker(read_stored_storage),
    }

    def find_other(self, module, name):
        if module.split(".")[:2] == ["dnnlib", "tflib"]:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}: a TensorFlow-era pickle; convert it with stylegan3's legacy.py"
            )
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which is no part of a StyleGAN pickle"
        )


def read_pickle(path):
    """The dictionary of an official pickle, networks as `Record`s; `ValueError` that names the file, what is wrong with it and the way
    out."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the pickle's file.")
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        refuse_other_kinds(path, head)
        if head.startswith(b"PK"):
            raise ValueError(
                f"{path} is a zip archive: unpack it if a pickle is in it. A checkpoint of torch.save is no official StyleGAN's; "
                "those of stylegan2-ada-pytorch and stylegan3 are plain pickles, network-snapshot-*.pkl."
            )
        try:
            check_opcodes(file)
            contents = OfficialUnpickler(file).load()
        except Exception as error:  # a damaged pickle can raise anything; whatever it raises, the file is not one of ours
            raise ValueError(
                f"{path} is not a StyleGAN pickle that can be read safely: {error}"
            ) from error
    if isinstance(contents, Record):
        raise ValueError(
            f"{path} holds no network in a dictionary, but a {contents.class_name} on its own: with the original code, load it and "
            "pickle it again as {'G_ema': network}, or {'D': network} for a discriminator."
        )
    if not isinstance(contents, dict) or not any(
        isinstance(value, Record) for value in contents.values()
    ):
        raise ValueError(
            f"{path} holds no network: expected a dictionary with 'G_ema', 'G' or 'D', as the trainings write it "
            "(network-snapshot-*.pkl)."
        )
    return contents
