"""The networks of stylegan2-ada-pytorch and stylegan3, as `official_pickle` reads them -> ours, or an error that says what ours lack."""

import math
import reprlib

import numpy as np
import torch

from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator, blur_kernel
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.original.reader import StoredArray
from em_training.torch_checkpoint import copy_tensor, flatten_module


def _submodule(network, path):
    for name in path.split("."):
        network = network.state["_modules"][name]
    return network


def _channel_config(num_channels):
    """channel_base and max_channels that give `num_channels` {resolution: feature maps}."""
    max_channels = max(num_channels.values())
    channel_base = max(r * c for r, c in num_channels.items())
    if any(min(channel_base // r, max_channels) != c for r, c in num_channels.items()):
        raise ValueError(
            f"feature maps {num_channels} do not follow min(channel_base // resolution, max_channels)."
        )
    return {"channel_base": channel_base, "max_channels": max_channels}


def _flatten(network):
    """The parameters and buffers of a network, {dotted name: tensor}."""
    tensors = flatten_module(network)
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} is no tensor.")
    return tensors


def _check(network, class_name):
    """Refuse another class of network, and another filter than ours."""
    if network.class_name != class_name:
        raise ValueError(f"the network is a {network.class_name}, not StyleGAN's {class_name}.")
    for name, tensor in _flatten(network).items():
        if name.endswith("resample_filter") and not _holds(tensor, blur_kernel()):
            raise ValueError(f"{name} is not the filter [1, 3, 3, 1].")


def _expect(network, path, **expected):
    """Refuse the layer at `path` where an attribute differs from what ours computes with; one that is not stored does not."""
    state = _submodule(network, path).state
    for name, value in expected.items():
        found = state.get(name, value)
        if type(found) in (int, float) and type(value) in (int, float):
            same = math.isclose(found, value, rel_tol=1e-6)
        else:
            same = type(found) is type(value) and found == value
        if not same:
            raise ValueError(
                f"{path} has {name} {reprlib.repr(found)}; ours computes with {value}."
            )


def _expect_linear(network, tensors, path, activation="linear", rate=1.0):
    fan_in = tensors[f"{path}.weight"].shape[1]
    _expect(
        network, path, activation=activation, weight_gain=rate / math.sqrt(fan_in), bias_gain=rate
    )


def _expect_convolution(network, tensors, path, activation, clamp, up=1, down=1):
    """As `_expect`, of a convolution with or without modulation and of a layer to an image, as far as each has these attributes."""
    _, *fan_in, kernel_size = tensors[f"{path}.weight"].shape
    _expect(
        network,
        path,
        activation=activation,
        up=up,
        down=down,
        conv_clamp=clamp,
        weight_gain=1 / math.sqrt(math.prod(fan_in) * kernel_size),
        act_gain=math.sqrt(2) if activation == "lrelu" else 1,
        padding=kernel_size // 2,
    )


def _num_reduced(network, blocks):
    """How many of these blocks, from the lowest resolution to the highest, compute in half precision: the last ones."""
    flags = [bool(_submodule(network, block).state.get("use_fp16")) for block in blocks]
    if flags != sorted(flags):
        raise ValueError(
            f"use_fp16 is {flags} from the lowest resolution up; ours reduces the highest ones."
        )
    return sum(flags)


def _holds(tensor, expected):
    """Whether a tensor has these numbers, to 1e-6; one of another shape is not read."""
    return tensor.shape == tuple(expected.shape) and torch.allclose(
        copy_tensor(tensor), expected, atol=1e-6
    )


def _architecture(network, blocks):
    found = [_submodule(network, block).state.get("architecture") for block in blocks]
    if found[0] not in ("skip", "orig", "resnet") or any(other != found[0] for other in found):
        raise ValueError(
            f"the network's architecture {reprlib.repr(found)} is not one of skip, orig and resnet."
        )
    return found[0]


def _clamp(network, path):
    clamp = _submodule(network, path).state.get("conv_clamp")
    return None if clamp is None else float(clamp)


def _load(model, tensors, names, zeros=()):
    """The model with the tensors that `names` {official name: ours} says; those of `zeros`, our names, are zero."""
    expected = model.state_dict()
    stored = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    ignored = ("resample_filter", ".up_filter", ".down_filter")
    unknown = sorted(name for name in tensors if name not in names and not name.endswith(ignored))
    missing = sorted(expected.keys() - stored.keys() - set(zeros))
    other = sorted(
        name
        for name in stored.keys() & expected.keys()
        if stored[name].shape != expected[name].shape
    )
    if unknown or missing or other or stored.keys() - expected.keys():
        raise ValueError(
            f"the network does not fit: unknown {unknown}, missing {missing}, of another shape {other}."
        )
    state = {
        name: torch.zeros_like(tensor) if name in zeros else copy_tensor(stored[name])
        for name, tensor in expected.items()
    }
    model.load_state_dict(state)
    return model.eval()


def _mapping(network, tensors, official, ours):
    """The mapping network's number of layers, and names."""
    mapping = _submodule(network, official)
    depth = int(mapping.state["num_layers"])
    for i in range(depth):
        _expect_linear(network, tensors, f"{official}.fc{i}", "lrelu", rate=0.01)
    if f"{official}.embed.weight" in tensors:
        _expect_linear(network, tensors, f"{official}.embed")
    names = {
        f"{official}.fc{i}.{kind}": f"{ours}.layers.{i}.{kind}"
        for i in range(depth)
        for kind in ("weight", "bias")
    }
    names |= {f"{official}.embed.{kind}": f"{ours}.embed.{kind}" for kind in ("weight", "bias")}
    return depth, names | {f"{official}.w_avg": f"{ours}.w_mean"}


def _expect_shape(tensors, name, *shape):
    """Refuse a tensor of another shape than the network's attributes give, before memory for them is asked for; None fits any size."""
    found = tensors[name].shape
    if len(found) != len(shape) or any(
        b not in (None, a) for a, b in zip(found, shape, strict=True)
    ):
        sides = ["any" if side is None else side for side in shape]
        raise ValueError(f"{name} is {list(found)}; the network's own attributes give {sides}.")


def _common(network, tensors, depth):
    z_dim, w_dim, num_classes = (int(network.state[name]) for name in ("z_dim", "w_dim", "c_dim"))
    _expect_shape(tensors, "mapping.fc0.weight", w_dim, z_dim + (w_dim if num_classes else 0))
    if num_classes:
        _expect_shape(tensors, "mapping.embed.weight", w_dim, num_classes)
    return {
        "resolution": int(network.state["img_resolution"]),
        "image_channels": int(network.state["img_channels"]),
        "z_dim": z_dim,
        "w_dim": w_dim,
        "mapping_depth": depth,
        "num_classes": num_classes,
    }


def generator_from_official(network):
    """`StyleGAN2Generator` or `StyleGAN3Generator` with the weights of a `Network` official generator (`G` or `G_ema`); ValueError when it
    is another network."""
    try:
        _check(network, "Generator")
        is_alias_free = "input" in _submodule(network, "synthesis").state["_modules"]
        return (_generator3 if is_alias_free else _generator2)(network)
    except (KeyError, AttributeError, TypeError, IndexError, ArithmeticError) as error:
        raise ValueError(
            f"the network is called Generator and has not the parts of StyleGAN's ({error!r})."
        ) from error


def _generator2(network):
    resolution = int(network.state["img_resolution"])
    resolutions = [2**i for i in range(2, resolution.bit_length())]
    blocks = [f"synthesis.b{r}" for r in resolutions]
    tensors = _flatten(network)
    depth, names = _mapping(network, tensors, "mapping", "mapping_network")
    clamp = _clamp(network, "synthesis.b4.conv1")
    _expect_shape(
        tensors, f"{blocks[-1]}.torgb.weight", int(network.state["img_channels"]), None, 1, 1
    )
    model = StyleGAN2Generator(
        **_common(network, tensors, depth),
        architecture=_architecture(network, blocks),
        clamp=clamp,
        num_reduced_resolutions=_num_reduced(network, blocks),
        **_channel_config(
            {r: tensors[f"synthesis.b{r}.conv1.weight"].shape[0] for r in resolutions}
        ),
    )
    zeros = []
    for i, block in enumerate(blocks):
        ours = f"synthesis_network.blocks.{i}"
        names[f"{block}.const"] = f"{ours}.const"
        names[f"{block}.skip.weight"] = f"{ours}.skip.weight"
        if f"{block}.skip.weight" in tensors:
            _expect_convolution(network, tensors, f"{block}.skip", "linear", None, up=2)
        for a, b in (("conv0", "conv0"), ("conv1", "conv1"), ("torgb", "to_image")):
            for kind in ("weight", "bias", "noise_strength", "noise_const"):
                names[f"{block}.{a}.{kind}"] = f"{ours}.{b}.{kind}"
            for kind in ("weight", "bias"):
                names[f"{block}.{a}.affine.{kind}"] = f"{ours}.{b}.style.{kind}"
            if f"{block}.{a}.weight" not in tensors:
                continue  # the first block has one convolution, and not every one makes an image
            activation = "linear" if a == "torgb" else "lrelu"
            _expect_convolution(
                network, tensors, f"{block}.{a}", activation, clamp, up=2 if a == "conv0" else 1
            )
            _expect_linear(network, tensors, f"{block}.{a}.affine")
            if not _submodule(network, f"{block}.{a}").state.get("use_noise", True):
                zeros += [f"{ours}.{b}.noise_strength", f"{ours}.{b}.noise_const"]
    return _load(model, tensors, names, zeros)


SCHEDULE = {  # name of the official constructor's argument -> ours, and what it is where it was not given
    "channel_base": ("channel_base", 32768),
    "channel_max": ("max_channels", 512),
    "num_layers": ("num_layers", 14),
    "num_critical": ("num_critical", 2),
    "first_cutoff": ("first_cutoff", 2.0),
    "first_stopband": ("first_stopband", 2**2.1),
    "last_stopband_rel": ("last_stopband_ratio", 2**0.3),
    "margin_size": ("margin", 10),
    "output_scale": ("output_scale", 0.25),
    "num_fp16_res": ("num_reduced_resolutions", 4),
    "conv_kernel": ("kernel_size", 3),
    "filter_size": ("filter_size", 6),
    "lrelu_upsampling": ("lrelu_upsampling", 2),
    "use_radial_filters": ("radial_filters", False),
}
PLAN = {  # attribute of an official layer -> of ours
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "in_size": "in_size",
    "out_size": "out_size",
    "in_sampling_rate": "in_sampling_rate",
    "out_sampling_rate": "out_sampling_rate",
    "tmp_sampling_rate": "middle_sampling_rate",
    "in_cutoff": "in_cutoff",
    "out_cutoff": "out_cutoff",
    "in_half_width": "in_half_width",
    "out_half_width": "out_half_width",
    "conv_kernel": "kernel_size",
    "up_factor": "up",
    "down_factor": "down",
    "use_fp16": "reduced",
    "is_torgb": "to_image",
}


def _plain(value):
    """A number, or the numbers of an array or list, as an array of floats; `TypeError` for anything else."""
    numbers = value.array.reshape(-1) if isinstance(value, StoredArray) else value
    numbers = [numbers] if isinstance(numbers, int | float) else numbers
    if not all(isinstance(number, int | float | np.number | np.bool_) for number in numbers):
        raise TypeError(f"{reprlib.repr(value)} is no number")
    return np.array(numbers, dtype=np.float64)


def _generator3(network):
    synthesis = _submodule(network, "synthesis")
    tensors = _flatten(network)
    depth, names = _mapping(network, tensors, "mapping", "mapping_network")
    given = {**synthesis.state.get("_init_kwargs", {})}
    given |= {name: synthesis.state[name] for name in SCHEDULE if name in synthesis.state}
    layer_names = synthesis.state["layer_names"]
    clamp = _clamp(synthesis, layer_names[0])
    decay = _submodule(synthesis, layer_names[0]).state.get("magnitude_ema_beta", 0.999)
    _expect_shape(
        tensors,
        f"synthesis.{layer_names[-1]}.weight",
        int(network.state["img_channels"]),
        None,
        1,
        1,
    )
    if len(layer_names) != int(given.get("num_layers", 14)) + 1:
        raise ValueError(
            f"{len(layer_names)} layers do not fit num_layers {given.get('num_layers', 14)}."
        )
    model = StyleGAN3Generator(
        **_common(network, tensors, depth),
        **{
            ours: type(default)(given.get(name, default))
            for name, (ours, default) in SCHEDULE.items()
        },
        clamp=clamp,
        magnitude_decay=float(decay),
    )
    for kind, ours in (
        ("weight", "weight"),
        ("freqs", "frequencies"),
        ("phases", "phases"),
        ("transform", "transform"),
    ):
        names[f"synthesis.input.{kind}"] = f"synthesis_network.input.{ours}"
    for kind in ("weight", "bias"):
        names[f"synthesis.input.affine.{kind}"] = f"synthesis_network.input.affine.{kind}"
    _expect_linear(network, tensors, "synthesis.input.affine")
    for i, name in enumerate(layer_names):
        layer, ours = _submodule(synthesis, name), model.synthesis_network.layers[i]
        _expect(network, f"synthesis.{name}", conv_clamp=clamp, magnitude_ema_beta=decay)
        _expect_linear(network, tensors, f"synthesis.{name}.affine")
        for official, attribute in PLAN.items():
            found, expected = layer.state.get(official), getattr(model.plans[i], attribute)
            if found is not None and not np.allclose(_plain(found), expected, rtol=1e-9, atol=1e-9):
                raise ValueError(
                    f"{name} has {official} {reprlib.repr(found)}; the constructor's arguments give {expected}."
                )
        if (padding := layer.state.get("padding")) is not None:
            expected = ours.activation.padding
            if not np.array_equal(_plain(padding), [*expected, *expected]):
                raise ValueError(
                    f"{name} has the padding {reprlib.repr(padding)}; the constructor's arguments give {[*expected, *expected]}."
                )
        for kind, taps in (
            ("up_filter", ours.activation.up_taps),
            ("down_filter", ours.activation.down_taps),
        ):
            found = tensors.get(f"synthesis.{name}.{kind}")
            if not (len(taps) == 1 if found is None else _holds(found, taps)):
                raise ValueError(f"{name} has another {kind} than the paper's Kaiser design gives.")
        pairs = [("weight", "weight"), ("bias", "bias"), ("magnitude_ema", "magnitude")]
        pairs += [("affine.weight", "style.weight"), ("affine.bias", "style.bias")]
        names |= {f"synthesis.{name}.{a}": f"synthesis_network.layers.{i}.{b}" for a, b in pairs}
    return _load(model, tensors, names)


def discriminator_from_official(network):
    """`StyleGANDiscriminator` with the weights of a `Network` official discriminator (`D`); ValueError when it is another network."""
    try:
        _check(network, "Discriminator")
        return _discriminator(network)
    except (KeyError, AttributeError, TypeError, IndexError, ArithmeticError) as error:
        raise ValueError(
            f"the network is called Discriminator and has not the parts of StyleGAN's ({error!r})."
        ) from error


def _discriminator(network):
    resolution = int(network.state["img_resolution"])
    resolutions = [2**i for i in range(resolution.bit_length() - 1, 2, -1)]  # R ... 8
    tensors = _flatten(network)
    num_classes = int(network.state["c_dim"])
    deviation = _submodule(network, "b4").state["_modules"].get("mbstd")
    deviation = {"group_size": None, "num_channels": 0} if deviation is None else deviation.state
    num_channels = {r: tensors[f"b{r}.conv0.weight"].shape[0] for r in resolutions}
    num_channels[4] = tensors["b4.conv.weight"].shape[0]
    depth, names = (
        _mapping(network, tensors, "mapping", "class_mapping") if num_classes else (8, {})
    )
    clamp = _clamp(network, "b4.conv")
    _expect_shape(
        tensors, f"b{resolution}.fromrgb.weight", None, int(network.state["img_channels"]), 1, 1
    )
    num_maps = int(deviation["num_channels"])
    _expect_shape(tensors, "b4.conv.weight", num_channels[4], num_channels[4] + num_maps, 3, 3)
    if num_classes:
        _expect_shape(tensors, "mapping.embed.weight", None, num_classes)
    model = StyleGANDiscriminator(
        resolution=resolution,
        image_channels=int(network.state["img_channels"]),
        group_size=None if deviation["group_size"] is None else int(deviation["group_size"]),
        num_deviation_maps=num_maps,
        num_classes=num_classes,
        class_mapping_depth=depth,
        class_mapping_width=tensors["b4.out.weight"].shape[0] if num_classes else None,
        clamp=clamp,
        architecture=_architecture(network, [f"b{r}" for r in [*resolutions, 4]]),
        num_reduced_resolutions=_num_reduced(network, [f"b{r}" for r in reversed(resolutions)]),
        **_channel_config(num_channels),
    )
    pairs = [
        ("b4.fromrgb", "from_image"),
        ("b4.conv", "conv"),
        ("b4.fc", "linear"),
        ("b4.out", "out"),
    ]
    for i, r in enumerate(resolutions):
        pairs += [(f"b{r}.{name}", f"blocks.{i}.{name}") for name in ("conv0", "conv1", "skip")]
        pairs += [(f"b{r}.fromrgb", f"blocks.{i}.from_image")]
    for path, _ in pairs:
        name = path.split(".")[1]
        if name in ("fc", "out"):
            _expect_linear(network, tensors, path, "lrelu" if name == "fc" else "linear")
        elif f"{path}.weight" in tensors:
            is_bounded = name != "skip" and path != "b4.fromrgb"
            activation, down = (
                "linear" if name == "skip" else "lrelu",
                2 if name in ("conv1", "skip") else 1,
            )
            _expect_convolution(
                network, tensors, path, activation, clamp if is_bounded else None, down=down
            )
    names |= {
        f"{official}.{kind}": f"{ours}.{kind}"
        for official, ours in pairs
        for kind in ("weight", "bias")
    }
    return _load(model, tensors, names)
