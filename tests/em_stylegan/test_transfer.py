"""Training that starts from other weights: the same images at first, frozen layers that stay, sizes
that do not fit.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from em_data.files import write_atomically
from em_generation.loading import hash_weight_files
from em_hub.export import save_half
from em_stylegan import StyleGAN2Generator, StyleGANDiscriminator, gan_loop
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.networks import create_networks
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_stylegan.presets import PRESETS
from em_stylegan.train import train_gan
from em_stylegan.transfer import load_initial_weights, start_from
from em_training import load_checkpoint

SIZES = {"channel_base": 128, "max_channels": 8}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = PRESETS["test"]()
    tiles = replace(config.tiles, cache_dir=str(tmp_path_factory.mktemp("cache")))
    training = replace(config.training, num_images=16, num_sample_images=1, sample_every=0)
    return replace(config, precision="no", tiles=tiles, training=training, save_untrained=False)


@pytest.fixture(scope="module")
def source(config, tmp_path_factory):
    return train_gan(replace(config, seed=5, out=str(tmp_path_factory.mktemp("runs") / "source")))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """G_ema and D for three image channels, as `load_official` writes them."""
    folder = tmp_path_factory.mktemp("converted")
    torch.manual_seed(3)
    generator = StyleGAN2Generator(32, 3, z_dim=8, w_dim=8, mapping_depth=2, **SIZES)
    with torch.no_grad():
        generator.mapping_network.w_mean.normal_()
        for block in generator.synthesis_network.blocks:
            block.to_image.bias.normal_()
    generator.save_pretrained(folder / "G_ema")
    StyleGANDiscriminator(32, 3, group_size=2, **SIZES).save_pretrained(folder / "D")
    return folder


def test_a_run_starts_where_another_ended_and_frozen_layers_stay(config, source, tmp_path):
    frozen = replace(config.discriminator, num_frozen_layers=3)
    out = train_gan(
        replace(
            config,
            init_from=str(source),
            out=str(tmp_path / "next"),
            save_untrained=True,
            discriminator=frozen,
        )
    )
    before, first, after = (
        EMStyleGANPipeline.from_pretrained(path)
        for path in (source / "pipeline", out / "start", out / "pipeline")
    )
    images = [
        pipe(2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for pipe in (before, first, after)
    ]
    assert torch.equal(images[0], images[1])
    assert not (out / "untrained").exists()
    assert not torch.equal(images[0], images[2])
    old, new = (
        load_checkpoint(run / f"stylegan/checkpoints/{16:012d}")["state"]["discriminator"]
        for run in (source, out)
    )
    _, discriminator = create_networks(config)
    layers = list(discriminator.freezable_layers())
    names = {id(p): name for name, p in discriminator.named_parameters()}
    stays = {names[id(p)] for layer in layers[:3] for p in layer.parameters()}
    assert stays
    for name in names.values():
        assert torch.equal(old[name], new[name]) == (name in stays), name


def test_the_average_to_start_from_is_not_forgotten(config, converted, tmp_path, monkeypatch):
    """A ramp of the half-life would leave nothing of G_ema after one step."""
    averages = []
    original = gan_loop.EMA
    monkeypatch.setattr(
        gan_loop, "EMA", lambda *options: averages.append(original(*options)) or averages[-1]
    )
    training = replace(config.training, num_images=8, ema_half_life_images=8.0, ema_ramp_up=0.001)
    train_gan(replace(config, init_from=str(converted), out=str(tmp_path), training=training))
    assert averages[0].decay(8, 8) == pytest.approx(0.5)
    train_gan(replace(config, out=str(tmp_path / "fresh"), training=training))
    assert averages[1].decay(8, 8) < 1e-6


def test_networks_that_compute_otherwise_are_refused(config, tmp_path):
    """Weights of equal shapes, but other filters."""
    sizes = {"z_dim": 8, "w_dim": 8, "mapping_depth": 2, **SIZES}
    StyleGAN3Generator(32, 1, filter_size=4, output_scale=1.0, **sizes).save_pretrained(
        tmp_path / "G_ema"
    )
    generator = replace(config.generator, architecture="stylegan3-t")
    config = replace(config, init_from=str(tmp_path), generator=generator)
    with pytest.raises(
        ValueError,
        match=r"generator was made with filter_size 4 \(ours 6\), output_scale 1.0 \(ours 0.25\)",
    ):
        load_initial_weights(config, *create_networks(config))


def test_colour_becomes_grey(config, converted):
    """The image is the mean of the three channels, and a grey image is judged as its three equal
    channels were.
    """
    generator, discriminator = create_networks(config)
    start_from(
        replace(config, init_from=str(converted)),
        generator,
        discriminator,
        generator,
        lambda text: None,
    )
    colour = StyleGAN2Generator.from_pretrained(converted / "G_ema")
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = colour(z, noise_mode="const", truncation_psi=0.7).mean(dim=1, keepdim=True)
        torch.testing.assert_close(
            generator(z, noise_mode="const", truncation_psi=0.7), expected, rtol=1e-4, atol=1e-5
        )
        judge = StyleGANDiscriminator.from_pretrained(converted / "D")
        torch.testing.assert_close(
            discriminator(expected), judge(expected.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
        )


def test_a_missing_discriminator_is_said(config, converted, tmp_path):
    (tmp_path / "G_ema").symlink_to(converted / "G_ema")
    said = []
    weights = load_initial_weights(
        replace(config, init_from=str(tmp_path)), *create_networks(config), said.append
    )
    assert weights["discriminator"] is None
    assert any("no discriminator" in line for line in said)


@pytest.mark.parametrize("has_discriminator", [True, False])
def test_a_model_of_the_package_is_a_start(
    config, source, tmp_path, monkeypatch, has_discriminator
):
    """In half precision, with a discriminator beside the generator or without; a run records it."""
    checkpoint = load_checkpoint(source / f"stylegan/checkpoints/{16:012d}")["state"]
    discriminator = create_networks(config)[1]
    discriminator.load_state_dict(checkpoint["discriminator"])
    parts = {"discriminator": discriminator} if has_discriminator else {}
    folder = tmp_path / "em-stylegan2-64"
    save_half(EMStyleGANPipeline.from_pretrained(source / "pipeline"), (), folder, parts)
    write_atomically(folder / "README.md", "---\nlicense: apache-2.0\n---\n")
    monkeypatch.setattr("em_pretrained.box.FOLDER", tmp_path)
    said = []
    weights = load_initial_weights(
        replace(config, init_from="em-stylegan2-64"), *create_networks(config), said.append
    )
    for name, value in checkpoint["ema"].items():
        assert weights["ema"][name].dtype == value.dtype == torch.float32
        torch.testing.assert_close(weights["ema"][name], value.half().float(), rtol=0, atol=0)
    assert (weights["discriminator"] is None) == (not has_discriminator)
    assert any("no discriminator" in line for line in said) == (not has_discriminator)
    out = train_gan(replace(config, init_from="em-stylegan2-64", out=str(tmp_path / "run")))
    record = json.loads((out / "run.json").read_text())["started_from"]
    expected = {"model": "em-stylegan2-64", "license": "apache-2.0", "use": "trained further"}
    names = ["generator", "discriminator"] if has_discriminator else ["generator"]
    assert record == dict.fromkeys(names, expected)
    # the folder's weights count, and the discriminator's do not: the pipeline does not load them
    digest = hash_weight_files(folder)
    shutil.rmtree(folder / "discriminator", ignore_errors=True)
    assert hash_weight_files(folder) == digest


def test_other_sizes_are_refused_with_the_flags_that_fit(config, source, converted, tmp_path):
    for folder in (source, converted):
        wider = replace(
            config,
            init_from=str(folder),
            generator=replace(config.generator, max_channels=16, channel_base=512),
        )
        with pytest.raises(
            ValueError,
            match=r"of another shape.*--tiles\.resolution 32.*--generator\.max-channels 8",
        ):
            load_initial_weights(wider, *create_networks(wider))
    with pytest.raises(ValueError, match="neither the folder of a run"):
        load_initial_weights(replace(config, init_from=str(tmp_path)), *create_networks(config))
    with pytest.raises(ValueError, match=r"Did you mean em-stylegan2-64"):
        load_initial_weights(replace(config, init_from="em-stylegan-64"), *create_networks(config))
    other = replace(
        config,
        init_from=str(converted),
        generator=replace(config.generator, architecture="stylegan3-t"),
    )
    with pytest.raises(
        ValueError, match=r"holds a StyleGAN2Generator.*set generator\.architecture"
    ):
        load_initial_weights(other, *create_networks(other))
