"""Discriminator of StyleGAN2 and 3 (Karras et al. 2018 and 2020)."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from em_stylegan.em_style_mapping import EqualizedLinear, MappingNetwork, encode_classes
from em_stylegan.em_stylegan2_generator import ARCHITECTURES, EqualizedConv2d, blur, blur_kernel


def minibatch_standard_deviation(x, group_size, num_maps=1, num_batches=1):
    """Append `num_maps` maps that say how much the images of a group differ (2018, section 3).

    Each batch of B images is split into B / G groups of G = min(group_size, B) images; image i is
    in group i mod (B / G). A map holds the deviation over the group, averaged over H, W and its
    share of the channels.

    Args:
        x: [N * B, C, H, W], `num_batches` = N batches one after the other.
        group_size: None for one group.

    Returns:
        [N * B, C + num_maps, H, W].

    Raises:
        ValueError: If N does not divide the images, G does not divide B, or `num_maps` not C.
    """
    num_images, C, H, W = x.shape
    if num_images % num_batches:
        raise ValueError(f"{num_images} images are not {num_batches} batches of the same size.")
    N, B = num_batches, num_images // num_batches
    G = B if group_size is None else min(group_size, B)
    if B % G:
        raise ValueError(
            f"The batch ({B} images per process) must be a multiple of the discriminator's group "
            f"of {G}."
        )
    if C % num_maps:
        raise ValueError(f"{C} channels cannot be divided among {num_maps} deviation maps.")
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y.reshape(N, G, B // G, num_maps, C // num_maps, H, W)
    # on the CPU this is three times as fast as y.var(dim=1, correction=0)
    variance = (y - y.mean(dim=1, keepdim=True)).square().mean(dim=1)
    deviation = (variance + 1e-8).sqrt().mean(dim=(3, 4, 5)).to(x.dtype)  # [N, B / G, num_maps]
    maps = deviation[:, None, :, :, None, None].expand(-1, G, -1, -1, H, W)
    return torch.cat([x, maps.reshape(num_images, num_maps, H, W)], dim=1)


class DiscriminatorBlock(nn.Module):
    """Two 3 x 3 convolutions, of which the second halves the side (2020, figure 7).

    "orig": Nothing else. "resnet": A halving 1 x 1 convolution of the input is added, both scaled
    by 1 / sqrt(2). "skip": The image of this resolution is added to the input, and is halved for
    the next block.
    """

    def __init__(
        self, in_channels, out_channels, clamp=None, *, architecture="resnet", image_channels=None
    ):
        super().__init__()
        self.clamp = clamp
        self.from_image = (
            None if image_channels is None else EqualizedConv2d(image_channels, in_channels, 1)
        )
        self.conv0 = EqualizedConv2d(in_channels, in_channels, 3)
        self.conv1 = EqualizedConv2d(in_channels, out_channels, 3, down=True)
        self.skip = None
        if architecture == "resnet":
            self.skip = EqualizedConv2d(
                in_channels, out_channels, 1, down=True, bias=False, activation=False
            )

    def forward(self, x, image):
        if self.from_image is not None:
            y = self.from_image(image, clamp=self.clamp)  # [B, in, R, R]
            x = y if x is None else x + y
        if self.skip is None:
            x = self.conv0(x, clamp=self.clamp)  # [B, in, R, R]
            return self.conv1(x, clamp=self.clamp)  # [B, out, R/2, R/2]
        y = self.skip(x, gain=math.sqrt(0.5))  # [B, out, R/2, R/2]
        x = self.conv0(x, clamp=self.clamp)  # [B, in, R, R]
        x = self.conv1(x, gain=math.sqrt(0.5), clamp=self.clamp)  # [B, out, R/2, R/2]
        return y + x


class StyleGANDiscriminator(ModelMixin, ConfigMixin):
    """Discriminator of StyleGAN2 and 3.

    forward(image [B, image_channels, R, R] in [-1, 1], class_labels=None, compute_dtype=None,
    num_batches=1) returns logits [B, 1]; a large logit means real. `compute_dtype` is the dtype of
    the feature maps above 4 x 4. With classes, the logit is the projection of the features on the
    class's mapped vector (Miyato and Koyama 2018). `num_batches` batches of one size, one after the
    other, are judged in one pass as if each came alone. With `unconditional_output`, the logits
    are [B, 2]: of the image alone, then of the image as one of its class (Shahbazi et al. 2022).

    Args:
        architecture: "resnet", "orig" or "skip" (2020, figure 7); see `DiscriminatorBlock`.
        group_size: Images in a group of the minibatch deviation; must divide a process's batch.
            None for the whole batch.
        num_deviation_maps: 0 for no minibatch deviation.
        class_mapping_depth, class_mapping_width: Layers and width of the class's mapping network;
            width None for the number of the last feature maps.
        num_reduced_resolutions: How many of the highest resolutions `compute_dtype` applies to;
            None for all above 4 x 4.
        image_mean, image_std: The layers see (image - image_mean) / image_std.

        unconditional_output: Judge the image alone, too; only with classes.

    The others as in `StyleGAN2Generator`.
    """

    @register_to_config
    def __init__(
        self,
        resolution: int = 256,
        image_channels: int = 1,
        channel_base: int = 32768,
        max_channels: int = 512,
        group_size: int | None = 4,
        num_classes: int = 0,
        class_mapping_depth: int = 8,
        clamp: float | None = None,
        architecture: str = "resnet",
        num_deviation_maps: int = 1,
        class_mapping_width: int | None = None,
        num_reduced_resolutions: int | None = None,
        image_mean: float = 0.0,
        image_std: float = 1.0,
        unconditional_output: bool = False,
    ):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution is {resolution}; give a power of two of at least 8.")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f'architecture is "{architecture}"; choose {", ".join(ARCHITECTURES)}.'
            )
        self.clamp = clamp
        self.group_size = group_size
        self.num_deviation_maps = num_deviation_maps
        self.image_mean, self.image_std = image_mean, image_std
        resolutions = [2**i for i in range(int(math.log2(resolution)), 1, -1)]  # R ... 4
        num_channels = [min(channel_base // r, max_channels) for r in resolutions]
        last = num_channels[-1]
        self.num_reduced = (
            len(resolutions) if num_reduced_resolutions is None else num_reduced_resolutions
        )
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(
                a,
                b,
                clamp,
                architecture=architecture,
                image_channels=image_channels if i == 0 or architecture == "skip" else None,
            )
            for i, (a, b) in enumerate(pairwise(num_channels))
        )
        self.from_image = None
        if architecture == "skip":
            self.from_image = EqualizedConv2d(image_channels, last, 1)
            self.register_buffer("kernel", blur_kernel(), persistent=False)
        self.conv = EqualizedConv2d(last + num_deviation_maps, last, 3)
        self.linear = EqualizedLinear(last * 16, last, activation=True)
        self.class_mapping = None
        width = class_mapping_width or last
        if num_classes > 0:
            self.class_mapping = MappingNetwork(
                0, width, class_mapping_depth, num_classes, track_mean=False
            )
        self.out = EqualizedLinear(last, width if num_classes > 0 else 1)
        judges_both = num_classes > 0 and unconditional_output
        self.out_unconditional = EqualizedLinear(last, 1) if judges_both else None

    def freezable_layers(self) -> Iterator[nn.Module]:
        """Yield the layers from the image on, in the order of Freeze-D (Mo et al. 2020)."""
        for block in self.blocks:
            assert isinstance(block, DiscriminatorBlock)
            layers = (block.from_image, block.conv0, block.conv1, block.skip)
            yield from (layer for layer in layers if layer is not None)

    def forward(
        self,
        image: torch.Tensor,
        class_labels: torch.Tensor | list[int] | int | None = None,
        compute_dtype: torch.dtype | None = None,
        num_batches: int = 1,
    ) -> torch.Tensor:
        dtype = self.out.weight.dtype
        expected = (self.config.image_channels, self.config.resolution, self.config.resolution)
        if image.shape[1:] != expected:
            raise ValueError(f"image must be {['B', *expected]}; got {list(image.shape)}.")
        if self.class_mapping is None:
            encode_classes(class_labels, 0, len(image), image)  # raises if there are any
        if (self.image_mean, self.image_std) != (0, 1):
            image = (image - self.image_mean) / self.image_std
        x: torch.Tensor | None = None
        for i, block in enumerate(self.blocks):
            block_dtype = compute_dtype or dtype if i < self.num_reduced else dtype
            x = x if x is None else x.to(block_dtype)
            x = block(x, image.to(block_dtype))  # [B, C', R/2, R/2]
            if self.from_image is not None:  # [B, image_channels, R/2, R/2]
                image = blur(image, self.kernel, padding=1, stride=2)
        assert x is not None  # there are blocks
        x = x.to(dtype)
        if self.from_image is not None:
            x = x + self.from_image(image.to(dtype))  # [B, C, 4, 4]
        if self.num_deviation_maps:
            maps = self.num_deviation_maps  # -> [B, C + maps, 4, 4]
            x = minibatch_standard_deviation(x, self.group_size, maps, num_batches)
        x = self.conv(x, clamp=self.clamp)  # [B, C, 4, 4]
        features = self.linear(x.flatten(1))  # [B, C]
        x = self.out(features)  # [B, 1], or [B, width] with classes
        if self.class_mapping is None:
            return x
        w = self.class_mapping(None, class_labels, len(x))
        x = (x * w).sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])  # [B, 1]
        if self.out_unconditional is None:
            return x
        return torch.cat([self.out_unconditional(features), x], dim=1)  # [B, 2]
