"""Extractors from transformers and timm, with tiny random networks made on the spot."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from em_evaluation import get_extractor
from em_evaluation.vision_models import CLIP, DINOV2, TransformersModel, digest_weights
from support import hub_server

ROOT = Path(__file__).parents[2]

MEAN, STD = [0.48, 0.45, 0.40], [0.26, 0.25, 0.27]


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 1, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


def save(network, folder, **processor):
    network.save_pretrained(folder)
    processor = {
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "do_normalize": True,
    } | processor
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    processor = {
        "size": {"shortest_edge": 32},
        "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28},
    }
    return save(Dinov2Model(config), tmp_path_factory.mktemp("dinov2"), **processor)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    part = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    config = CLIPConfig(
        text_config={**part, "vocab_size": 50},
        vision_config={**part, "image_size": 28, "patch_size": 14},
        projection_dim=16,
    )
    return save(CLIPModel(config), tmp_path_factory.mktemp("clip"), size={"shortest_edge": 28})


def prepare(images, side=28):
    """The preprocessing by hand: the whole tile resized, three equal channels, each normalised."""
    x = torch.nn.functional.interpolate(
        images, size=(side, side), mode="bicubic", antialias=True
    ).clamp(-1, 1)
    x = (x + 1) / 2
    return torch.cat([(x - mean) / std for mean, std in zip(MEAN, STD)], 1)


def test_dinov2_is_the_class_token_after_its_preprocessing(images, dinov2):
    from transformers import Dinov2Model

    extractor = get_extractor("dinov2", weights=dinov2)
    network = Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        expected = network(prepare(images)).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).mean() > 1e-3
    assert extractor.num_features == 32
    by_name = get_extractor(f"transformers:{dinov2}")
    torch.testing.assert_close(by_name(images[:2]), expected[:2], rtol=1e-4, atol=1e-4)
    assert str(dinov2.parent) not in extractor.identity + by_name.identity + by_name.name


def test_clip_is_the_embedding_of_length_one(images, clip):
    from transformers import CLIPModel

    extractor = get_extractor("clip", weights=clip)
    network = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        expected = network.visual_projection(network.vision_model(prepare(images)).pooler_output)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-4)
    assert extractor.unit_norm
    whole = get_extractor(f"transformers:{clip}")  # the vision tower, without the projection
    assert not whole.unit_norm
    assert whole.num_features == 32


ASK_THE_HUB = """
import json, sys
import torch
from em_evaluation import get_extractor
images, out = torch.load(sys.argv[1], weights_only=True), {}
for name in ("dinov2", "clip", "transformers:" + sys.argv[2]):
    extractor = get_extractor(name)
    out[name] = [extractor.identity, extractor(images).tolist()]
try:
    get_extractor("transformers:lab/absent")
except ConnectionError as error:
    out["absent"] = str(error)
print(json.dumps(out))
"""


@pytest.mark.slow  # a second interpreter
def test_what_the_hub_serves_is_what_the_folder_holds(images, dinov2, clip, tmp_path):
    """Both by their published names over a real connection, in a process with an empty cache."""
    torch.save(images, tmp_path / "images.pt")
    with hub_server.HubServer() as server:
        for name, folder in ((DINOV2, dinov2), (CLIP, clip)):
            repo = server.repos["models", name] = hub_server.Repo(private=False)
            large = hub_server.LARGE_SUFFIXES
            files = {
                path.name: server.store(path.read_bytes(), path.suffix in large)
                for path in folder.iterdir()
            }
            server.commit(repo, "main", "weights", files)
        environment = hub_server.make_environment(server, tmp_path / "hf", PYTHONPATH=str(ROOT))
        command = [sys.executable, "-c", ASK_THE_HUB, tmp_path / "images.pt", DINOV2]
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        served = [
            path
            for method, path, _ in server.requests
            if method == "GET" and "/lfs-storage/" in path
        ]
    answers = json.loads(result.stdout.splitlines()[-1])
    assert (
        len(served) == 2
    )  # each network's weights once: the third extractor found them in the cache
    for name, folder in (("dinov2", dinov2), ("clip", clip)):
        direct = get_extractor(name, weights=folder)
        identity, features = answers[name]
        assert identity == direct.identity
        torch.testing.assert_close(torch.tensor(features), direct(images), rtol=1e-5, atol=1e-6)
    assert answers[f"transformers:{DINOV2}"][1] == answers["dinov2"][1]
    assert "Cannot load lab/absent" in answers["absent"]


def to_pictures(images):
    levels = ((images + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(each[0].numpy()).convert("RGB") for each in levels]


def test_own_preprocessing_is_that_of_transformers(images, dinov2):
    """The checkpoint's image processor, which crops the centre of 28 x 28 from 32 x 32 pixels."""
    from transformers import AutoImageProcessor, Dinov2Model

    extractor = get_extractor("dinov2", weights=dinov2, resize_mode="own")
    pixels = AutoImageProcessor.from_pretrained(dinov2)(to_pictures(images), return_tensors="pt")
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2).eval()(**pixels).pooler_output
    torch.testing.assert_close(extractor(images), expected, rtol=1e-5, atol=1e-5)
    whole = get_extractor("dinov2", weights=dinov2)
    assert (whole(images) - expected).abs().max() > 1e-3  # not cropped
    assert extractor.identity != whole.identity
    assert str(dinov2.parent) not in extractor.identity
    with pytest.raises(ValueError, match='"clean" belongs to inception'):
        get_extractor("dinov2", weights=dinov2, resize_mode="clean")


def test_own_preprocessing_is_that_of_timm(images, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", pretrained=False, num_classes=0).eval()
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    extractor = get_extractor(f"timm:local-dir:{tmp_path}", resize_mode="own")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    with torch.no_grad():
        expected = network(torch.stack([transform(each) for each in to_pictures(images)]))
    torch.testing.assert_close(extractor(images), expected, rtol=1e-5, atol=1e-5)
    whole = get_extractor(f"timm:local-dir:{tmp_path}")
    assert extractor.identity != whole.identity
    assert not torch.allclose(whole(images), expected, rtol=1e-3)


def test_identity_knows_weights_configuration_and_dtype_and_no_folder(images, dinov2, tmp_path):
    from transformers import Dinov2Model

    network = Dinov2Model.from_pretrained(dinov2)
    identities = {get_extractor("dinov2", weights=dinov2).identity}
    same = tmp_path / "elsewhere"
    save(network, same, size=32, do_center_crop=True, crop_size=28)
    assert get_extractor("dinov2", weights=same).identity in identities
    identities.add(get_extractor("dinov2", weights=dinov2, dtype=torch.bfloat16).identity)
    for i, (name, change) in enumerate(
        [
            ("weights", lambda: network.layernorm.bias.data.add_(1e-3)),
            ("size", None),
            ("config", None),
        ]
    ):
        folder = tmp_path / name
        if change:
            change()
        if name == "config":
            network.config.layer_norm_eps *= 10
        save(network, folder, size=28 if name != "size" else 42)
        identities.add(get_extractor("dinov2", weights=folder).identity)
        assert len(identities) == 3 + i
    half = get_extractor("dinov2", weights=dinov2, dtype=torch.bfloat16)(images)
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, get_extractor("dinov2", weights=dinov2)(images), rtol=0.1, atol=0.1
    )


def test_a_random_pooler_is_not_measured_and_missing_weights_are_refused(images, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=28,
        patch_size=14,
    )
    classifier = ViTForImageClassification(config)
    save(classifier, tmp_path, size=28)
    extractor = TransformersModel(str(tmp_path))
    with torch.no_grad():
        expected = classifier.vit.eval()(prepare(images)).last_hidden_state.mean(1)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-4)
    assert "mean of the last" in extractor.identity
    half = ViTModel(ViTConfig.from_dict(config.to_dict() | {"num_hidden_layers": 1}))
    half.config.num_hidden_layers = 2
    save(half, tmp_path / "half", size=28)
    with pytest.raises(ValueError, match=r"lacks weights.*random ones would measure nothing"):
        TransformersModel(str(tmp_path / "half"))


def test_what_cannot_be_loaded_says_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match=r"Cannot load .*absent.*efficientnet-lite0"):
        get_extractor(f"transformers:{tmp_path / 'absent'}")
    with pytest.raises(
        ValueError, match="no such folder; give a local copy of the Hub's facebook/dinov2-base"
    ):
        get_extractor("dinov2", weights=tmp_path / "absent")
    with pytest.raises(ValueError, match="takes no --weights"):
        get_extractor("timm:resnet18", weights="w.pth")
    with pytest.raises(ValueError, match="reads its own size"):
        get_extractor("dinov2", input_px=128)


def test_digest_of_weights_sees_names_shapes_and_values():
    linear = torch.nn.Linear(2, 2)
    first = digest_weights(linear)
    assert digest_weights(torch.nn.Sequential(linear)) != first
    linear.bias.data[0] += 1e-6
    assert digest_weights(linear) != first
    assert np.shape(first) == ()


def test_a_timm_model_is_what_its_classifier_would_read(images, tmp_path):
    timm = pytest.importorskip(
        "timm", reason="timm is not installed: pip install em-synthesis[timm]"
    )
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", pretrained=False)
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    extractor = get_extractor(f"timm:local-dir:{tmp_path}")
    data = timm.data.resolve_model_data_config(network)
    x = torch.nn.functional.interpolate(
        images, size=data["input_size"][1:], mode=data["interpolation"], antialias=True
    )
    x = (x.clamp(-1, 1) + 1) / 2
    x = torch.cat([(x - mean) / std for mean, std in zip(data["mean"], data["std"])], 1)
    with torch.no_grad():
        expected = network.eval().forward_head(network.forward_features(x), pre_logits=True)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-3, atol=1e-4)
    assert extractor.num_features == 512
    assert str(tmp_path) not in extractor.identity
