"""StyleGAN2 discriminator: residual blocks, minibatch standard deviation, one logit (Karras et al. 2018 and 2020)."""

import math
from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from em_stylegan.em_stylegan2_generator import EqualizedConv2d, EqualizedLinear, MappingNetwork


def minibatch_standard_deviation(x, group_size):
    """Append one map that holds how much the images of a group differ (2018, section 3).

    x [B, C, H, W] -> [B, C + 1, H, W]. The batch is cut into B / G groups of G = min(group_size, B) images, image i being in group
    i mod (B / G); the map is the mean over C, H, W of the deviation over the group. ValueError when G does not divide B.
    """
    B, C, H, W = x.shape
    G = min(group_size, B)
    if B % G:
        raise ValueError(f"the batch ({B} images a process) must be a multiple of the discriminator's group of {G}.")
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(G, B // G, C, H, W)
    y = (y.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # [B / G]
    y = y.to(x.dtype).reshape(1, B // G, 1, 1, 1).expand(G, -1, 1, H, W).reshape(B, 1, H, W)
    return torch.cat([x, y], dim=1)


class DiscriminatorBlock(nn.Module):
    """Two 3 x 3 convolutions, the second halving the side, beside a halving 1 x 1 skip; both scaled by 1 / sqrt(2)."""

    def __init__(self, in_channels, out_channels, clamp=None):
        super().__init__()
        self.clamp = clamp
        self.conv0 = EqualizedConv2d(in_channels, in_channels, 3)
        self.conv1 = EqualizedConv2d(in_channels, out_channels, 3, down=True)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, down=True, bias=False, activation=False)

    def forward(self, x):
        y = self.skip(x, gain=math.sqrt(0.5))  # [B, out, R/2, R/2]
        x = self.conv0(x, clamp=self.clamp)  # [B, in, R, R]
        x = self.conv1(x, gain=math.sqrt(0.5), clamp=self.clamp)  # [B, out, R/2, R/2]
        return x + y


class StyleGANDiscriminator(ModelMixin, ConfigMixin):
    """Residual discriminator of StyleGAN2 and 3.

    forward(image [B, image_channels, R, R] in [-1, 1], class_labels=None, compute_dtype=None) -> logits [B, 1], float32 whenever
    the parameters are. `compute_dtype` is the type of the feature maps above 4 x 4. Large logits mean real. With classes, the
    logit is the projection of the features on the class's mapped vector (Miyato and Koyama 2018).

    Args:
        group_size: images in a minibatch-deviation group; it must divide the batch of a process.
        class_mapping_depth: layers of the class's mapping network.
        The others as in `StyleGAN2Generator`.
    """

    @register_to_config
    def __init__(
        self,
        resolution: int = 256,
        image_channels: int = 1,
        channel_base: int = 32768,
        max_channels: int = 512,
        group_size: int = 4,
        num_classes: int = 0,
        class_mapping_depth: int = 8,
        clamp: float | None = None,
    ):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution must be a power of two, at least 8; got {resolution}.")
        self.clamp = clamp
        self.group_size = group_size
        resolutions = [2**i for i in range(int(math.log2(resolution)), 1, -1)]  # R ... 4
        num_channels = [min(channel_base // r, max_channels) for r in resolutions]
        last = num_channels[-1]
        self.from_image = EqualizedConv2d(image_channels, num_channels[0], 1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(a, b, clamp) for a, b in pairwise(num_channels))
        self.conv = EqualizedConv2d(last + 1, last, 3)
        self.linear = EqualizedLinear(last * 16, last, activation=True)
        self.class_mapping = None
        if num_classes > 0:
            self.class_mapping = MappingNetwork(0, last, class_mapping_depth, num_classes, track_mean=False)
        self.out = EqualizedLinear(last, last if num_classes > 0 else 1)

    def forward(self, image, class_labels=None, compute_dtype=None):
        dtype = self.out.weight.dtype
        x = self.from_image(image.to(compute_dtype or dtype), clamp=self.clamp)
        x = x.contiguous(memory_format=torch.channels_last)  # [B, C, R, R]; one channel leaves the layout open
        for block in self.blocks:
            x = block(x)  # [B, C', R/2, R/2]
        x = minibatch_standard_deviation(x.to(dtype), self.group_size)  # [B, C + 1, 4, 4]
        x = self.conv(x, clamp=self.clamp)  # [B, C, 4, 4]
        x = self.out(self.linear(x.flatten(1)))  # [B, 1], or [B, C] with classes
        if self.class_mapping is None:
            return x
        w = self.class_mapping(None, class_labels)
        return (x * w).sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])  # [B, 1]
