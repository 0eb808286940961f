"""Runs that start from a trained autoencoder and denoiser."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from em_diffusion import PRESETS, EMLatentDiffusionPipeline, train_ldm
from em_diffusion.latents import hash_encoder
from em_training import config_from_json, config_to_json, is_complete
from em_training.flags import parse_preset
from support.box import write_box
from support.config import refuses_config
from support.models import draw, make_stylegan

UNET = "unet/diffusion_pytorch_model.safetensors"
VQVAE = "vqvae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The test preset with its micrographs cut once."""
    config = PRESETS["test"]()
    tiles = dataclasses.replace(config.tiles, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return dataclasses.replace(config, tiles=tiles, precision="no")


@pytest.fixture(scope="module")
def source(config, tmp_path_factory):
    """A finished run to start from."""
    return train_ldm(change(config, tmp_path_factory.mktemp("source") / "first", seed=7))


def change(config, out, *, autoencoder=(), denoiser=(), **changes):
    return dataclasses.replace(
        config,
        out=str(out),
        autoencoder=dataclasses.replace(config.autoencoder, **dict(autoencoder)),
        denoiser=dataclasses.replace(config.denoiser, **dict(denoiser)),
        **changes,
    )


def continue_from(source, config, out, **changes):
    """Start both stages from `source` and leave the autoencoder unchanged."""
    changes.setdefault("autoencoder", {"num_images": 0})
    return change(config, out, init_from=str(source), **changes)


def load(folder):
    return EMLatentDiffusionPipeline.from_pretrained(folder / "pipeline")


def test_a_continued_model_begins_as_the_model_itself(config, source, tmp_path):
    """With a learning rate of nothing the pipeline is that of the source: weights and scale."""
    still = {"learning_rate": 1e-30, "num_images": 8, "guide_images": 0, "ema_half_life_images": 8}
    out = train_ldm(continue_from(source, config, tmp_path / "next", denoiser=still))
    for path in (UNET, VQVAE):
        ours, theirs = (load_file(each / "pipeline" / path) for each in (out, source))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), path
    ours, theirs = load(out), load(source)
    for name in ("latents_mean", "latents_std"):
        assert ours.vqvae.config[name] == theirs.vqvae.config[name]
    assert np.array_equal(draw(ours, 0, 1, add_grain=False), draw(theirs, 0, 1, add_grain=False))


def test_the_decoder_is_trained_and_the_latents_stay(config, source, tmp_path):
    short = {"num_images": 16}
    config = continue_from(
        source, config, tmp_path / "next", autoencoder=short, denoiser={"num_images": 16}
    )
    assert config.autoencoder.freeze_encoder
    out = train_ldm(config)
    ours, theirs = load(out), load(source)
    assert hash_encoder(ours.vqvae) == hash_encoder(theirs.vqvae)
    a, b = ours.vqvae.state_dict(), theirs.vqvae.state_dict()
    changed = {name for name in a if not torch.equal(a[name], b[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv", "quantize"}
    assert ours.vqvae.config.latents_mean == theirs.vqvae.config.latents_mean
    assert not torch.equal(ours.unet.conv_in.weight, theirs.unet.conv_in.weight)
    record = json.loads((out / "run.json").read_text())["started_from"]
    assert record["autoencoder"]["model"] == record["denoiser"]["model"] == "first"
    assert record["autoencoder"]["use"] == "decoder trained further"
    assert "started_from" not in json.loads((source / "run.json").read_text())
    assert is_complete(out, config)
    assert config_from_json(type(config), config_to_json(config)) == config


def test_a_resumed_run_equals_the_uninterrupted_one(config, source, tmp_path):
    steady = {"learning_rate_decay": "constant", "guide_images": 0}
    whole, parts = (
        continue_from(source, config, tmp_path / name, denoiser=steady | {"num_images": 32})
        for name in ("whole", "parts")
    )
    train_ldm(
        continue_from(source, config, tmp_path / "parts", denoiser=steady | {"num_images": 16})
    )
    for each in (whole, parts):
        train_ldm(each)
    weights = [(tmp_path / name / "pipeline" / UNET).read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_finished_run_needs_its_source_no_more(config, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    config = continue_from(
        tmp_path / "source", config, tmp_path / "next", denoiser={"num_images": 8}
    )
    out = train_ldm(config)
    before = (out / "run.json").read_bytes()
    shutil.rmtree(tmp_path / "source")
    train_ldm(dataclasses.replace(config, num_inference_steps=3))
    assert load(out).vqvae.config.latents_mean == load(source).vqvae.config.latents_mean
    assert json.loads(before)["started_from"]["denoiser"]["model"] == "first"


def test_a_source_that_has_changed_is_refused(config, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    config = continue_from(
        tmp_path / "source", config, tmp_path / "next", denoiser={"num_images": 8}
    )
    train_ldm(config)
    longer = change(config, config.out, denoiser={"num_images": 16})
    shutil.rmtree(tmp_path / "next" / "denoiser" / "checkpoints")
    unet = load(source).unet
    with torch.no_grad():
        unet.conv_in.weight.add_(1)
    unet.save_pretrained(tmp_path / "source" / "pipeline" / "unet")
    with pytest.raises(
        ValueError, match=r"is not the model that the run .* began with: its denoiser"
    ):
        train_ldm(longer)


def test_another_architecture_is_kept_and_said(config, source, tmp_path, capsys):
    wide = {"num_images": 8, "base_channels": 32}
    out = train_ldm(continue_from(source, config, tmp_path / "next", denoiser=wide))
    said = "the denoiser of .* keeps its architecture: block_out_channels (16, 32) (not (32, 64))"
    assert said.split(" .* ")[1] in capsys.readouterr().out
    assert load(out).unet.config.block_out_channels == load(source).unet.config.block_out_channels


def test_larger_tiles_have_larger_latents(config, source, tmp_path):
    tiles = dataclasses.replace(config.tiles, resolution=64)
    small = {"num_images": 8}
    out = train_ldm(continue_from(source, config, tmp_path / "next", denoiser=small, tiles=tiles))
    assert load(out).latent_shape == (4, 32, 32)
    assert draw(load(out), 0, num_inference_steps=2).shape == (1, 64, 64, 1)


def test_what_does_not_fit_is_refused_at_once(config, source, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a stage began")

    monkeypatch.setattr("em_diffusion.train.train_autoencoder", refuse)
    for options, said in (
        ({"prediction_type": "v_prediction"}, "Use --denoiser.prediction-type epsilon"),
        ({"prediction_type": "flow"}, "Use --denoiser.prediction-type epsilon --denoiser.num-"),
        ({"beta_end": 0.02}, "Use --denoiser.beta-end 0.0195"),
    ):
        with pytest.raises(ValueError, match=said):
            train_ldm(continue_from(source, config, tmp_path / "next", denoiser=options))
    shutil.copytree(source, tmp_path / "other")
    vqvae = load(source).vqvae
    with torch.no_grad():
        vqvae.encoder.conv_in.weight.add_(0.1)
    vqvae.save_pretrained(tmp_path / "other" / "pipeline" / "vqvae")
    other = {"init_from": str(tmp_path / "other" / "pipeline"), "num_images": 0}
    both = change(config, tmp_path / "next", autoencoder=other, denoiser={"init_from": str(source)})
    with pytest.raises(ValueError, match="latents of another encoder than that of"):
        train_ldm(both)
    make_stylegan().save_pretrained(tmp_path / "gan")
    with pytest.raises(ValueError, match="is an EMStyleGANPipeline, not a latent diffusion model"):
        train_ldm(continue_from(tmp_path / "gan", config, tmp_path / "next"))
    with pytest.raises(ValueError, match=r"no folder em-ldm-46.*Did you mean em-ldm-64"):
        train_ldm(continue_from("em-ldm-46", config, tmp_path / "next"))


def test_stages_that_cannot_start_are_refused(config):
    with refuses_config("Use --init-from x for both"):
        change(config, "x", denoiser={"init_from": "x"})
    with refuses_config(
        "encoder of its latents would be trained further.*--autoencoder.freeze-enc"
    ):
        change(config, "x", autoencoder={"init_from": "x"}, denoiser={"init_from": "x"})
    with refuses_config("autoencoder.freeze_encoder keeps a trained encoder, but none is given"):
        change(config, "x", autoencoder={"freeze_encoder": True})
    with refuses_config("autoencoder.num_images is 0"):
        change(config, "x", autoencoder={"num_images": 0})


def test_a_model_of_the_package_is_a_start(config, tmp_path, monkeypatch):
    """Half-precision weights, a name on the command line, and the flags that the refusal names."""
    folders = write_box(tmp_path / "box", monkeypatch)
    words = ["test", "--init-from", "em-ldm-64", "--out", str(tmp_path / "run")]
    words += ["--autoencoder.num-images", "0", "--denoiser.num-images", "16"]
    words += ["--tiles.resolution", "16", "--tiles.cache-dir", config.tiles.cache_dir]
    options = {"command": "train_ldm.py", "default": "test", "description": "", "main_flags": ()}
    with pytest.raises(ValueError, match="Use --denoiser") as refusal:
        train_ldm(parse_preset(PRESETS, words, **options)[0])
    words += str(refusal.value).partition("Use ")[2].rstrip(".").split()
    out = train_ldm(parse_preset(PRESETS, words, **options)[0])
    record = json.loads((out / "run.json").read_text())["started_from"]
    assert record["denoiser"]["model"] == "em-ldm-64"
    assert record["denoiser"]["license"] == "apache-2.0"
    assert record["autoencoder"]["use"] == "unchanged"
    weights = load_file(out / "pipeline" / VQVAE)
    stored = load_file(folders["em-ldm-64"] / VQVAE)
    assert all(torch.equal(weights[name], stored[name].float()) for name in stored)
