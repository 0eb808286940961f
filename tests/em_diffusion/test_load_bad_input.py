"""Wrong, damaged and malicious checkpoints: one clear sentence with the way out, and nothing of
them is run.
"""

import contextlib
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.original.load import load_official
from support import official_twins as twins

VQ_MODEL = "taming.models.vqgan.VQModel"
PARAMS = {
    "embed_dim": 4,
    "n_embed": 16,
    "lossconfig": {"target": "torch.nn.Identity"},
    "ddconfig": {
        "double_z": False,
        "z_channels": 4,
        "resolution": 16,
        "in_channels": 1,
        "out_ch": 1,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "dropout": 0.0,
    },
}


@pytest.fixture(scope="module")
def weights():
    return twins.random_taming("VQ", PARAMS)


def write_yaml(path, params=PARAMS, target=VQ_MODEL):
    path.write_text(yaml.safe_dump({"model": {"target": target, "params": params}}))


@pytest.fixture
def checkpoint(tmp_path, weights):
    """A right checkpoint and its yaml."""
    return twins.write_checkpoint(tmp_path, weights, VQ_MODEL, PARAMS)


def assert_refused(path, message, load=load_autoencoder, **options):
    """`ValueError` whose text names the file, is one paragraph, and matches."""
    with pytest.raises(ValueError, match=message) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_right_one_loads(checkpoint):
    assert load_autoencoder(checkpoint).config.num_vq_embeddings == 16


def test_missing_yaml(checkpoint):
    checkpoint.with_suffix(".yaml").unlink()
    assert_refused(
        checkpoint,
        r"model\.ckpt needs the yaml that describes its model.*put it there, or name it with "
        r"--config",
    )


def test_yaml_that_is_named_and_missing(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_autoencoder(checkpoint, config=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "describes no model"),
        ("- a\n- b\n", "describes no model"),
        ("data: {target: x}\n", "describes no model"),
        ("model: {target: 3, params: {}}\n", "has no `target`"),
        ("model: {target: taming.models.vqgan.VQModel, params: {}}\n", "ddconfig is missing"),
        (
            "model: {target: torchvision.models.ResNet, params: {}}\n",
            "is a torchvision.models.ResNet, and only these are known",
        ),
        ("model: [\n", "is not a yaml that can be read safely"),
        (
            "model: !!python/object/apply:os.system ['touch target']\n",
            "is not a yaml that can be read safely",
        ),
        ("\x00\x01", "is not a yaml"),
    ],
)
def test_yaml_of_something_else(checkpoint, text, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    checkpoint.with_suffix(".yaml").write_text(text)
    assert "model.yaml" in assert_refused(checkpoint, message)
    assert not Path("target").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ch": 64},
            r"is \[.*\] in .*model\.ckpt, and \[.*\] by the yaml: it is the yaml of another model",
        ),
        ({"ch_mult": [1, 2, 2]}, "it is damaged, or the yaml is that of another model"),
        ({"ch_mult": [2]}, "the yaml"),
        ({"num_res_blocks": 2}, "the yaml is that of another model"),
        ({"attn_resolutions": []}, "which the yaml does not explain"),
        ({"attn_resolutions": [16, 8]}, "the yaml is that of another model"),
        ({"in_channels": 3}, "the yaml of another model"),
        ({"z_channels": 3}, "the yaml of another model"),
        ({"double_z": True}, "double_z is True, which a VQModel cannot have"),
        ({"attn_type": "linear"}, "attention of the type 'linear'"),
        ({"use_linear_attn": True}, "attention of the type"),
        ({"give_pre_end": True}, "give_pre_end"),
        ({"ch": 33}, "cannot be built"),
        ({"ch": 0}, "ch is 0"),
        (
            {"ch": 2**20},
            "the yaml of another model",
        ),  # its second convolution alone would take 40 TB
        ({"ch": 10**9}, "ch is 1000000000"),
        ({"num_res_blocks": 10**5}, "num_res_blocks is 100000"),
        ({"ch_mult": []}, r"ch_mult is \[\]"),
        ({"ch_mult": "1, 2"}, "ch_mult is '1, 2'"),
        ({"resolution": None}, "resolution is missing"),
    ],
)
def test_yaml_of_another_model(checkpoint, changes, message):
    write_yaml(checkpoint.with_suffix(".yaml"), PARAMS | {"ddconfig": PARAMS["ddconfig"] | changes})
    assert_refused(checkpoint, message)


def test_yaml_of_another_kind(checkpoint):
    write_yaml(checkpoint.with_suffix(".yaml"), target="taming.models.vqgan.GumbelVQ")
    assert_refused(checkpoint, "the yaml is that of another model")
    network = PARAMS["ddconfig"] | {"double_z": True}
    write_yaml(
        checkpoint.with_suffix(".yaml"),
        PARAMS | {"ddconfig": network},
        "ldm.models.autoencoder.AutoencoderKL",
    )
    assert_refused(checkpoint, "the yaml")


def test_classifier(checkpoint):
    torch.save(
        torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Linear(4, 5)).state_dict(),
        checkpoint,
    )
    assert_refused(
        checkpoint,
        r"model\.ckpt is not the checkpoint of a VQ autoencoder: it holds 0\.weight, 0\.bias, "
        r"1\.weight and so on",
    )


@pytest.mark.parametrize(
    "contents",
    [{"epoch": 3}, [1, 2], {"state_dict": {}}, torch.ones(3), {"state_dict": {"a": "b"}}],
    ids=str,
)
def test_checkpoint_without_weights(checkpoint, contents):
    torch.save(contents, checkpoint)
    assert_refused(checkpoint, "holds no `state_dict` of tensors by name")


def test_tensor_that_is_none(checkpoint, weights):
    torch.save({"state_dict": weights | {"encoder.conv_in.weight": "text"}}, checkpoint)
    assert_refused(checkpoint, r"encoder\.conv_in\.weight in .* is no tensor")


def test_missing_and_unexpected_tensors(checkpoint, weights):
    some = dict(weights)
    del some["decoder.conv_out.bias"]
    torch.save({"state_dict": some}, checkpoint)
    assert_refused(checkpoint, r"has no decoder\.conv_out\.bias for a VQ autoencoder")
    torch.save({"state_dict": weights | {"encoder.extra.weight": torch.ones(1)}}, checkpoint)
    assert_refused(
        checkpoint, r"also holds encoder\.extra\.weight, which the yaml does not explain"
    )


def test_whole_module_that_is_not_dalle(checkpoint):
    torch.save(torch.nn.Linear(2, 3), checkpoint)
    assert_refused(checkpoint, "holds no `state_dict` of tensors by name")


def test_no_such_source(tmp_path):
    assert_refused(
        str(tmp_path / "none.ckpt"), "there is no file or folder .* and it is not a Hub id"
    )
    assert_refused(str(tmp_path), "there is no autoencoder in")
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "none.ckpt")


def test_folder_of_checkpoints_names_them(checkpoint):
    assert_refused(checkpoint.parent, r"holds original checkpoints; name one: .*model\.ckpt")


def test_damaged_config_and_missing_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"')
    assert_refused(tmp_path, r"config\.json is damaged")
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    assert_refused(tmp_path, "Weights must be safetensors|safetensors is damaged")
    torch.save(
        {"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.bin"
    )  # a pickle is not even looked at
    assert_refused(tmp_path, "Weights must be safetensors|safetensors is damaged")


class Command:
    """Pickles as the call of a command."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("place", ["alone", "as a tensor", "as a callback", "in encoder.pkl"])
@pytest.mark.parametrize("zipped", [True, False])
def test_command_is_not_run(checkpoint, weights, tmp_path, place, zipped):
    evil = Command(tmp_path / "target")
    contents = {
        "alone": evil,
        "as a tensor": {"state_dict": weights | {"encoder.conv_in.weight": evil}},
        "as a callback": {"state_dict": weights, "callbacks": [evil]},
        "in encoder.pkl": evil,
    }[place]
    path = tmp_path / "encoder.pkl" if place == "in encoder.pkl" else checkpoint
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    if place == "in encoder.pkl":
        torch.save({}, tmp_path / "decoder.pkl")
    assert_refused(
        path, r"it would call (posix|nt)\.system, which is no data \(nothing of it was run\)"
    )
    assert not (tmp_path / "target").exists()


def test_bare_malicious_pickle(checkpoint, tmp_path):
    checkpoint.write_bytes(pickle.dumps(Command(tmp_path / "target")))
    assert_refused(checkpoint, "was not written by torch.save")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_and_altered_files(checkpoint, weights, zipped):
    torch.save(
        {"state_dict": weights, "epoch": 1}, checkpoint, _use_new_zipfile_serialization=zipped
    )
    data = checkpoint.read_bytes()
    for length in (1, 100, len(data) // 3, len(data) - 10):
        checkpoint.write_bytes(data[:length])
        assert_refused(checkpoint, r"model\.ckpt")
    generator = random.Random(0)
    for _ in range(60):  # bytes of the pickle itself, where a change can mean anything
        altered = bytearray(data)
        altered[generator.randrange(min(len(data), 20000))] = generator.randrange(256)
        checkpoint.write_bytes(altered)
        with contextlib.suppress(ValueError):
            load_autoencoder(checkpoint)


def test_command_line_says_one_line(checkpoint, tmp_path):
    checkpoint.with_suffix(".yaml").unlink()
    command = [
        sys.executable,
        "-m",
        "em_diffusion.load_official",
        str(checkpoint),
        str(tmp_path / "out"),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONWARNINGS": "error::RuntimeWarning",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "needs the yaml that describes its model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
