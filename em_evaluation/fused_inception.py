"""pytorch-fid's Inception-v3, folded: batch norms, one grey channel, channels last."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ConvReLU(nn.Module):
    """A convolution with its batch norm folded in, and a ReLU in place."""

    def __init__(self, basic_conv):
        super().__init__()
        self.conv = fuse_conv_bn_eval(basic_conv.conv.eval(), basic_conv.bn.eval())

    def forward(self, x):
        return F.relu_(self.conv(x))


def fuse_inception(network) -> None:
    """Fold the batch norms in place, and let the first convolution read one channel [B, 1, H, W].

    Three equal channels through a convolution are one channel through the sum of its kernels.
    """
    _fuse_children(network)
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    if first.in_channels != 3:
        raise ValueError(f"the first convolution must read three channels, not {first.in_channels}")
    first.weight = nn.Parameter(first.weight.sum(1, keepdim=True), requires_grad=False)
    first.in_channels = 1


def _fuse_children(module):
    for name, child in module.named_children():
        if isinstance(getattr(child, "conv", None), nn.Conv2d) and isinstance(
            getattr(child, "bn", None), nn.BatchNorm2d
        ):
            setattr(module, name, ConvReLU(child))
        else:
            _fuse_children(child)


def resize_bilinear(images: torch.Tensor) -> torch.Tensor:
    """Resize images [B, 1, H, W] to 299 x 299 as pytorch-fid does, without anti-aliasing."""
    return F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
