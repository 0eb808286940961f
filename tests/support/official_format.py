"""Our networks, written down in the format of the official trainings: the loader's inverse, for its
tests.

Facts of the format alone (names, shapes, attributes); the pickle's classes exist here only while it
is written."""

import pickle
import sys
import types

import numpy as np
import torch

from em_stylegan.em_stylegan2_generator import StyleGAN2Generator, blur_kernel


class EasyDict(dict):
    """Pickles as dnnlib.util.EasyDict."""


EasyDict.__module__ = "dnnlib.util"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a loader must not call this")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """An official module: a class name and a state with parameters, buffers, modules and
    attributes.
    """

    def __init__(self, class_name, parameters=(), buffers=(), modules=(), **attributes):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise RuntimeError('this must not run')",
            "class_name": class_name,
            "state": {
                "training": False,
                "_parameters": {
                    name: None if p is None else torch.nn.Parameter(p.clone())
                    for name, p in dict(parameters).items()
                },
                "_buffers": {
                    name: None if b is None else b.clone() for name, b in dict(buffers).items()
                },
                "_non_persistent_buffers_set": set(),
                "_backward_hooks": {},
                "_modules": dict(modules),
                "_init_args": (),
                "_init_kwargs": EasyDict(attributes.pop("init_kwargs", {})),
                **attributes,
            },
        }

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def write_pickle(path, contents, protocol=4):
    """Write `contents` with the module names of the official code, which are taken away again."""
    modules = {
        name: types.ModuleType(name)
        for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    modules["dnnlib.util"].EasyDict = EasyDict
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        path.write_bytes(pickle.dumps(contents, protocol=protocol))
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return path


def linear(layer, activation="linear"):
    return Persistent(
        "FullyConnectedLayer",
        {"weight": layer.weight.data, "bias": layer.bias.data},
        activation=activation,
        weight_gain=layer.weight_gain,
        bias_gain=layer.bias_gain,
    )


def mapping(network, z_dim, w_dim, has_mean=True):
    modules = {f"fc{i}": linear(layer, "lrelu") for i, layer in enumerate(network.layers)}
    attributes = {} if network.embed is not None else {"embed": None}
    if network.embed is not None:
        modules = {"embed": linear(network.embed)} | modules
    buffers = {"w_avg": network.w_mean} if has_mean else {}
    return Persistent(
        "MappingNetwork",
        buffers=buffers,
        modules=modules,
        num_layers=len(network.layers),
        z_dim=z_dim,
        c_dim=network.num_classes,
        w_dim=w_dim,
        w_avg_beta=0.998 if has_mean else None,
        **attributes,
    )


def convolution(layer, clamp, frozen=False):
    tensors = {"weight": layer.weight.data} | (
        {} if layer.bias is None else {"bias": layer.bias.data}
    )
    return Persistent(
        "Conv2dLayer",
        {} if frozen else tensors,
        {"resample_filter": blur_kernel()} | (tensors if frozen else {}),
        activation="lrelu" if layer.activation else "linear",
        conv_clamp=clamp,
        up=2 if layer.up else 1,
        down=2 if layer.down else 1,
        padding=layer.kernel_size // 2,
        weight_gain=layer.weight_gain,
        act_gain=2**0.5 if layer.activation else 1,
    )


def generator2(model):
    config, blocks = model.config, {}
    network = model.synthesis_network
    for i, block in enumerate(network.blocks):
        resolution, modules = 4 * 2**i, {}
        for name in ("conv0", "conv1"):
            layer = getattr(block, name)
            if layer is not None:
                parameters = {
                    "weight": layer.weight.data,
                    "noise_strength": layer.noise_strength.data,
                    "bias": layer.bias.data,
                }
                modules[name] = Persistent(
                    "SynthesisLayer",
                    parameters,
                    {"resample_filter": blur_kernel(), "noise_const": layer.noise_const},
                    {"affine": linear(layer.style)},
                    resolution=resolution,
                    up=2 if layer.up else 1,
                    use_noise=True,
                    activation="lrelu",
                    conv_clamp=config.clamp,
                    padding=1,
                    act_gain=2**0.5,
                )
        if block.to_image is not None:
            layer = block.to_image
            modules["torgb"] = Persistent(
                "ToRGBLayer",
                {"weight": layer.weight.data, "bias": layer.bias.data},
                modules={"affine": linear(layer.style)},
                conv_clamp=config.clamp,
                weight_gain=layer.weight[0].numel() ** -0.5,
            )
        if block.skip is not None:
            modules["skip"] = convolution(block.skip, None)
        blocks[f"b{resolution}"] = Persistent(
            "SynthesisBlock",
            {"const": block.const.data} if block.first else {},
            {"resample_filter": blur_kernel()},
            modules,
            resolution=resolution,
            architecture=config.architecture,
            use_fp16=i >= network.num_full_resolutions,
        )
    return Persistent(
        "SynthesisNetwork", modules=blocks, w_dim=config.w_dim, img_resolution=config.resolution
    )


def generator3(model):
    config, network = model.config, model.synthesis_network
    parts = network.input
    modules = {
        "input": Persistent(
            "SynthesisInput",
            {"weight": parts.weight.data},
            {"transform": parts.transform, "freqs": parts.frequencies, "phases": parts.phases},
            {"affine": linear(parts.affine)},
            size=np.array([parts.size, parts.size]),
            sampling_rate=float(parts.sampling_rate),
            bandwidth=np.float64(parts.bandwidth),
        )
    }
    names = []
    for plan, layer in zip(model.plans, network.layers, strict=True):
        activation = layer.activation
        filters = {
            f"{side}_filter": None if len(taps) == 1 else taps
            for side, taps in (("up", activation.up_taps), ("down", activation.down_taps))
        }
        names.append(f"L{plan.index}_{plan.out_size}_{plan.out_channels}")
        modules[names[-1]] = Persistent(
            "SynthesisLayer",
            {"weight": layer.weight.data, "bias": layer.bias.data},
            {"magnitude_ema": layer.magnitude, **filters},
            {"affine": linear(layer.style)},
            is_torgb=plan.to_image,
            use_fp16=plan.reduced,
            in_channels=plan.in_channels,
            out_channels=plan.out_channels,
            in_size=np.array([plan.in_size] * 2),
            out_size=np.array([plan.out_size] * 2),
            in_sampling_rate=plan.in_sampling_rate,
            out_sampling_rate=plan.out_sampling_rate,
            tmp_sampling_rate=plan.middle_sampling_rate,
            in_cutoff=plan.in_cutoff,
            out_cutoff=plan.out_cutoff,
            in_half_width=plan.in_half_width,
            out_half_width=plan.out_half_width,
            conv_kernel=plan.kernel_size,
            conv_clamp=config.clamp,
            magnitude_ema_beta=config.magnitude_decay,
            up_factor=plan.up,
            down_factor=plan.down,
            padding=[*activation.padding, *activation.padding],
        )
    given = {
        "channel_base": config.channel_base,
        "channel_max": config.max_channels,
        "conv_kernel": config.kernel_size,
        "use_radial_filters": config.radial_filters,
        "filter_size": config.filter_size,
    }
    return Persistent(
        "SynthesisNetwork",
        modules=modules,
        w_dim=config.w_dim,
        num_ws=model.num_ws,
        img_resolution=config.resolution,
        img_channels=config.image_channels,
        num_layers=config.num_layers,
        num_critical=config.num_critical,
        margin_size=config.margin,
        output_scale=config.output_scale,
        num_fp16_res=config.num_reduced_resolutions,
        layer_names=names,
        init_kwargs=given,
    )


def generator(model):
    config = model.config
    synthesis = (generator2 if isinstance(model, StyleGAN2Generator) else generator3)(model)
    return Persistent(
        "Generator",
        modules={
            "synthesis": synthesis,
            "mapping": mapping(model.mapping_network, config.z_dim, config.w_dim),
        },
        z_dim=config.z_dim,
        c_dim=config.num_classes,
        w_dim=config.w_dim,
        img_resolution=config.resolution,
        img_channels=config.image_channels,
        num_ws=model.num_ws,
    )


def discriminator(model, num_frozen=0):
    config, modules = model.config, {}
    frozen = list(model.freezable_layers())[:num_frozen]
    for i, block in enumerate(model.blocks):
        layers = (
            ("fromrgb", block.from_image),
            ("conv0", block.conv0),
            ("conv1", block.conv1),
            ("skip", block.skip),
        )
        modules[f"b{config.resolution >> i}"] = Persistent(
            "DiscriminatorBlock",
            buffers={"resample_filter": blur_kernel()},
            modules={
                name: convolution(
                    layer, None if name == "skip" else config.clamp, any(layer is f for f in frozen)
                )
                for name, layer in layers
                if layer is not None
            },
            architecture=config.architecture,
            use_fp16=i < model.num_reduced,
        )
    parts, attributes = {}, {}
    if model.from_image is not None:
        parts["fromrgb"] = convolution(model.from_image, None)
    if config.num_deviation_maps:
        parts["mbstd"] = Persistent(
            "MinibatchStdLayer",
            group_size=config.group_size,
            num_channels=config.num_deviation_maps,
        )
    else:
        attributes["mbstd"] = None
    parts |= {
        "conv": convolution(model.conv, config.clamp),
        "fc": linear(model.linear, "lrelu"),
        "out": linear(model.out),
    }
    modules["b4"] = Persistent(
        "DiscriminatorEpilogue", modules=parts, architecture=config.architecture, **attributes
    )
    if model.class_mapping is not None:
        modules["mapping"] = mapping(
            model.class_mapping, 0, model.out.weight.shape[0], has_mean=False
        )
    return Persistent(
        "Discriminator",
        modules=modules,
        c_dim=config.num_classes,
        img_resolution=config.resolution,
        img_channels=config.image_channels,
    )
