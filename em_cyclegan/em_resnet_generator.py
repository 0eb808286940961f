"""The generator of CycleGAN for grey images: one file, which every saved pipeline contains."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

STRIDE = 4  # the sides of an image are multiples of it
MIN_SIDE = 8  # reflection needs two pixels at the lowest resolution
INIT_STD = 0.02


class EMResnetGenerator(ModelMixin, ConfigMixin):
    """Translates grey images of any size, one image at a time: nothing is shared in a batch.

    From Zhu et al. 2017, arXiv:1703.10593, section 4 and appendix 7.2: c7s1-64, d128, d256, n x
    R256, u128, u64, c7s1-1 with reflection padding, instance norm, ReLU and a final tanh.

    Args:
        base_channels: Feature maps at full resolution.
        num_blocks: Residual blocks at a quarter of the resolution. The paper has 6 for 128 x 128
            pixels and 9 for 256 x 256 and more.
        adds_input: The network computes what is added to the image, and begins near the identity;
            the tanh is left out. Not in the paper.
    """

    @register_to_config
    def __init__(self, base_channels: int = 64, num_blocks: int = 9, adds_input: bool = False):
        super().__init__()
        if base_channels < 1 or num_blocks < 1:
            raise ValueError(
                f"base_channels is {base_channels} and num_blocks {num_blocks}, but both must be "
                "at least 1."
            )
        wide = 4 * base_channels
        self.stem = ConvNorm(1, base_channels, kernel_size=7)
        self.down = nn.ModuleList(
            ConvNorm(width, 2 * width, stride=2) for width in (base_channels, 2 * base_channels)
        )
        self.blocks = nn.ModuleList(ResidualBlock(wide) for _ in range(num_blocks))
        self.up = nn.ModuleList(UpNorm(width) for width in (wide, wide // 2))
        self.to_image = nn.Conv2d(base_channels, 1, 7)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Translate images [B, 1, H, W] in [-1, 1]; H and W are multiples of 4, at least 8.

        Returns:
            Images of the same shape, in [-1, 1]; with `adds_input`, values may lie beyond.
        """
        features = self.encode(images)[-1]
        for layer in self.up:
            features = layer(features)
        output = self.to_image(F.pad(features, (3, 3, 3, 3), mode="reflect"))
        return images + output if self.config.adds_input else output.tanh()

    def encode(self, images: torch.Tensor, last_block: int | None = None) -> list[torch.Tensor]:
        """Return the images, the features after each step down, and those after each block.

        Args:
            last_block: Number of blocks to compute. Default: all.
        """
        features = self.stem(images)
        outputs = [images]
        for layer in [*self.down, *self.blocks[:last_block]]:
            features = layer(features)
            outputs.append(features)
        return outputs


class ConvNorm(nn.Module):
    """Reflection padding, convolution, instance norm, and ReLU unless the norm is the end."""

    def __init__(self, before, width, kernel_size=3, stride=1, activates=True):
        super().__init__()
        self.padding, self.activates = (kernel_size // 2,) * 4, activates
        self.conv = nn.Conv2d(before, width, kernel_size, stride=stride, bias=False)

    def forward(self, features):
        features = self.conv(F.pad(features, self.padding, mode="reflect"))
        features = F.instance_norm(features)
        return features.relu() if self.activates else features


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3 pixels, added to their input."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = ConvNorm(width, width), ConvNorm(width, width, activates=False)

    def forward(self, features):
        return features + self.second(self.first(features))


class UpNorm(nn.Module):
    """A transposed convolution to twice the resolution and half the feature maps."""

    def __init__(self, before):
        super().__init__()
        self.conv = nn.ConvTranspose2d(
            before, before // 2, 3, stride=2, padding=1, output_padding=1, bias=False
        )

    def forward(self, features):
        return F.instance_norm(self.conv(features)).relu()
