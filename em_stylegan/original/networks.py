"""Convert networks of stylegan2-ada-pytorch and stylegan3, or refuse what ours do not compute."""

import math
import reprlib

import numpy as np
import torch

from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator, blur_kernel
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.original.reader import StoredArray
from em_training.torch_checkpoint import copy_tensor, flatten_module

NOT_LOADED = ("resample_filter", ".up_filter", ".down_filter")  # compared, but not copied


def generator_from_official(network):
    """Return our generator with the weights of a `Network` (`G` or `G_ema`)."""
    return _convert(network, "Generator", _generator)


def discriminator_from_official(network):
    """Return a `StyleGANDiscriminator` with the weights of a `Network` (`D`)."""
    return _convert(network, "Discriminator", _discriminator)


def _convert(network, class_name, function):
    if network.class_name != class_name:
        raise ValueError(f"the network is a {network.class_name}, not StyleGAN's {class_name}.")
    try:
        return function(_Source(network))
    except (LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"the network is called {class_name} but lacks parts of StyleGAN's ({error!r})."
        ) from error


class _Source:
    """An official network: its attributes and tensors, and which of our parameters they become."""

    def __init__(self, network):
        self._network = network
        self.tensors, self._names, self._zeros = flatten_module(network), {}, set()
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{name} is no tensor.")
            if name.endswith("resample_filter") and not _holds(tensor, blur_kernel()):
                raise ValueError(f"{name} is not the filter [1, 3, 3, 1].")

    def state(self, path=""):
        """Return the attributes of the network or of the module at `path`."""
        module = self._network
        for name in path.split(".") if path else ():
            module = module.state["_modules"][name]
        return module.state

    def number(self, name):
        return int(self.state()[name])

    def clamp(self, path):
        clamp = self.state(path).get("conv_clamp")
        return None if clamp is None else float(clamp)

    def expect_shape(self, name, *shape):
        """Refuse a tensor of another shape before the model takes memory; None fits any size."""
        found = self.tensors[name].shape
        fits = len(found) == len(shape)
        if not fits or any(b not in (None, a) for a, b in zip(found, shape, strict=True)):
            sides = ["any" if side is None else side for side in shape]
            raise ValueError(f"{name} is {list(found)}; the network's own attributes give {sides}.")

    def expect(self, path, **expected):
        """Refuse a module that has an attribute with another value than ours computes with."""
        state = self.state(path)
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

    def copy(self, path, ours, *kinds):
        """Copy those tensors of a module that it has to our module."""
        self._names |= {f"{path}.{kind}": f"{ours}.{kind}" for kind in kinds}

    def rename(self, path, ours, **kinds):
        self._names |= {f"{path}.{kind}": f"{ours}.{our_kind}" for kind, our_kind in kinds.items()}

    def leave_zero(self, ours, *kinds):
        self._zeros |= {f"{ours}.{kind}" for kind in kinds}

    def linear(self, path, ours, activation="linear", rate=1.0):
        fan_in = self.tensors[f"{path}.weight"].shape[1]
        gain = rate / math.sqrt(fan_in)
        self.expect(path, activation=activation, weight_gain=gain, bias_gain=rate)
        self.copy(path, ours, "weight", "bias")

    def convolution(self, path, ours, activation, clamp, up=1, down=1):
        """Copy a convolution, a modulated one or a layer to an image, if the network has it."""
        if f"{path}.weight" not in self.tensors:
            return
        _, *fan_in, kernel_size = self.tensors[f"{path}.weight"].shape
        self.expect(
            path,
            activation=activation,
            up=up,
            down=down,
            conv_clamp=clamp,
            weight_gain=1 / math.sqrt(math.prod(fan_in) * kernel_size),
            act_gain=math.sqrt(2) if activation == "lrelu" else 1,
            padding=kernel_size // 2,
        )
        self.copy(path, ours, "weight", "bias")

    def mapping(self, ours):
        """Copy the mapping network; return its number of layers."""
        depth = int(self.state("mapping")["num_layers"])
        for i in range(depth):
            self.linear(f"mapping.fc{i}", f"{ours}.layers.{i}", "lrelu", rate=0.01)
        if "mapping.embed.weight" in self.tensors:
            self.linear("mapping.embed", f"{ours}.embed")
        self.rename("mapping", ours, w_avg="w_mean")
        return depth

    def architecture(self, blocks):
        found = [self.state(block).get("architecture") for block in blocks]
        if found[0] not in ("skip", "orig", "resnet") or any(each != found[0] for each in found):
            raise ValueError(
                f"the network's architecture {reprlib.repr(found)} is not one of skip, orig and "
                "resnet."
            )
        return found[0]

    def num_reduced(self, blocks):
        """Return how many blocks, lowest resolution first, are float16: they must be the last."""
        flags = [bool(self.state(block).get("use_fp16")) for block in blocks]
        if flags != sorted(flags):
            raise ValueError(
                f"use_fp16 is {flags} from the lowest resolution up; ours reduces the highest ones."
            )
        return sum(flags)

    def load(self, model):
        """Return `model` in evaluation mode with all of its parameters."""
        expected, found = model.state_dict(), self.tensors
        stored = {self._names[name]: found[name] for name in found if name in self._names}
        unknown = {name for name in found.keys() - self._names if not name.endswith(NOT_LOADED)}
        unknown |= stored.keys() - expected.keys()
        missing = expected.keys() - stored.keys() - self._zeros
        shared = stored.keys() & expected.keys()
        other = {name for name in shared if stored[name].shape != expected[name].shape}
        if unknown or missing or other:
            raise ValueError(
                f"the network does not fit: unknown {sorted(unknown)}, missing {sorted(missing)}, "
                f"of another shape {sorted(other)}."
            )
        state = {
            name: torch.zeros_like(tensor) if name in self._zeros else copy_tensor(stored[name])
            for name, tensor in expected.items()
        }
        model.load_state_dict(state)
        return model.eval()


def _holds(tensor, expected):
    """Return whether a tensor has these numbers, to 1e-6."""
    is_same = tensor.shape == tuple(expected.shape)
    return is_same and torch.allclose(copy_tensor(tensor), expected, atol=1e-6)


def _channel_config(num_channels):
    """Return the arguments that give `num_channels` {resolution: feature maps}."""
    most, base = max(num_channels.values()), max(r * c for r, c in num_channels.items())
    if any(min(base // r, most) != c for r, c in num_channels.items()):
        raise ValueError(
            f"feature maps {num_channels} do not follow min(channel_base // resolution, "
            "max_channels)."
        )
    return {"channel_base": base, "max_channels": most}


def _generator(source):
    z_dim, w_dim, num_classes = (source.number(name) for name in ("z_dim", "w_dim", "c_dim"))
    source.expect_shape("mapping.fc0.weight", w_dim, z_dim + (w_dim if num_classes else 0))
    if num_classes:
        source.expect_shape("mapping.embed.weight", w_dim, num_classes)
    arguments = {
        "resolution": source.number("img_resolution"),
        "image_channels": source.number("img_channels"),
        "z_dim": z_dim,
        "w_dim": w_dim,
        "mapping_depth": source.mapping("mapping_network"),
        "num_classes": num_classes,
    }
    is_alias_free = "input" in source.state("synthesis")["_modules"]
    return (_generator3 if is_alias_free else _generator2)(source, arguments)


def _generator2(source, arguments):
    resolutions = [2**i for i in range(2, arguments["resolution"].bit_length())]
    blocks, clamp = [f"synthesis.b{r}" for r in resolutions], source.clamp("synthesis.b4.conv1")
    source.expect_shape(f"{blocks[-1]}.torgb.weight", arguments["image_channels"], None, 1, 1)
    widths = {r: source.tensors[f"synthesis.b{r}.conv1.weight"].shape[0] for r in resolutions}
    model = StyleGAN2Generator(
        **arguments,
        architecture=source.architecture(blocks),
        clamp=clamp,
        num_reduced_resolutions=source.num_reduced(blocks),
        **_channel_config(widths),
    )
    for i, block in enumerate(blocks):
        ours = f"synthesis_network.blocks.{i}"
        source.copy(block, ours, "const")
        source.convolution(f"{block}.skip", f"{ours}.skip", "linear", None, up=2)
        for name, our_name in (("conv0", "conv0"), ("conv1", "conv1"), ("torgb", "to_image")):
            path, layer = f"{block}.{name}", f"{ours}.{our_name}"
            if f"{path}.weight" not in source.tensors:
                continue  # the first block has one convolution, and not every one makes an image
            activation = "linear" if name == "torgb" else "lrelu"
            source.convolution(path, layer, activation, clamp, up=2 if name == "conv0" else 1)
            source.linear(f"{path}.affine", f"{layer}.style")
            noise = ("noise_strength", "noise_const")
            source.copy(path, layer, *noise)
            if not source.state(path).get("use_noise", True):
                source.leave_zero(layer, *noise)
    return source.load(model)


DEFAULTS = {
    "channel_base": 32768,
    "channel_max": 512,
    "num_layers": 14,
    "num_critical": 2,
    "first_cutoff": 2.0,
    "first_stopband": 2**2.1,
    "last_stopband_rel": 2**0.3,
    "margin_size": 10,
    "output_scale": 0.25,
    "num_fp16_res": 4,
    "conv_kernel": 3,
    "filter_size": 6,
    "lrelu_upsampling": 2,
    "use_radial_filters": False,
}
"""Arguments of stylegan3's generator, and what they are if they were not given."""
PLAN = [
    *("in_channels", "out_channels", "in_size", "out_size", "in_sampling_rate"),
    *("out_sampling_rate", "tmp_sampling_rate", "in_cutoff", "out_cutoff", "in_half_width"),
    *("out_half_width", "conv_kernel", "up_factor", "down_factor", "use_fp16", "is_torgb"),
]
"""Attributes of its layers that follow from these arguments."""
OUR_NAMES = {
    "channel_max": "max_channels",
    "last_stopband_rel": "last_stopband_ratio",
    "margin_size": "margin",
    "num_fp16_res": "num_reduced_resolutions",
    "conv_kernel": "kernel_size",
    "use_radial_filters": "radial_filters",
    "tmp_sampling_rate": "middle_sampling_rate",
    "up_factor": "up",
    "down_factor": "down",
    "use_fp16": "reduced",
    "is_torgb": "to_image",
}


def _plain(value):
    """Return a number, or the numbers of an array or list, as an array of floats."""
    numbers = value.array.reshape(-1) if isinstance(value, StoredArray) else value
    numbers = [numbers] if isinstance(numbers, int | float) else numbers
    if not all(isinstance(number, int | float | np.number | np.bool_) for number in numbers):
        raise TypeError(f"{reprlib.repr(value)} is no number")
    return np.array(numbers, dtype=np.float64)


def _generator3(source, arguments):
    synthesis = source.state("synthesis")
    names = synthesis["layer_names"]
    first, last = (f"synthesis.{names[i]}" for i in (0, -1))
    given = DEFAULTS | synthesis.get("_init_kwargs", {})
    given |= {name: synthesis[name] for name in DEFAULTS if name in synthesis}
    clamp, decay = source.clamp(first), source.state(first).get("magnitude_ema_beta", 0.999)
    source.expect_shape(f"{last}.weight", arguments["image_channels"], None, 1, 1)
    if len(names) != int(given["num_layers"]) + 1:
        raise ValueError(f"{len(names)} layers do not fit num_layers {given['num_layers']}.")
    schedule = {
        OUR_NAMES.get(name, name): type(default)(given[name]) for name, default in DEFAULTS.items()
    }
    model = StyleGAN3Generator(**arguments, **schedule, clamp=clamp, magnitude_decay=float(decay))
    ours = "synthesis_network.input"
    source.copy("synthesis.input", ours, "weight", "phases", "transform")
    source.rename("synthesis.input", ours, freqs="frequencies")
    source.linear("synthesis.input.affine", f"{ours}.affine")
    for i, name in enumerate(names):
        path, ours = f"synthesis.{name}", f"synthesis_network.layers.{i}"
        source.expect(path, conv_clamp=clamp, magnitude_ema_beta=decay)
        _expect_plan(source, path, model.plans[i], model.synthesis_network.layers[i].activation)
        source.copy(path, ours, "weight", "bias")
        source.rename(path, ours, magnitude_ema="magnitude")
        source.linear(f"{path}.affine", f"{ours}.style")
    return source.load(model)


def _expect_plan(source, path, plan, activation):
    """Refuse a layer of stylegan3 that differs from what the constructor's arguments give."""
    state = source.state(path)
    expected = {name: getattr(plan, OUR_NAMES.get(name, name)) for name in PLAN}
    expected["padding"] = [*activation.padding, *activation.padding]
    for name, value in expected.items():
        found = state.get(name)
        if found is not None and not np.allclose(_plain(found), value, rtol=1e-9, atol=1e-9):
            raise ValueError(
                f"{path} has {name} {reprlib.repr(found)}; the constructor's arguments give "
                f"{value}."
            )
    for side, taps in (("up", activation.up_taps), ("down", activation.down_taps)):
        found = source.tensors.get(f"{path}.{side}_filter")
        if not (len(taps) == 1 if found is None else _holds(found, taps)):
            raise ValueError(
                f"{path} has another {side}_filter than the paper's Kaiser design gives."
            )


def _discriminator(source):
    resolution, num_classes = source.number("img_resolution"), source.number("c_dim")
    resolutions = [2**i for i in range(resolution.bit_length() - 1, 2, -1)]  # R ... 8
    blocks, clamp = [f"b{r}" for r in resolutions], source.clamp("b4.conv")
    tensors, image_channels = source.tensors, source.number("img_channels")
    deviation = source.state("b4")["_modules"].get("mbstd")
    deviation = {"group_size": None, "num_channels": 0} if deviation is None else deviation.state
    group_size, num_maps = deviation["group_size"], int(deviation["num_channels"])
    widths = {r: tensors[f"b{r}.conv0.weight"].shape[0] for r in resolutions}
    widths[4] = tensors["b4.conv.weight"].shape[0]
    source.expect_shape(f"b{resolution}.fromrgb.weight", None, image_channels, 1, 1)
    source.expect_shape("b4.conv.weight", widths[4], widths[4] + num_maps, 3, 3)
    if num_classes:
        source.expect_shape("mapping.embed.weight", None, num_classes)
    model = StyleGANDiscriminator(
        resolution=resolution,
        image_channels=image_channels,
        group_size=None if group_size is None else int(group_size),
        num_deviation_maps=num_maps,
        num_classes=num_classes,
        class_mapping_depth=source.mapping("class_mapping") if num_classes else 8,
        class_mapping_width=tensors["b4.out.weight"].shape[0] if num_classes else None,
        clamp=clamp,
        architecture=source.architecture([*blocks, "b4"]),
        num_reduced_resolutions=source.num_reduced(blocks[::-1]),
        **_channel_config(widths),
    )
    for i, block in enumerate(blocks):
        source.convolution(f"{block}.fromrgb", f"blocks.{i}.from_image", "lrelu", clamp)
        source.convolution(f"{block}.conv0", f"blocks.{i}.conv0", "lrelu", clamp)
        source.convolution(f"{block}.conv1", f"blocks.{i}.conv1", "lrelu", clamp, down=2)
        source.convolution(f"{block}.skip", f"blocks.{i}.skip", "linear", None, down=2)
    source.convolution("b4.fromrgb", "from_image", "lrelu", None)
    source.convolution("b4.conv", "conv", "lrelu", clamp)
    source.linear("b4.fc", "linear", "lrelu")
    source.linear("b4.out", "out")
    return source.load(model)
