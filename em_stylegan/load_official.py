"""Read the pickles that official StyleGAN2 trainings write, and execute nothing that is in them.

    python -m em_stylegan.load_official IN.pkl OUT_DIR

A pickle is a program for a small machine; all it can do to the outside is to call what `find_class` hands it. Ours hands out makers
of tensors and plain containers, and refuses every other name.
"""

import argparse
import io
import math
import pickle
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator, blur_kernel


@dataclass
class Stored:
    """A pickled object as data: the name of its class, and its state. It has no behaviour."""

    class_name: str
    state: dict = field(default_factory=dict)


class _DType:
    """The name and byte order of a numpy scalar type; numbers only."""

    def __init__(self, name):
        self.name, self.byte_order = str(name), "<"

    def __setstate__(self, state):
        self.byte_order = str(state[1])

    def numpy(self):
        dtype = np.dtype(self.name)
        if dtype.kind not in "fiub":
            raise pickle.UnpicklingError(f"a scalar of type {self.name!r} is not a number")
        return dtype.newbyteorder(self.byte_order if self.byte_order in "<>" else "=")


def _read_storage(data):
    # torch writes each storage as a file of its own; weights_only reads it by torch's restricted unpickler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TypedStorage is deprecated, and it is what these files hold
        storage = torch.load(io.BytesIO(bytes(data)), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.TypedStorage):
        raise pickle.UnpicklingError("expected the storage of a tensor")
    return storage


def _make_tensor(storage, offset, size, stride, *_):
    size, stride = tuple(size), tuple(stride)
    if (
        not isinstance(storage, torch.TypedStorage)
        or len(size) != len(stride)
        or min((offset, *size, *stride), default=0) < 0
    ):
        raise pickle.UnpicklingError("malformed tensor")
    untyped, dtype = storage._untyped_storage, storage.dtype
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) and last >= untyped.nbytes() // dtype.itemsize:
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return torch.empty(0, dtype=dtype).set_(untyped, offset, size, stride).clone()


class _Maker:
    """A function that a pickle may call and cannot alter."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args):
        return self._function(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError("a pickle may not alter its reader")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a pickle may not alter its reader")


class _Array:
    """A numpy array of numbers, being read: numpy's own `__setstate__` would believe any sizes it is told."""

    __slots__ = ("array",)

    def __init__(self, *_):
        object.__setattr__(self, "array", None)

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        self.array = _read_array(data, dtype, shape, "F" if is_fortran else "C")


def _read_array(data, dtype, shape, order="C", *_):
    if not isinstance(dtype, _DType) or order not in ("C", "F"):
        raise pickle.UnpicklingError("malformed array")
    return np.frombuffer(bytes(data), dtype=dtype.numpy()).reshape(tuple(int(n) for n in shape), order=order).copy()


class _Dict(dict):
    """What stands for `dnnlib.util.EasyDict`: a dictionary and nothing more."""

    __slots__ = ()

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a dictionary with attributes")


_read_scalar = _Maker(lambda dtype, data: np.frombuffer(data, dtype=dtype.numpy(), count=1)[0].item())
_read_set = _Maker(lambda items=(): set(items))
ALLOWED = {
    ("builtins", "set"): _read_set,  # of protocol 3, in which Python 3.7 wrote
    ("__builtin__", "set"): _read_set,
    ("builtins", "bytearray"): _Maker(lambda data=b"": bytes(data)),
    ("_codecs", "encode"): _Maker(lambda text, _: text.encode("latin1")),  # bytes of protocol 2
    ("collections", "OrderedDict"): _Maker(lambda: OrderedDict()),
    ("dnnlib.util", "EasyDict"): _Dict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Maker(
        lambda meta: Stored(str(meta.get("class_name")), dict(meta.get("state") or {}))
    ),
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(_make_tensor),
    ("torch._utils", "_rebuild_parameter"): _Maker(lambda data, *_: data),
    ("torch.storage", "_load_from_bytes"): _Maker(_read_storage),
    ("numpy", "dtype"): _Maker(lambda name, *_: _DType(name)),
    ("numpy", "ndarray"): "numpy.ndarray",  # only an argument of the next
}
for _module in ("numpy.core", "numpy._core"):
    ALLOWED[f"{_module}.multiarray", "scalar"] = _read_scalar
    ALLOWED[f"{_module}.multiarray", "_reconstruct"] = _Maker(_Array)
    ALLOWED[f"{_module}.numeric", "_frombuffer"] = _Maker(_read_array)


class OfficialUnpickler(pickle.Unpickler):
    """An unpickler that builds tensors, numbers and plain containers, and refuses everything else."""

    def find_class(self, module, name):
        if module.split(".")[:2] == ["dnnlib", "tflib"]:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}: a TensorFlow-era pickle; convert it with stylegan3's legacy.py"
            )
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a StyleGAN pickle") from None

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_pickle(path):
    """The dictionary of an official pickle, networks as `Stored`; ValueError that names the file and what is wrong with it."""
    try:
        with open(path, "rb") as file:
            contents = OfficialUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything; whatever it raises, the file is not one of ours
        raise ValueError(f"{path} is not a StyleGAN2 pickle that can be read safely: {error}") from error
    if not isinstance(contents, dict) or not any(isinstance(value, Stored) for value in contents.values()):
        raise ValueError(f"{path} holds no network: expected a dictionary with 'G_ema', 'G' or 'D'.")
    return contents


def flatten_state(network, prefix=""):
    """All parameters and buffers of a `Stored` network as {dotted name: tensor}."""
    tensors = {}
    for kind in ("_parameters", "_buffers"):
        tensors |= {prefix + name: value for name, value in network.state.get(kind, {}).items() if value is not None}
    for name, child in network.state.get("_modules", {}).items():
        if child is not None:
            tensors |= flatten_state(child, f"{prefix}{name}.")
    return tensors


def _submodule(network, path):
    for name in path.split("."):
        network = network.state["_modules"][name]
    return network


def _channel_config(num_channels):
    """channel_base and max_channels that give `num_channels` {resolution: feature maps}."""
    max_channels = max(num_channels.values())
    smaller = [r * c for r, c in num_channels.items() if c < max_channels]
    channel_base = smaller[0] if smaller else max(num_channels) * max_channels
    if any(min(channel_base // r, max_channels) != c for r, c in num_channels.items()):
        raise ValueError(f"feature maps {num_channels} do not follow min(channel_base // resolution, max_channels).")
    return {"channel_base": channel_base, "max_channels": max_channels}


def _check(network, blocks, class_name, architecture):
    if network.class_name != class_name:
        raise ValueError(f"the network is a {network.class_name}, not StyleGAN2's {class_name}.")
    for resolution in blocks:
        found = _submodule(network, blocks[resolution]).state.get("architecture")
        if found != architecture:
            raise ValueError(
                f"the {class_name.lower()} is of the {found!r} architecture; only {architecture!r} is supported."
            )
    for name, tensor in flatten_state(network).items():
        if name.endswith("resample_filter") and not torch.equal(tensor.float(), blur_kernel()):
            raise ValueError(f"{name} is not the filter [1, 3, 3, 1].")


def _load(model, tensors, names):
    expected = set(model.state_dict())
    state = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    unknown = sorted(name for name in tensors if name not in names and not name.endswith("resample_filter"))
    if unknown or expected != set(state):
        raise ValueError(f"the network does not fit: unknown {unknown}, missing {sorted(expected - set(state))}.")
    model.load_state_dict(state)
    return model.eval()


def _mapping_names(official, ours, depth):
    names = {
        f"{official}.fc{i}.{kind}": f"{ours}.layers.{i}.{kind}" for i in range(depth) for kind in ("weight", "bias")
    }
    names |= {f"{official}.embed.{kind}": f"{ours}.embed.{kind}" for kind in ("weight", "bias")}
    return names | {f"{official}.w_avg": f"{ours}.w_mean"}


def generator_from_official(network):
    """`StyleGAN2Generator` with the weights of a `Stored` official StyleGAN2 generator (`G` or `G_ema`); ValueError when it is another."""
    resolution = int(network.state.get("img_resolution", 0))
    resolutions = [2**i for i in range(2, resolution.bit_length())]
    _check(network, {r: f"synthesis.b{r}" for r in resolutions}, "Generator", "skip")
    tensors = flatten_state(network)
    depth = int(_submodule(network, "mapping").state["num_layers"])
    model = StyleGAN2Generator(
        resolution=resolution,
        image_channels=int(network.state["img_channels"]),
        z_dim=int(network.state["z_dim"]),
        w_dim=int(network.state["w_dim"]),
        mapping_depth=depth,
        num_classes=int(network.state["c_dim"]),
        clamp=_submodule(network, "synthesis.b4.conv1").state.get("conv_clamp"),
        **_channel_config({r: tensors[f"synthesis.b{r}.conv1.weight"].shape[0] for r in resolutions}),
    )
    names = _mapping_names("mapping", "mapping_network", depth)
    for i, r in enumerate(resolutions):
        official, ours = f"synthesis.b{r}", f"synthesis_network.blocks.{i}"
        names[f"{official}.const"] = f"{ours}.const"
        for a, b in (("conv0", "conv0"), ("conv1", "conv1"), ("torgb", "to_image")):
            for kind in ("weight", "bias", "noise_strength", "noise_const"):
                names[f"{official}.{a}.{kind}"] = f"{ours}.{b}.{kind}"
            for kind in ("weight", "bias"):
                names[f"{official}.{a}.affine.{kind}"] = f"{ours}.{b}.style.{kind}"
    return _load(model, tensors, names)


def discriminator_from_official(network):
    """`StyleGANDiscriminator` with the weights of a `Stored` official discriminator (`D`); ValueError when it is another."""
    resolution = int(network.state.get("img_resolution", 0))
    resolutions = [2**i for i in range(resolution.bit_length() - 1, 2, -1)]  # R ... 8
    _check(network, {r: f"b{r}" for r in resolutions}, "Discriminator", "resnet")
    tensors = flatten_state(network)
    num_classes = int(network.state["c_dim"])
    deviation = _submodule(network, "b4.mbstd")
    if int(deviation.state["num_channels"]) != 1:
        raise ValueError("the discriminator has more than one minibatch deviation map; only one is supported.")
    num_channels = {r: tensors[f"b{r}.conv0.weight"].shape[0] for r in resolutions} | {
        4: tensors["b4.conv.weight"].shape[0]
    }
    depth = int(_submodule(network, "mapping").state["num_layers"]) if num_classes else 8
    model = StyleGANDiscriminator(
        resolution=resolution,
        image_channels=int(network.state["img_channels"]),
        group_size=int(deviation.state["group_size"]),
        num_classes=num_classes,
        class_mapping_depth=depth,
        clamp=_submodule(network, "b4.conv").state.get("conv_clamp"),
        **_channel_config(num_channels),
    )
    names = _mapping_names("mapping", "class_mapping", depth)
    pairs = [(f"b{resolution}.fromrgb", "from_image"), ("b4.conv", "conv"), ("b4.fc", "linear"), ("b4.out", "out")]
    for i, r in enumerate(resolutions):
        pairs += [(f"b{r}.{name}", f"blocks.{i}.{name}") for name in ("conv0", "conv1", "skip")]
    names |= {f"{official}.{kind}": f"{ours}.{kind}" for official, ours in pairs for kind in ("weight", "bias")}
    return _load(model, tensors, names)


def main():
    parser = argparse.ArgumentParser(description="Convert an official StyleGAN2 pickle to safetensors.")
    parser.add_argument("pickle", type=Path)
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    contents = read_pickle(args.pickle)
    for key, convert in (
        ("G_ema", generator_from_official),
        ("G", generator_from_official),
        ("D", discriminator_from_official),
    ):
        if isinstance(contents.get(key), Stored):
            convert(contents[key]).save_pretrained(args.out_dir / key)
            print(f"{key} -> {args.out_dir / key}")


if __name__ == "__main__":
    main()
