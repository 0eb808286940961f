import os
import urllib.error

import pytest
import torch

from em_evaluation.efficientnet import load_efficientnet
from em_evaluation.perceptual import LPIPSDistance, PerceptualDistance

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)  # VGG16's convolutions
POSITIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def make_vgg16():
    """Random weights in torchvision's format, with a part that is not asked for."""
    generator = torch.Generator().manual_seed(0)
    weights, before = {"classifier.0.weight": torch.zeros(1)}, 3
    for position, width in zip(POSITIONS, WIDTHS):
        scale = (2 / (9 * before)) ** 0.5
        weights[f"features.{position}.weight"] = (
            torch.randn(width, before, 3, 3, generator=generator) * scale
        )
        weights[f"features.{position}.bias"] = torch.randn(width, generator=generator) * 0.1
        before = width
    return weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A torch hub's cache with random weights of VGG16."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(make_vgg16(), tmp_path / "checkpoints" / "vgg16-397923af.pth")
    return tmp_path


@pytest.fixture
def images():
    return torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_lpips_is_that_of_its_package(hub, images):
    import lpips

    ours = LPIPSDistance()
    with pytest.warns(UserWarning, match="pretrained|weights"):
        slow = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for name, parameter in slow.net.named_parameters():
        parameter.data.copy_(make_vgg16()[f"features.{name.split('.', 1)[1]}"])
    others = (
        images + 0.3 * torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    ).clamp(-1, 1)
    expected = slow(others.repeat(1, 3, 1, 1), images.repeat(1, 3, 1, 1)).mean()
    torch.testing.assert_close(ours(others, images), expected, rtol=1e-4, atol=1e-6)
    assert expected > 0.01
    assert ours(images, images) == 0
    assert not any(parameter.requires_grad for parameter in ours.train().parameters())
    assert not ours.training


def test_lpips_gradient_is_finite_where_no_feature_answers(hub):
    weights = make_vgg16()
    for name in weights:
        if name.endswith("bias"):
            weights[name] = torch.full_like(weights[name], -1.0)  # nothing passes the ReLUs
    torch.save(weights, hub / "checkpoints" / "vgg16-397923af.pth")
    image = torch.zeros(1, 1, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(LPIPSDistance()(image, torch.zeros(1, 1, 16, 16)), image)
    assert torch.isfinite(gradient).all()


def test_lpips_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fail(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(
        ValueError, match=r"no route to host.*put it at .*vgg16-397923af\.pth.*efficientnet-lite0"
    ):
        LPIPSDistance()


def test_lpips_executes_no_pickle(hub):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {hub}/ran",)

    torch.save({"features.0.weight": Malicious()}, hub / "checkpoints" / "vgg16-397923af.pth")
    with pytest.raises(ValueError, match="does not hold torchvision's weights"):
        LPIPSDistance()
    assert not (hub / "ran").exists()


def test_perceptual_distance_is_that_of_the_whole_network():
    """Folded norms and the summed stem against the network as shipped, fed three equal channels."""
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = PerceptualDistance(num_layers=2)
    network = load_efficientnet(fused=False)
    expected = []
    with torch.no_grad():
        x = (images.expand(-1, 3, -1, -1) * 127.5 + 127.5 - 127) / 128
        x = network._swish(network._bn0(network._conv_stem(x)))
        for i, block in enumerate(network._blocks[:3]):
            x = block(x)
            if i in (0, 2):
                expected.append(x / x.norm(dim=1, keepdim=True))
        for ours, slow in zip(distance.features(images), expected, strict=True):
            torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-4)


def test_perceptual_distance_is_zero_on_itself_and_grows_with_blur():
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = PerceptualDistance()
    blurred = [torch.nn.functional.avg_pool2d(images, k, 1, k // 2) for k in (1, 3, 5)]
    values = [distance(x, images).item() for x in blurred]
    assert values[0] == 0
    assert values[0] < values[1] < values[2] < 4
    assert not any(p.requires_grad for p in distance.train().parameters())
    assert not distance.training
