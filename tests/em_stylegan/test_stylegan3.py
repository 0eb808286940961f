"""StyleGAN3 (and the 2019 generator) as networks, in training and in the pipeline."""

import json
import re
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from em_stylegan import gan_loop, networks
from em_stylegan.config import DiscriminatorConfig, GeneratorConfig
from em_stylegan.em_stylegan1_generator import StyleGAN1Generator
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator, plan_layers
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_stylegan.presets import PRESETS
from em_stylegan.train import train_gan
from em_training import load_checkpoint, read_stats
from support.config import refuses_config

SMALL = {"z_dim": 8, "w_dim": 12, "channel_base": 256, "max_channels": 16, "mapping_depth": 2}
R = {"kernel_size": 1, "radial_filters": True}


def make_generator(resolution=32, **options):
    torch.manual_seed(0)
    return StyleGAN3Generator(resolution, **{**SMALL, **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"image_channels": 3, "resolution": 64}, R, {**R, "num_classes": 3}, {"resolution": 16}],
    ids=str,
)
def test_shapes_and_every_parameter_learns(options):
    generator = make_generator(**options)
    labels = torch.tensor([0, 2]) if "num_classes" in options else None
    ws = generator.mapping(torch.randn(2, 8), labels)
    assert ws.shape == (2, 16, 12)
    images = generator.synthesis(ws)
    side = options.get("resolution", 32)
    assert images.shape == (2, options.get("image_channels", 1), side, side)
    images.square().mean().backward()
    without = [
        name
        for name, p in generator.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    ]
    # the turn and shift begin at rest: the weights that read them from w learn all the same
    assert without == ([] if labels is None else [n for n in without if "embed" in n])


def test_schedule_at_1024_is_the_papers():
    """Figure 4c of the paper: 14 layers, sampling rates from 16 to 1024, sizes with a margin of 10,
    the last two critically sampled.
    """
    defaults = signature(StyleGAN3Generator).parameters.values()
    config = {parameter.name: parameter.default for parameter in defaults}
    plans = plan_layers(SimpleNamespace(**{**config, "resolution": 1024, "image_channels": 3}))
    assert plans[0].in_sampling_rate == 16
    assert plans[-1].out_sampling_rate == 1024
    assert all(
        a.out_sampling_rate <= b.out_sampling_rate <= 2 * a.out_sampling_rate
        for a, b in pairwise(plans)
    )
    cutoffs = np.array([plan.out_cutoff for plan in plans])
    np.testing.assert_allclose(cutoffs[1:13] / cutoffs[:12], 256 ** (1 / 12))
    np.testing.assert_allclose(cutoffs[12:], 512)
    for plan in plans[:12]:
        assert plan.out_cutoff + plan.out_half_width <= plan.out_sampling_rate
        assert plan.out_size == plan.out_sampling_rate + 20
    assert [plan.out_size for plan in plans[-2:]] == [1024, 1024]


def test_magnitudes_follow_the_inputs_in_training_alone():
    generator = make_generator(magnitude_decay=0.9)
    ws = generator.mapping(torch.randn(4, 8))
    generator.synthesis(ws)
    assert all(layer.magnitude == 1 for layer in generator.synthesis_network.layers)
    inputs = []
    generator.synthesis_network.layers[0].register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    generator.synthesis(ws, update_magnitudes=True)
    expected = 0.9 + 0.1 * inputs[0].square().mean()
    torch.testing.assert_close(generator.synthesis_network.layers[0].magnitude, expected)


def test_settled_magnitudes_keep_activations_of_unit_size():
    """Demodulation takes the styles' scale away, the magnitudes the inputs': what is left is the
    correlation of the inputs.
    """
    generator = make_generator(magnitude_decay=0.0)
    ws = generator.mapping(torch.randn(16, 8))
    sizes = []
    for layer in generator.synthesis_network.layers[:-1]:
        layer.activation.register_forward_pre_hook(
            lambda module, args: sizes.append(args[0].square().mean().item())
        )
    generator.synthesis(ws, update_magnitudes=True)
    assert len(sizes) == 14
    assert 0.2 < min(sizes) < max(sizes) < 5


def test_noise_modes_change_nothing_and_others_are_refused():
    generator = make_generator()
    z = torch.randn(2, 8)
    images = [generator(z, noise_mode=mode) for mode in ("random", "const", "none")]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    with pytest.raises(ValueError, match="noise_mode is"):
        generator(z, noise_mode="loud")
    with pytest.raises(ValueError, match=r"ws must be \[B, 16, 12\]"):
        generator.synthesis(torch.zeros(1, 3, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_close(dtype):
    generator = make_generator(64, num_reduced_resolutions=2)
    types = []
    for layer in generator.synthesis_network.layers:
        layer.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    ws = generator.mapping(torch.randn(2, 8))
    full = generator.synthesis(ws)
    types.clear()
    reduced = generator.synthesis(ws, compute_dtype=dtype)
    assert types[0] == torch.float32
    assert types[-1] == dtype
    assert reduced.dtype == torch.float32
    assert 0 < (reduced - full).abs().max() / full.std() < 0.2


def test_saved_and_loaded_whole(tmp_path):
    generator = make_generator(**R).eval()
    generator.save_pretrained(tmp_path)
    loaded = StyleGAN3Generator.from_pretrained(tmp_path)
    z = torch.randn(2, 8)
    assert torch.equal(loaded(z), generator(z))
    half = StyleGAN3Generator.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.synthesis_network.input.frequencies.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    images = half(z.to(torch.bfloat16))
    assert (images.float() - generator(z)).abs().max() / generator(z).std() < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 24}, "power of two"),
        ({"resolution": 8}, "a power of two from 16"),
        ({"channel_base": 8}, "give at least 32"),
        ({"num_critical": 14}, "num_critical"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_generator(**options)


def test_stylegan1():
    """AdaIN: each map's moments are the style's, whatever the noise and the weights."""
    torch.manual_seed(0)
    generator = StyleGAN1Generator(16, **SMALL, num_classes=2)
    outputs = []
    layer = generator.synthesis_network.layers[3]
    layer.register_forward_hook(lambda module, args, output: outputs.append((args[1], output)))
    images = generator(torch.randn(2, 8), torch.tensor([0, 1]))
    assert images.shape == (2, 1, 16, 16)
    assert generator.num_ws == 6
    w, x = outputs[0]
    scale, shift = layer.style(w).chunk(2, dim=1)
    torch.testing.assert_close(x.mean(dim=(2, 3)), shift, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        x.std(dim=(2, 3), correction=0), (scale + 1).abs(), atol=1e-3, rtol=1e-3
    )
    images.square().mean().backward()
    assert all(
        p.grad is not None for name, p in generator.named_parameters() if "embed" not in name
    )


# ---------------- training


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The test preset with StyleGAN3-R, blurred images and two frozen layers."""
    config = PRESETS["test"]()
    training = replace(
        config.training,
        path_length_weight=1.0,
        blur_initial_sigma_px=2.0,
        blur_fade_images=40,
        num_sample_images=2,
    )
    return replace(
        config,
        precision="no",
        tiles=replace(config.tiles, cache_dir=str(tmp_path_factory.mktemp("cache"))),
        generator=replace(
            config.generator, architecture="stylegan3-r", magnitude_half_life_images=50
        ),
        discriminator=replace(config.discriminator, num_frozen_layers=2),
        training=training,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return train_gan(replace(config, out=str(tmp_path_factory.mktemp("runs") / "whole")))


def checkpoint(folder):
    return load_checkpoint(folder / "stylegan" / "checkpoints" / f"{64:012d}")["state"]


def test_training_moves_magnitudes_and_leaves_frozen_layers(finished, config):
    state = checkpoint(finished)
    magnitudes = [value for name, value in state["model"].items() if name.endswith("magnitude")]
    assert len(magnitudes) == 15
    assert all(value != 1 for value in magnitudes)
    for name, value in state["ema"].items():
        if name.endswith("magnitude"):
            assert torch.equal(value, state["model"][name])
    _, discriminator = networks.create_networks(config)
    first = discriminator.state_dict()
    moved = {
        name
        for name, value in state["discriminator"].items()
        if not torch.equal(value, first[name])
    }
    frozen = {
        f"blocks.0.{layer}.{kind}"
        for layer in ("from_image", "conv0")
        for kind in ("weight", "bias")
    }
    assert moved.isdisjoint(frozen)
    assert {"blocks.0.conv1.weight", "blocks.0.skip.weight", "out.weight"} <= moved
    assert json.loads((finished / "run.json").read_text())["family"] == "stylegan3-r"


def test_resumed_run_equals_the_whole_run_to_the_bit(finished, config, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    class MortalRun(gan_loop.TrainingRun):
        def step(self, num_images_seen):
            super().step(num_images_seen)
            if num_images_seen == 40:
                raise Killed

    config = replace(config, out=str(tmp_path / "resumed"))
    with monkeypatch.context() as patch:
        patch.setattr(gan_loop, "TrainingRun", MortalRun)
        with pytest.raises(Killed):
            train_gan(config)
    out = train_gan(config)
    whole, resumed = checkpoint(finished), checkpoint(out)
    for part in ("model", "discriminator", "ema"):
        assert whole[part].keys() == resumed[part].keys()
        for name, value in whole[part].items():
            assert torch.equal(value, resumed[part][name]), (part, name)
    assert (
        read_stats(finished / "stylegan")[-1]["loss_G"]
        == read_stats(out / "stylegan")[-1]["loss_G"]
    )


@pytest.mark.parametrize("architecture", ["stylegan3-t", "stylegan1"])
def test_other_architectures_train_and_are_saved_with_their_code(config, tmp_path, architecture):
    path_length = 0 if architecture == "stylegan1" else 2
    training = replace(config.training, num_images=16, path_length_every_steps=path_length)
    short = replace(
        config,
        out=str(tmp_path / "run"),
        generator=replace(config.generator, architecture=architecture),
        training=training,
    )
    out = train_gan(short)
    file = {"stylegan3-t": "em_stylegan3_generator", "stylegan1": "em_stylegan1_generator"}[
        architecture
    ]
    assert (out / "pipeline" / "generator" / f"{file}.py").is_file()
    assert json.loads((out / "pipeline" / "model_index.json").read_text())["generator"][0] == file
    pipe = EMStyleGANPipeline.from_pretrained(out / "pipeline")
    images = pipe(2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 32, 32, 1)


def test_installed_code_is_self_contained(finished, tmp_path):
    """The folder's copy of the component is the package's file, with the files it imports in it."""
    source = Path(gan_loop.__file__).with_name("em_stylegan3_generator.py")
    saved = (finished / "pipeline" / "generator" / source.name).read_bytes()
    start, _, end = re.split(rb"(from \.em_style_mapping import .*\n)", source.read_bytes())
    assert saved.startswith(start)
    assert saved.endswith(end)
    assert b"from .em_" not in saved
    assert b"from em_" not in saved
    assert b"class MappingNetwork" in saved


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GeneratorConfig(architecture="stylegan4"),
            "generator.architecture is .* 'stylegan2', 'stylegan3-t'",
        ),
        (lambda: GeneratorConfig(magnitude_half_life_images=0), "must be greater than 0"),
        (
            lambda: DiscriminatorConfig(num_frozen_layers=-1),
            "num_frozen_layers is -1, but must be at least 0",
        ),
        (
            lambda: replace(
                PRESETS["stylegan3-t"](), tiles=replace(PRESETS["test"]().tiles, resolution=8)
            ),
            "at least 16",
        ),
    ],
)
def test_impossible_configurations_are_refused(make, message):
    with refuses_config(message):
        make()


def test_too_many_frozen_layers_are_refused(config):
    config = replace(config, discriminator=replace(config.discriminator, num_frozen_layers=99))
    with pytest.raises(ValueError, match="there are 10 layers above 4 x 4"):
        networks.create_networks(config)


def test_presets_are_the_papers():
    t, r = PRESETS["stylegan3-t"](), PRESETS["stylegan3-r"]()
    assert (r.generator.channel_base, r.generator.max_channels) == (
        2 * t.generator.channel_base,
        2 * t.generator.max_channels,
    )
    assert (t.training.blur_initial_sigma_px, r.training.blur_initial_sigma_px) == (0, 10)
    assert t.training.style_mixing_probability == r.training.style_mixing_probability == 0


@pytest.mark.parametrize("options", [{}, R, {"resolution": 64}], ids=str)
def test_a_larger_canvas_goes_on_where_the_tile_ends(options):
    """In its middle a canvas of three tiles a side shows the tile, up to what the tile's own border
    disturbs; it is no repetition of the tile.
    """
    generator = make_generator(**options).eval()
    side = generator.config.resolution
    ws = generator.mapping(torch.randn(1, 8))
    with torch.no_grad():
        tile, canvas = generator.synthesis(ws), generator.synthesis(ws, size=(3 * side, 3 * side))
    assert canvas.shape == (1, 1, 3 * side, 3 * side)
    middle = canvas[:, :, side : 2 * side, side : 2 * side]
    inner = np.s_[:, :, side // 4 : -side // 4, side // 4 : -side // 4]
    scale = tile.std()
    assert (middle[inner] - tile[inner]).abs().max() < 0.01 * scale
    assert (canvas[:, :, :side, :side] - tile).std() > 0.5 * scale


def test_canvases_that_no_first_sample_fits_are_refused():
    generator = make_generator(64).eval()
    ws = generator.mapping(torch.randn(1, 8))
    cell = 64 // generator.plans[0].in_sampling_rate
    assert cell > 1
    for size in ((64 + 1, 64), (32, 64)):
        with pytest.raises(ValueError, match=f"a multiple of {cell} and at least 64"):
            generator.synthesis(ws, size=size)
    with pytest.raises(ValueError, match="Choose a smaller size"):
        generator.synthesis(ws, size=(8192, 8192))
    wide = generator.synthesis(ws, size=(64, 64 + cell))
    assert wide.shape == (1, 1, 64, 64 + cell)
