"""Every configuration that the official trainings write is read back equal, from files in their
format.
"""

import ast
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from em_generation.generate import GenerationConfig, generate_images
from em_generation.loading import find_pipeline_folder, load_pipeline
from em_stylegan import interpolate, load_official
from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.original.convert import convert
from em_stylegan.original.networks import discriminator_from_official, generator_from_official
from em_stylegan.original.reader import read_pickle
from em_stylegan.pictures import styles
from em_stylegan.transfer import load_initial_weights
from em_training.cli import run_command
from support import official_format

SMALL = {"z_dim": 8, "w_dim": 12, "channel_base": 256, "max_channels": 16}


def shake(model):
    """Give every parameter and buffer a value of its own, so that none can stand for another."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        value.add_(0.3 * noise.abs() if "magnitude" in name else 0.3 * noise)
    return model.eval()


def assert_same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
    for name, value in a.config.items():
        if not name.startswith("_") and name not in (
            "channel_base",
            "max_channels",
            "class_mapping_width",
            "class_mapping_depth",
        ):
            other = b.config[name]
            same = math.isclose(value, other) if isinstance(value, float) else value == other
            assert same or name == "num_reduced_resolutions", (name, value, other)


def labels(model):
    return torch.tensor([0, 2, 1]) if model.config.num_classes else None


GENERATORS = {
    "32": {},
    "64 colour": {"resolution": 64, "image_channels": 3, "mapping_depth": 8},
    "128 classes": {"resolution": 128, "num_classes": 3, "mapping_depth": 4},
    "odd base": {"channel_base": 300, "clamp": 256.0},
    "orig": {"architecture": "orig", "image_channels": 3},
    "resnet": {"architecture": "resnet", "num_classes": 3},
    "fp16": {"num_reduced_resolutions": 2, "clamp": 256.0},
    "fp32": {"num_reduced_resolutions": 0},
    "8": {"resolution": 8},
}


@pytest.mark.parametrize(
    ("name", "protocol"),
    [*((name, 4) for name in GENERATORS), *(("128 classes", p) for p in (2, 3, 5))],
)
def test_stylegan2_generators(name, protocol, tmp_path):
    torch.manual_seed(0)
    model = shake(
        StyleGAN2Generator(**{"resolution": 32, **SMALL, "mapping_depth": 2, **GENERATORS[name]})
    )
    path = official_format.write_pickle(
        tmp_path / "a.pkl", {"G_ema": official_format.generator(model)}, protocol
    )
    loaded = generator_from_official(read_pickle(path)["G_ema"])
    assert_same(model, loaded)
    z = torch.randn(3, 8)
    assert torch.equal(
        loaded(z, labels(model), 0.7, noise_mode="const"),
        model(z, labels(model), 0.7, noise_mode="const"),
    )


GENERATORS_3 = {
    "t32": {},
    "t64 colour": {"resolution": 64, "image_channels": 3, "mapping_depth": 8},
    "t128 classes": {"resolution": 128, "num_classes": 3},
    "r32": {"kernel_size": 1, "radial_filters": True, "channel_base": 512, "max_channels": 32},
    "r64 classes": {"resolution": 64, "kernel_size": 1, "radial_filters": True, "num_classes": 3},
    "fp32": {"num_reduced_resolutions": 0, "clamp": None},
    "decay": {"magnitude_decay": 0.5 ** (16 / 20e3), "num_reduced_resolutions": 2},
    "shallow": {"num_layers": 8, "margin": 6, "output_scale": 0.5, "filter_size": 4},
}


@pytest.mark.parametrize(
    ("name", "protocol"),
    [*((name, 4) for name in GENERATORS_3), *(("r64 classes", p) for p in (2, 3, 5))],
)
def test_stylegan3_generators(name, protocol, tmp_path):
    torch.manual_seed(0)
    model = shake(StyleGAN3Generator(**{"resolution": 32, **SMALL, **GENERATORS_3[name]}))
    path = official_format.write_pickle(
        tmp_path / "a.pkl", {"G_ema": official_format.generator(model)}, protocol
    )
    loaded = generator_from_official(read_pickle(path)["G_ema"])
    assert_same(model, loaded)
    assert loaded.plans == model.plans
    z = torch.randn(3, 8)
    assert torch.equal(loaded(z, labels(model), 0.7), model(z, labels(model), 0.7))


DISCRIMINATORS = {
    "32": {},
    "64 colour": {"resolution": 64, "image_channels": 3},
    "128 classes": {"resolution": 128, "num_classes": 3, "class_mapping_depth": 8},
    "orig": {"architecture": "orig"},
    "skip": {"architecture": "skip", "image_channels": 3},
    "other map": {"num_classes": 3, "class_mapping_width": 7, "class_mapping_depth": 2},
    "whole batch": {"group_size": None, "num_deviation_maps": 2},
    "no deviation": {"num_deviation_maps": 0, "group_size": None},
    "fp16": {"num_reduced_resolutions": 2, "clamp": 256.0},
    "8": {"resolution": 8},
}


@pytest.mark.parametrize("num_frozen", [0, 4])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_discriminators(name, num_frozen, tmp_path):
    torch.manual_seed(0)
    options = {
        "resolution": 32,
        "channel_base": 256,
        "max_channels": 16,
        "group_size": 3,
        **DISCRIMINATORS[name],
    }
    model = shake(StyleGANDiscriminator(**options))
    path = official_format.write_pickle(
        tmp_path / "a.pkl", {"D": official_format.discriminator(model, num_frozen)}
    )
    loaded = discriminator_from_official(read_pickle(path)["D"])
    assert_same(model, loaded)
    images = torch.randn(
        3, options.get("image_channels", 1), options["resolution"], options["resolution"]
    )
    assert torch.equal(loaded(images, labels(model)), model(images, labels(model)))


def make_generator(**options):
    torch.manual_seed(0)
    return StyleGAN3Generator(**{"resolution": 32, **SMALL, **options})


def write(tmp_path, network):
    return read_pickle(official_format.write_pickle(tmp_path / "a.pkl", {"G_ema": network}))[
        "G_ema"
    ]


def test_schedule_that_only_the_constructor_knows(tmp_path):
    """First and last band edges are attributes of no layer: they are read from the stored
    arguments.
    """
    given = {"first_cutoff": 2.5, "first_stopband": 5.5, "lrelu_upsampling": 4}
    model, network, _ = create_small(StyleGAN3Generator, 32, **given, last_stopband_ratio=1.4)
    state(network, "synthesis")["_init_kwargs"] |= given | {"last_stopband_rel": 1.4}
    loaded = generator_from_official(write(tmp_path, network))
    assert loaded.plans == model.plans
    z = torch.randn(2, 8)
    assert torch.equal(loaded(z), model.eval()(z))


def test_layers_without_noise(tmp_path):
    model, network, _ = create_small(StyleGAN2Generator, mapping_depth=2)
    for block in state(network, "synthesis")["_modules"]:
        for name in state(network, f"synthesis.{block}")["_modules"]:
            if name.startswith("conv"):
                layer = state(network, f"synthesis.{block}.{name}")
                layer["use_noise"] = False
                del layer["_parameters"]["noise_strength"], layer["_buffers"]["noise_const"]
    loaded, z = generator_from_official(write(tmp_path, network)), torch.randn(2, 8)
    assert torch.equal(loaded(z, noise_mode="random"), model.eval()(z, noise_mode="none"))


def state(network, path=""):
    """The attributes of a network, or of its layer at `path`."""
    for name in path.split(".") if path else ():
        network = network.meta["state"]["_modules"][name]
    return network.meta["state"]


def alter(network, path, **attributes):
    """The network with these attributes in its layer at `path`."""
    assert all(state(network, path)[name] != value for name, value in attributes.items())
    state(network, path).update(attributes)
    return network


SKIP = StyleGAN2Generator, {"mapping_depth": 2, "num_classes": 3, "clamp": 256.0}
RESNET = StyleGAN2Generator, SKIP[1] | {"architecture": "resnet"}
ALIAS_FREE = StyleGAN3Generator, {"clamp": 256.0}
CRITIC = StyleGANDiscriminator, {"num_classes": 3, "class_mapping_depth": 2, "clamp": 256.0}
# a layer whose attribute is another than ours computes with, in a network of this class
LAYERS = """
SKIP synthesis.b8.conv0 activation linear
SKIP synthesis.b4.conv1 activation relu
SKIP synthesis.b8.conv0 up 1
SKIP synthesis.b8.conv1 up 2
SKIP synthesis.b16.conv1 act_gain 1.0
SKIP synthesis.b16.conv1 padding 0
SKIP synthesis.b16.conv1 conv_clamp 5.0
SKIP synthesis.b8.torgb conv_clamp 5.0
SKIP synthesis.b16.torgb conv_clamp None
SKIP synthesis.b8.torgb weight_gain 1.0
RESNET synthesis.b16.skip up 1
RESNET synthesis.b16.skip conv_clamp 256.0
SKIP synthesis.b8.conv0.affine activation lrelu
SKIP synthesis.b8.torgb.affine weight_gain 1.0
SKIP mapping.fc0 weight_gain 1.0
SKIP mapping.fc1 bias_gain 1.0
SKIP mapping.fc1 activation linear
SKIP mapping.embed activation lrelu
SKIP mapping.embed weight_gain True
ALIAS_FREE synthesis.{3} conv_clamp 5.0
ALIAS_FREE synthesis.{0} conv_clamp None
ALIAS_FREE synthesis.{14} magnitude_ema_beta 0.5
ALIAS_FREE synthesis.{2}.affine activation lrelu
ALIAS_FREE synthesis.input.affine weight_gain 1.0
CRITIC b16.fromrgb activation linear
CRITIC b16.fromrgb conv_clamp None
CRITIC b16.conv0 activation linear
CRITIC b16.conv0 down 2
CRITIC b8.conv1 down 1
CRITIC b8.conv1 up 2
CRITIC b8.conv1 conv_clamp 5.0
CRITIC b8.conv1 weight_gain 1.0
CRITIC b16.skip activation lrelu
CRITIC b16.skip down 1
CRITIC b16.skip conv_clamp 256.0
CRITIC b4.conv act_gain 1.0
CRITIC b4.conv activation linear
CRITIC b4.fc activation linear
CRITIC b4.fc weight_gain 1.0
CRITIC b4.out activation lrelu
CRITIC b4.out bias_gain 0.5
CRITIC mapping.fc0 weight_gain 1.0
CRITIC mapping.embed activation lrelu
"""


def create_small(kind, resolution=16, **options):
    """A small network, its twin in the official format, and the function that reads it."""
    torch.manual_seed(0)
    if kind is StyleGANDiscriminator:
        model = kind(resolution, channel_base=256, max_channels=16, **options)
        return model, official_format.discriminator(model), discriminator_from_official
    model = kind(**{"resolution": resolution, **SMALL, **options})
    return model, official_format.generator(model), generator_from_official


@pytest.mark.parametrize("line", LAYERS.strip().splitlines())
def test_layer_that_ours_does_not_compute_is_refused(tmp_path, line):
    case, path, name, word = line.split()
    kind, options = globals()[case]
    _, network, read = create_small(kind, 32 if kind is StyleGAN3Generator else 16, **options)
    if kind is StyleGAN3Generator:
        path = path.format(*state(network, "synthesis")["layer_names"])
    value = word if word.isalpha() and word.islower() else ast.literal_eval(word)
    alter(network, path, **{name: value})
    where = rf"{re.escape(path)} has {name} {value!r}"
    if path == "synthesis.L0_36_16":  # the first layer's clamp is taken for that of all others
        where = rf"synthesis\.L1_36_16 has {name} 256\.0"
    with pytest.raises(ValueError, match=rf"^{where}; ours computes with"):
        read(write(tmp_path, network))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((StyleGAN2Generator, name) for name in ("z_dim", "w_dim", "c_dim", "img_channels")),
        *((StyleGAN3Generator, name) for name in ("z_dim", "w_dim", "c_dim", "img_channels")),
        *((StyleGANDiscriminator, name) for name in ("c_dim", "img_channels")),
    ],
)
def test_widths_that_no_tensor_has_ask_for_no_memory(tmp_path, kind, name):
    _, network, read = create_small(kind, num_classes=3)
    state(network)[name] = 10**11
    with pytest.raises(ValueError, match="the network's own attributes give"):
        read(write(tmp_path, network))


def test_maps_and_layers_that_no_tensor_has_ask_for_no_memory(tmp_path):
    _, network, _ = create_small(StyleGANDiscriminator)
    alter(network, "b4.mbstd", num_channels=10**11)
    with pytest.raises(ValueError, match="the network's own attributes give"):
        discriminator_from_official(write(tmp_path, network))
    network = alter(official_format.generator(make_generator()), "synthesis", num_layers=10**11)
    with pytest.raises(ValueError, match="15 layers do not fit num_layers 100000000000"):
        generator_from_official(write(tmp_path, network))


@pytest.mark.parametrize(
    ("kind", "path"), [(StyleGAN2Generator, "synthesis.b8"), (StyleGANDiscriminator, "b8")]
)
def test_half_precision_below_full_is_refused(tmp_path, kind, path):
    _, network, read = create_small(kind, num_reduced_resolutions=0)
    with pytest.raises(ValueError, match="ours reduces the highest ones"):
        read(write(tmp_path, alter(network, path, use_fp16=True)))


def test_another_filter_is_refused(tmp_path):
    _, network, _ = create_small(StyleGAN3Generator, 32)
    name = state(network, "synthesis")["layer_names"][3]
    state(network, f"synthesis.{name}")["_buffers"]["up_filter"][2] += 1e-3
    with pytest.raises(ValueError, match="another up_filter"):
        generator_from_official(write(tmp_path, network))


def test_another_schedule_is_refused(tmp_path):
    _, network, _ = create_small(StyleGAN3Generator, 32)
    state(network, "synthesis")["_init_kwargs"]["first_stopband"] = 6.0
    with pytest.raises(ValueError, match="the constructor's arguments give"):
        generator_from_official(write(tmp_path, network))


def test_generator_of_another_project_is_refused(tmp_path):
    network = official_format.Persistent("Generator", modules={}, z_dim=8, img_resolution=32)
    with pytest.raises(ValueError, match="lacks parts of StyleGAN's"):
        generator_from_official(write(tmp_path, network))
    model, network, _ = create_small(StyleGAN3Generator, 32)
    extra = official_format.linear(model.mapping_network.layers[0])
    state(network, "synthesis")["_modules"]["extra"] = extra
    with pytest.raises(ValueError, match=r"unknown \['synthesis.extra"):
        generator_from_official(write(tmp_path, network))


def test_module_source_in_the_file_is_not_run(tmp_path):
    """`write_pickle` puts a raise statement where the wild files have source text."""
    path = official_format.write_pickle(
        tmp_path / "a.pkl", {"G": official_format.generator(make_generator())}
    )
    assert b"this must not run" in path.read_bytes()
    read_pickle(path)
    assert "torch_utils" not in sys.modules
    assert "dnnlib" not in sys.modules


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    run_command(module.main)


def test_converted_folder_stands_for_a_run(tmp_path, monkeypatch, capsys):
    """Of the averaged generator: generate.py finds its pipeline, and so do the pictures; training
    finds all three networks.
    """
    torch.manual_seed(0)
    raw, average = (
        shake(StyleGAN2Generator(32, 3, **SMALL, mapping_depth=2, num_reduced_resolutions=i))
        for i in (0, 1)
    )
    discriminator = shake(StyleGANDiscriminator(32, 3, channel_base=256, max_channels=16))
    contents = {"G": official_format.generator(raw), "G_ema": official_format.generator(average)}
    path = official_format.write_pickle(
        tmp_path / "a.pkl", contents | {"D": official_format.discriminator(discriminator)}
    )
    out = tmp_path / "new" / "out"
    run(monkeypatch, load_official, path, out)
    assert sorted(path.name for path in out.iterdir()) == ["D", "G", "G_ema", "pipeline"]
    assert f"generate.py --model {out}" in capsys.readouterr().out
    assert find_pipeline_folder(str(out)) == out / "pipeline"
    pipeline = load_pipeline(str(out))
    assert pipeline.config.pixel_size_nm is None
    assert_same(average, pipeline.generator)
    record = generate_images(
        GenerationConfig(str(out), str(tmp_path / "images"), num_images=2, precision="no")
    )
    assert record["num_images"] == 2
    run(monkeypatch, interpolate, "truncation", out, tmp_path / "truncation.png")
    networks = (
        StyleGAN2Generator(32, 3, **SMALL, mapping_depth=2),
        StyleGANDiscriminator(32, 3, channel_base=256, max_channels=16),
    )
    found = load_initial_weights(SimpleNamespace(init_from=out), *networks, say=lambda text: None)
    for name, model in (("model", raw), ("ema", average), ("discriminator", discriminator)):
        assert all(
            torch.equal(found[name][key], value) for key, value in model.state_dict().items()
        )


def test_pipeline_of_the_only_generator(tmp_path):
    torch.manual_seed(0)
    model = shake(make_generator())
    path = official_format.write_pickle(tmp_path / "a.pkl", {"G": official_format.generator(model)})
    assert convert(path, tmp_path / "out") == ["G", "pipeline"]
    assert_same(model, styles.load_pipeline(tmp_path / "out").generator)


def test_folder_that_is_used_loses_nothing(tmp_path, monkeypatch, capsys):
    model = StyleGANDiscriminator(16, channel_base=256, max_channels=16)
    path = official_format.write_pickle(
        tmp_path / "a.pkl", {"D": official_format.discriminator(model)}
    )
    out, used, file = tmp_path / "out", tmp_path / "used", tmp_path / "file"
    (used / "G_ema").mkdir(parents=True)
    file.write_text("text")
    for folder, message in ((used, "is not empty (G_ema)"), (file, "is a file; give a folder")):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, load_official, path, folder)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in used.iterdir()] == ["G_ema"]
    assert file.read_text() == "text"
    run(monkeypatch, load_official, path, out)
    assert [path.name for path in out.iterdir()] == ["D"]
    assert "no generator" in capsys.readouterr().out


def test_network_that_does_not_fit_leaves_nothing_behind(tmp_path):
    generator = official_format.generator(make_generator())
    other = alter(official_format.generator(make_generator()), "mapping.fc0", activation="linear")
    path = official_format.write_pickle(tmp_path / "a.pkl", {"G": generator, "G_ema": other})
    with pytest.raises(
        ValueError, match=r"^G_ema of .*a\.pkl: mapping\.fc0 has activation 'linear'"
    ):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_explains_itself(tmp_path, monkeypatch, capsys):
    path = official_format.write_pickle(
        tmp_path / "a.pkl",
        {"augment_pipe": official_format.Persistent("AugmentPipe"), "training_set_kwargs": {}},
    )
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, load_official, path, tmp_path / "out")
    assert stop.value.code == 2
    assert (
        "holds no network: expected 'G_ema', 'G' or 'D', found augment_pipe"
        in capsys.readouterr().err
    )


def test_array_that_lies_about_its_shape_is_refused(tmp_path):
    class Lie:
        def __reduce__(self):
            array = np.arange(4)
            function, arguments, state = array.__reduce__()
            return function, arguments, (state[0], (1000,), *state[2:])

    path = official_format.write_pickle(tmp_path / "a.pkl", {"a": Lie()})
    with pytest.raises(ValueError, match="cannot reshape"):
        read_pickle(path)


def test_array_of_objects_is_refused(tmp_path):
    path = official_format.write_pickle(
        tmp_path / "a.pkl", {"a": np.array([None, print], dtype=object)}
    )
    with pytest.raises(ValueError, match="can be read safely"):
        read_pickle(path)
