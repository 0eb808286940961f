"""Original autoencoders loaded into diffusers models: the stored reference numbers, and a slow twin
over many configurations.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from em_diffusion.autoencoder import decode, encode
from em_diffusion.em_taming_models import EMGumbelVQModel, EMTamingAutoencoderKL, EMTamingVQModel
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.load_official import main
from em_diffusion.original.load import load_official
from support import official_twins as twins
from support.official_twins import deviation, rms

FOLDER = (
    Path(os.environ.get("EM_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures"))
    / "official_vqgan"
)
FIXTURES = sorted(path.with_suffix("") for path in FOLDER.glob("*.ckpt"))
TARGETS = {
    "VQ": "taming.models.vqgan.VQModel",
    "Gumbel VQ": "taming.models.vqgan.GumbelVQ",
    "KL": "ldm.models.autoencoder.AutoencoderKL",
}
BASE = {
    "double_z": False,
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 1,
    "out_ch": 1,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
CASES = {
    # name: (kind, changes of the network, embed_dim, the class that holds it)
    "no attention": ("VQ", {}, 4, VQModel),
    "attention on the finest level": ("VQ", {"attn_resolutions": [32]}, 4, VQModel),
    "attention on the coarsest level": ("VQ", {"attn_resolutions": [16]}, 4, VQModel),
    "attention on several levels": (
        "VQ",
        {"attn_resolutions": [32, 8], "ch_mult": [1, 1, 2]},
        4,
        VQModel,
    ),
    "attention in the middle only of three": (
        "VQ",
        {"attn_resolutions": [16], "ch_mult": [1, 2, 2]},
        4,
        VQModel,
    ),
    "attention nowhere at all": ("VQ", {"attn_resolutions": [16], "attn_type": "none"}, 4, VQModel),
    "other attention in encoder and decoder": (
        "VQ",
        {"attn_resolutions": [25], "resolution": 51, "ch_mult": [1, 1]},
        4,
        VQModel,
    ),
    "three blocks, three channels": (
        "VQ",
        {"num_res_blocks": 3, "in_channels": 3, "out_ch": 3},
        4,
        VQModel,
    ),
    "one level": ("VQ", {"ch_mult": [1], "attn_resolutions": [32]}, 4, VQModel),
    "widths that fall": ("VQ", {"ch_mult": [1, 3, 2]}, 4, VQModel),
    "codes of other width than latents": ("VQ", {"z_channels": 6}, 3, VQModel),
    "other channels at the end": ("VQ", {"in_channels": 2, "out_ch": 5}, 4, VQModel),
    "wide first level": ("VQ", {"ch_mult": [2, 1], "attn_resolutions": [32]}, 4, EMTamingVQModel),
    "no convolutions between levels": (
        "VQ",
        {"resamp_with_conv": False, "ch_mult": [1, 2, 1]},
        4,
        EMTamingVQModel,
    ),
    "tanh at the end": ("VQ", {"tanh_out": True}, 4, EMTamingVQModel),
    "classifier": ("Gumbel VQ", {"attn_resolutions": [16], "z_channels": 8}, 8, EMGumbelVQModel),
    "classifier, unusual": (
        "Gumbel VQ",
        {"ch_mult": [2, 2], "resamp_with_conv": False},
        4,
        EMGumbelVQModel,
    ),
    "gaussian": ("KL", {"double_z": True, "attn_resolutions": [32]}, 4, AutoencoderKL),
    "gaussian, no attention at all": (
        "KL",
        {"double_z": True, "attn_type": "none"},
        4,
        AutoencoderKL,
    ),
    "gaussian of other width": (
        "KL",
        {"double_z": True, "z_channels": 6},
        3,
        EMTamingAutoencoderKL,
    ),
    "gaussian, unusual": (
        "KL",
        {"double_z": True, "ch_mult": [3, 1], "resamp_with_conv": False},
        4,
        EMTamingAutoencoderKL,
    ),
    "gaussian, tanh": ("KL", {"double_z": True, "tanh_out": True}, 4, EMTamingAutoencoderKL),
}


def parameters(case):
    kind, changes, embed_dim, _ = CASES[case]
    params = {
        "embed_dim": embed_dim,
        "ddconfig": BASE | changes,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    return params if kind == "KL" else params | {"n_embed": 40}


def write(folder, params, weights, target, name="model", extra=()):
    """A checkpoint and its yaml, with weights that no autoencoder needs."""
    rubbish = {
        "loss.discriminator.main.0.weight": torch.ones(3),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(2),
    }
    return twins.write_checkpoint(folder, weights | rubbish | dict(extra), target, params, name)


@pytest.fixture
def case_files(tmp_path):
    def create(case, seed=0, **options):
        kind, params = CASES[case][0], parameters(case)
        weights = twins.random_taming(kind, params, seed)
        return write(tmp_path, params, weights, TARGETS[kind], **options), params, weights

    return create


def images(channels, count=2, shape=(8, 12)):
    return torch.rand(count, channels, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def as_double(weights):
    return {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_answers_as_the_twin(case, case_files):
    kind, _, _, cls = CASES[case]
    path, params, weights = case_files(case)
    model = load_official(path, grey=False)
    assert type(model) is cls
    x = images(params["ddconfig"]["in_channels"])
    if (
        params["ddconfig"]["resolution"] == 51
    ):  # odd sides occur where they are halved with one row of zeros
        x = images(params["ddconfig"]["in_channels"], shape=(9, 13))
    # in float64 the two are the same function; in float32, the same up to rounding
    for precision, tolerance, error in (
        (torch.float64, 1e-9, deviation),
        (torch.float32, 1e-5, rms),
    ):
        model = model.to(precision)
        w, x = (
            (as_double(weights), x.double()) if precision == torch.float64 else (weights, x.float())
        )
        latents = twins.taming_encode(w, params, x)
        output = model.encode(x)
        if kind == "KL":
            mean, log_variance = latents.chunk(2, dim=1)
            assert error(output.latent_dist.mode(), mean) < tolerance
            assert error(output.latent_dist.logvar, log_variance.clamp(-30, 20)) < tolerance
            assert (
                error(model.decode(mean).sample, twins.taming_decode(w, params, mean)) < tolerance
            )
            continue
        assert error(output.latents, latents) < tolerance
        quantise = twins.most_probable_codes if kind == "Gumbel VQ" else twins.nearest_codes
        codes, indices = quantise(w, params, latents)
        found, _, (_, _, found_indices) = model.quantize(latents)
        assert len(indices.unique()) > 2
        assert torch.equal(found_indices.reshape(indices.shape), indices)
        assert error(found, codes) < tolerance
        decoded = twins.taming_decode(w, params, codes)
        assert error(model.decode(latents).sample, decoded) < tolerance
        assert error(model.decode(codes, force_not_quantize=True).sample, decoded) < tolerance
        unquantised = twins.taming_decode(w, params, latents)
        assert error(model.decode(latents, force_not_quantize=True).sample, unquantised) < tolerance


@torch.no_grad()
@pytest.mark.parametrize(
    "case", ["wide first level", "classifier, unusual", "gaussian, tanh", "gaussian of other width"]
)
def test_components_of_our_own_save_and_load(tmp_path, case, case_files, caplog):
    path, params, _ = case_files(case)
    model = load_official(path, grey=False)
    model.register_to_config(latents_mean=[0.0] * 4, latents_std=[2.0] * 4)
    model.save_pretrained(tmp_path / "model")
    with caplog.at_level("WARNING"):
        loaded = type(model).from_pretrained(tmp_path / "model")
    assert not caplog.records
    x = images(params["ddconfig"]["in_channels"])
    assert torch.equal(loaded(x).sample, model(x).sample)
    assert list(loaded.config.latents_std) == [2.0] * 4
    again = type(model).from_config(loaded.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x).sample, model(x).sample)


@torch.no_grad()
@pytest.mark.parametrize(
    "target",
    ["ldm.models.autoencoder.VQModelInterface", "taming.models.vqgan.EMAVQ", "VQNoDiscModel"],
)
def test_relatives_of_the_vq_model(tmp_path, target):
    params = parameters("no attention") | {"monitor": "val/rec_loss"}
    weights = twins.random_taming("VQ", params)
    extra = {
        "quantize.embedding.cluster_size": torch.ones(40),
        "quantize.embedding.embed_avg": torch.ones(40, 4),
    }
    path = write(tmp_path, params, weights, target, extra=extra)
    x = images(1)
    assert (
        rms(load_official(path).encode(x).latents, twins.taming_encode(weights, params, x)) < 1e-5
    )


@torch.no_grad()
def test_averaged_weights(case_files):
    average = twins.random_taming("VQ", parameters("no attention"), seed=5)
    extra = {"model_ema." + name.replace(".", ""): tensor for name, tensor in average.items()}
    extra |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(9)}
    extra["model_ema.lossdiscriminatormain0weight"] = torch.zeros(3)
    path, params, weights = case_files("no attention", extra=extra)
    x = images(1)
    expected = {
        False: twins.taming_encode(weights, params, x),
        True: twins.taming_encode(average, params, x),
    }
    for use_ema in (None, True, False):
        latents = load_official(path, use_ema=use_ema).encode(x).latents
        assert rms(latents, expected[use_ema is not False]) < 1e-5
    assert rms(expected[True], expected[False]) > 0.1


def test_averaged_weights_that_are_incomplete_or_absent(case_files):
    path, _, _ = case_files(
        "no attention", extra={"model_ema.encoderconv_inweight": torch.ones(32, 1, 3, 3)}
    )
    with pytest.raises(ValueError, match=r"it holds .* and no model_ema\."):
        load_official(path)
    load_official(path, use_ema=False)
    path, _, _ = case_files("no attention", name="raw")
    with pytest.raises(ValueError, match="holds no averaged weights"):
        load_official(path, use_ema=True)


@torch.no_grad()
@pytest.mark.parametrize("case", ["three blocks, three channels", "tanh", "classifier", "gaussian"])
def test_folded_to_grey_is_repeat_and_average(tmp_path, case):
    name = {"tanh": "tanh at the end"}.get(case, case)
    kind, params = CASES[name][0], parameters(name)
    params["ddconfig"] = params["ddconfig"] | {"in_channels": 3, "out_ch": 3}
    weights = twins.random_taming(kind, params)
    path = write(tmp_path, params, weights, TARGETS[kind])
    model = load_official(path)
    x = images(1)
    latents = twins.taming_encode(weights, params, x.repeat(1, 3, 1, 1))
    encoded = model.encode(x).latent_dist.mean if kind == "KL" else model.encode(x).latents
    latents = latents.chunk(2, dim=1)[0] if kind == "KL" else latents
    assert rms(encoded, latents) < 1e-5
    options = {} if kind == "KL" else {"force_not_quantize": True}
    expected = twins.taming_decode(weights, params, latents).mean(1, keepdim=True)
    assert rms(model.decode(latents, **options).sample, expected) < 1e-5
    model.save_pretrained(tmp_path / "folded")
    loaded = load_autoencoder(tmp_path / "folded")
    assert torch.equal(decode(loaded, latents), decode(model, latents))


def test_dropout_and_training_keys_do_not_matter(tmp_path):
    params = parameters("no attention")
    weights = twins.random_taming("VQ", params)
    plain = load_official(write(tmp_path, params, weights, TARGETS["VQ"]))
    params["ddconfig"] = params["ddconfig"] | {"dropout": 0.3}
    full = {
        "base_learning_rate": 4.5e-6,
        "ckpt_path": "x",
        "lr_g_factor": 1.0,
        "remap": None,
        "sane_index_shape": True,
    }
    other = load_official(write(tmp_path, params | full, weights, TARGETS["VQ"], name="other"))
    x = images(1)
    assert torch.equal(plain(x).sample, other(x).sample)


class ModelCheckpoint:
    """Stands for a Lightning callback."""


class AttributeDict(dict):
    """Stands for Lightning's hyperparameters."""


@pytest.mark.parametrize("is_zip", [True, False])
def test_states_of_the_training_do_not_matter(tmp_path, is_zip):
    params = parameters("no attention")
    weights = twins.random_taming("VQ", params)
    path = write(tmp_path, params, weights, TARGETS["VQ"])
    plain = load_official(path)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    contents = {
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict(), optimizer.state_dict()],
        "lr_schedulers": [{"last_lr": np.float64(1e-4)}],
        "hparams": AttributeDict(callback=ModelCheckpoint(), nested=AttributeDict(a=[1])),
        "state_dict": weights,
    }
    torch.save(contents, path, _use_new_zipfile_serialization=is_zip)
    loaded = load_official(path)
    assert torch.equal(plain(images(1)).sample, loaded(images(1)).sample)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())


@torch.no_grad()
@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
def test_stored_reference_numbers(fixture):
    """To 1e-5 of the deviation, as a root mean square: at single pixels, rounding puts the stored
    numbers 2e-5 from float64's.
    """
    numbers = {
        name: torch.from_numpy(np.asarray(value))
        for name, value in np.load(f"{fixture}.npz").items()
    }
    model = load_official(f"{fixture}.ckpt", grey=False)
    for precision, tolerance, error in (
        (torch.float32, 1e-5, rms),
        (torch.float64, 3e-5, deviation),
    ):
        model = model.to(precision)
        for suffix in ("", "_rect"):
            expected = {
                name: numbers[name + suffix] for name in ("x", "prequant", "indices", "zq", "rec")
            }
            latents = model.encode(expected["x"].to(precision)).latents
            codes, loss, (_, _, indices) = model.quantize(latents)
            assert error(latents, expected["prequant"]) < tolerance
            assert torch.equal(indices.reshape(expected["indices"].shape), expected["indices"])
            assert error(codes, expected["zq"]) < tolerance
            assert loss == pytest.approx(float(numbers["vq_loss" + suffix]), rel=1e-4)
            assert error(model.decode(latents).sample, expected["rec"]) < tolerance
            unquantised = model.decode(
                expected["prequant"].to(precision), force_not_quantize=True
            ).sample
            assert error(unquantised, numbers["rec_from_prequant_noquant" + suffix]) < tolerance


def test_reference_numbers_are_there():
    if not FOLDER.is_dir():
        pytest.skip(f"{FOLDER} is not here (EM_FIXTURES names the fixtures' folder)")
    assert FIXTURES


@torch.no_grad()
def test_command_writes_an_autoencoder_that_loads(tmp_path, case_files, monkeypatch, capsys):
    path, params, weights = case_files("attention on several levels")
    elsewhere = path.with_suffix(".yaml").rename(tmp_path / "other.yml")
    arguments = ["load_official", str(path), str(tmp_path / "out"), "--config", str(elsewhere)]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    printed = capsys.readouterr().out
    assert "left out: 2 tensors of the loss and discriminator" in printed
    assert "VQModel -> " in printed
    latents = encode(load_autoencoder(tmp_path / "out"), images(1))
    assert rms(latents, twins.taming_encode(weights, params, images(1))) < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"] == "VQModel"


@pytest.mark.parametrize(
    "place", ["model.yml", "config.yaml", "../configs/2021-04-03T19-39-50_x-project.yaml"]
)
def test_yaml_is_found_where_the_originals_put_it(tmp_path, place):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (tmp_path / "configs").mkdir()
    params = parameters("no attention")
    path = write(folder, params, twins.random_taming("VQ", params), TARGETS["VQ"])
    path.with_suffix(".yaml").rename(folder / place)
    assert load_official(path).config.num_vq_embeddings == 40
