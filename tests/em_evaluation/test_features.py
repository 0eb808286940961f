"""Extractors against their packages, their weights over a real connection, and a cache that never
mixes.
"""

import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from em_evaluation import inception
from em_evaluation.feature_cache import compute_features
from em_evaluation.features import EfficientNetLite0, Extractor, get_extractor
from em_evaluation.inception import find_weights, fuse_inception
from support.file_server import FileServer


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 1, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Moments(Extractor):
    """A tiny extractor that counts the images that it sees."""

    name, num_features = "moments", 2

    def __init__(self, identity="moments"):
        super().__init__()
        self.identity, self.num_seen = identity, 0

    def _features(self, images):
        self.num_seen += len(images)
        return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)


def test_folded_efficientnet_equals_the_packages_own(images):
    fast, slow = (EfficientNetLite0(64, fused=fused)(images) for fused in (True, False))
    assert fast.shape == (6, 1280)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    assert slow.std(0).mean() > 1e-2  # the images differ


def test_efficientnet_preprocessing_is_that_of_its_weights(images):
    """One image by hand: bicubic resize, three equal channels, (grey level - 127) / 128,
    pooling.
    """
    extractor = EfficientNetLite0(64, fused=False)
    resized = nn.functional.interpolate(images[:1], size=64, mode="bicubic", antialias=True).clamp(
        -1, 1
    )
    levels = resized.add(1).mul(127.5)  # 0..255
    colour = levels.sub(127).div(128).repeat(1, 3, 1, 1)
    with torch.no_grad():
        network = extractor.network
        expected = network._avg_pooling(network.extract_features(colour)).flatten(1)
    torch.testing.assert_close(extractor(images[:1]), expected, rtol=1e-5, atol=1e-5)


def test_features_do_not_depend_on_the_batch(images):
    extractor = EfficientNetLite0(64)
    whole = compute_features(images, extractor, batch_size=6, use_cache=False)
    parts = compute_features(images.flip(0), extractor, batch_size=1, use_cache=False)[::-1]
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-4)


def test_identity_says_everything_that_decides_the_features():
    identities = {
        get_extractor(**options).identity
        for options in ({}, {"input_px": 96}, {"dtype": torch.bfloat16})
    }
    assert len(identities) == 3
    assert get_extractor(resolution=64).identity == get_extractor(input_px=128).identity
    assert get_extractor(resolution=256).identity == get_extractor(input_px=224).identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vgg"}, "must be efficientnet-lite0, inception, dinov2, clip"),
        ({"resize_mode": "clean"}, "belongs to inception"),
        ({"input_px": 100}, "multiple of 32"),
        ({"name": "inception", "input_px": 128}, "belongs to efficientnet"),
        ({"name": "inception", "resize_mode": "tensorflow"}, "clean, legacy_pytorch"),
        (
            {"name": "inception", "weights": "absent.pt"},
            "is not a file. Give a local copy of https://",
        ),
    ],
)
def test_wrong_options_are_refused_with_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        get_extractor(**options)


def test_colour_images_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
        Moments()(torch.zeros(2, 3, 8, 8))


# ---------------------------------------------------------------- cache


def test_cache_knows_content_and_extractor_and_no_name(images, tmp_path):
    def compute(images, identity):
        extractor = Moments(identity)
        return compute_features(images, extractor, cache_dir=tmp_path), extractor.num_seen

    first, seen = compute(images, "a")
    assert seen == 6
    again, seen = compute(images.clone(), "a")
    assert seen == 0
    np.testing.assert_array_equal(again, first)
    changed = images.clone()
    changed[5, 0, 39, 39] += 1e-6
    for other, identity in (
        (changed, "a"),
        (images, "b"),
        (images[:5], "a"),
        (images.flip(0), "a"),
    ):
        assert compute(other, identity)[1] == len(other)
    assert compute(images.reshape(6, 1, 20, 80), "a")[1] == 6  # the same values in another shape


def test_damaged_cache_file_is_computed_again(images, tmp_path):
    expected = compute_features(images, Moments(), cache_dir=tmp_path)
    (path,) = (tmp_path / "features").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(compute_features(images, Moments(), cache_dir=tmp_path), expected)
    np.testing.assert_array_equal(np.load(path), expected)
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_several_processes_share_the_images_and_find_what_one_finds(tmp_path):
    """Shares of unequal size and one process without any: features_in_processes.py under torchrun,
    against one process.
    """
    program = Path(__file__).with_name("features_in_processes.py")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(program),
        str(tmp_path),
    ]
    result = subprocess.run(
        torchrun, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for num in (7, 1):
        images = torch.rand(num, 1, 8, 8, generator=torch.Generator().manual_seed(num)) * 2 - 1
        alone = compute_features(images, Moments(), batch_size=2, use_cache=False)
        np.testing.assert_allclose(np.load(tmp_path / f"{num}.npy"), alone, rtol=1e-5, atol=1e-6)


def test_empty_and_non_finite_sets_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="no images"):
        compute_features(images[:0], Moments(), cache_dir=tmp_path)
    broken = images.clone()
    broken[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        compute_features(broken, Moments(), cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


# ---------------------------------------------------------------- inception


class StandIn(nn.Module):
    """Answers like the published TorchScript network: `layers` maps [B, 3, 299, 299] to 2048
    features.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(16), nn.Flatten(), nn.Linear(3 * 256, 2048)
        )

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def torchscript_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "stand-in.pt"
    torch.manual_seed(0)
    with inception.ignore_torchscript_deprecation():
        torch.jit.script(StandIn().eval()).save(str(path))
    return path


def test_clean_inception_equals_clean_fid_on_the_same_file(
    images, torchscript_file, tmp_path, monkeypatch
):
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    (tmp_path / "inception-2015-12-05.pt").write_bytes(torchscript_file.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clean-fid's own
        network = InceptionV3W(str(tmp_path), download=False)
        resizer = build_resizer("clean")
        levels = ((images + 1) * 127.5).round()
        resized = [
            resizer(image[0].numpy().astype(np.uint8)[:, :, None].repeat(3, 2)) for image in levels
        ]
    with torch.no_grad():
        expected = network(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="is a program that can write files"):
        get_extractor("inception", weights=torchscript_file)
    address, _ = inception.INCEPTION_WEIGHTS["clean"]
    known = (address, inception.sha256_of(torchscript_file))
    monkeypatch.setitem(inception.INCEPTION_WEIGHTS, "clean", known)
    found = get_extractor("inception", weights=torchscript_file)(levels / 127.5 - 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).mean() > 1e-3


def test_legacy_inception_loads_a_state_dict_and_resizes_as_pytorch_fid(
    images, tmp_path, monkeypatch
):
    from cleanfid import inception_pytorch

    class Tiny(nn.Module):
        def __init__(self, output_blocks, resize_input):
            super().__init__()
            self.linear = nn.Linear(3 * 64, 2048)
            self.linear.load_state_dict(
                inception_pytorch.load_state_dict_from_url("unused", progress=False)
            )
            assert (output_blocks, resize_input) == ([3], False)

        def forward(self, x):
            return [
                self.linear(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))[:, :, None, None]
            ]

    monkeypatch.setattr(inception_pytorch, "InceptionV3", Tiny)
    original = inception_pytorch.load_state_dict_from_url
    state = nn.Linear(3 * 64, 2048).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    found = inception.Inception("legacy_pytorch", tmp_path / "weights.pth", fused=False)(images)
    resized = nn.functional.interpolate(
        (images + 1) / 2, size=(299, 299), mode="bilinear", align_corners=False
    )
    pooled = nn.functional.adaptive_avg_pool2d(resized.repeat(1, 3, 1, 1), 8).flatten(1)
    torch.testing.assert_close(
        found, nn.functional.linear(pooled, state["weight"], state["bias"]), rtol=1e-4, atol=1e-4
    )
    assert inception_pytorch.load_state_dict_from_url is original


class Block(nn.Module):
    """A convolution as pytorch-fid has it: without bias, then batch norm, then ReLU."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return nn.functional.relu(self.bn(self.conv(x)))


def test_folded_inception_reads_one_channel_and_equals_three():
    torch.manual_seed(0)
    network = nn.Sequential(Block(3, 8), nn.MaxPool2d(2), nn.Sequential(Block(8, 6))).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            (
                module.running_mean.uniform_(-1, 1),
                module.running_var.uniform_(0.5, 2),
                module.weight.data.uniform_(0.5, 2),
            )
    images = torch.rand(3, 1, 20, 20) * 2 - 1
    with torch.no_grad():
        expected = network(images.repeat(1, 3, 1, 1))
        fuse_inception(network)
        torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with pytest.raises(ValueError, match="three channels, not 1"):
        fuse_inception(network)


# ---------------------------------------------------------------- download


FILE = "/inception.pt"


@pytest.fixture
def server(torchscript_file):
    with FileServer({FILE: torchscript_file.read_bytes()}) as server:
        yield server


def test_weights_are_downloaded_once_into_the_users_cache(server, images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = server.url + FILE, hashlib.sha256(server.files[FILE]).hexdigest()[:8]
    monkeypatch.setitem(inception.INCEPTION_WEIGHTS, "clean", source)
    first = get_extractor("inception")(images)
    assert torch.equal(get_extractor("inception")(images), first)
    assert len(server.asked) == 1
    folder = tmp_path / "em-synthesis" / "weights"
    assert (folder / "inception.pt").read_bytes() == server.files[FILE]
    assert not list(folder.glob("*.part"))


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    server.stop_after[FILE] = 1000
    with pytest.raises(ConnectionError, match=r"annot download http://127.*--weights"):
        find_weights(server.url + FILE, cache_dir=tmp_path)
    assert not (tmp_path / "weights" / "inception.pt").exists()
    assert find_weights(server.url + FILE, cache_dir=tmp_path).read_bytes() == server.files[FILE]
    assert server.asked == [(FILE, None), (FILE, "bytes=1000-")]


def test_a_file_that_changed_meanwhile_is_not_pieced_together(server, tmp_path):
    server.stop_after[FILE] = 1000
    with pytest.raises(ConnectionError):
        find_weights(server.url + FILE, cache_dir=tmp_path)
    server.files[FILE], server.etag = bytes(reversed(server.files[FILE])), '"2"'
    assert find_weights(server.url + FILE, cache_dir=tmp_path).read_bytes() == server.files[FILE]


def test_a_wrong_digest_leaves_no_file(server, tmp_path):
    with pytest.raises(ValueError, match="damaged or replaced"):
        find_weights(server.url + FILE, "0" * 64, cache_dir=tmp_path)
    assert not [path for path in (tmp_path / "weights").iterdir() if path.name[0] != "."]


def test_without_a_network_the_error_names_url_and_flag(server, tmp_path):
    server.close()
    with pytest.raises(ConnectionError, match=rf"{server.url}.*--weights.*efficientnet-lite0"):
        find_weights(server.url + FILE, cache_dir=tmp_path, log=lambda text: None)
