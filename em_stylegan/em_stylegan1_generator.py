"""The StyleGAN generator of 2019 for grey or colour images, for comparison.

Written from "A Style-Based Generator Architecture for GANs" (Karras et al. 2019, figure 1b and
appendix C). Styles enter by adaptive instance normalisation. All resolutions are trained at once,
without progressive growing. The mapping is in em_style_mapping.py.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .em_style_mapping import NOISE_MODES, EqualizedLinear, MappingNetwork, StyleGenerator


def blur_kernel():
    """Return the separable filter [1, 2, 1] as a 3 x 3 kernel of sum 1 (2019, appendix C)."""
    taps = torch.tensor([1.0, 2.0, 1.0])
    return torch.outer(taps, taps) / 16


def blur(x, kernel):
    """Zero-pad x [B, C, H, W] and filter each channel with a 3 x 3 kernel."""
    num_channels = x.shape[1]
    return F.conv2d(
        x, kernel.to(x.dtype).expand(num_channels, 1, 3, 3), padding=1, groups=num_channels
    )


def adaptive_instance_norm(x, scale, shift):
    """Normalise every map of x [B, C, H, W], then scale and shift it (2019, equation 1).

    scale, shift [B, C]. The moments are merged with the style into one multiplication and one
    addition. Half precision is computed in float32, where a nearly constant map keeps its
    deviation.
    """
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)  # [B, C]
    scale = scale * (variance + 1e-8).rsqrt()
    shift = shift - mean * scale
    return (x * scale[:, :, None, None] + shift[:, :, None, None]).to(dtype)


class SynthesisLayer(nn.Module):
    """Convolution (doubling the side if `up`), noise, bias, leaky ReLU, style (2019, figure 1b).

    The first layer, with in_channels 0, has no convolution.
    """

    def __init__(self, in_channels, out_channels, w_dim, resolution, *, up=False):
        super().__init__()
        self.resolution = resolution
        self.up = up
        self.weight = None
        if in_channels > 0:
            self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
            self.weight_gain = math.sqrt(2 / (in_channels * 9))
        if up:
            self.register_buffer("kernel", blur_kernel(), persistent=False)
        self.style = EqualizedLinear(w_dim, 2 * out_channels)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))

    def forward(self, x, w, noise_mode, generator):
        if self.weight is not None:
            weight = (self.weight * self.weight_gain).to(x.dtype)
            if self.up:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = F.conv2d(x, weight, padding=1)  # [B, out, R, R]
            x = blur(x, self.kernel) if self.up else x
        strength = self.noise_strength[:, None, None]
        if noise_mode == "random":
            shape = (x.shape[0], 1, self.resolution, self.resolution)
            noise = randn_tensor(shape, generator=generator, device=x.device, dtype=strength.dtype)
            x = x + (noise * strength).to(x.dtype)
        elif noise_mode == "const":
            x = x + (self.noise_const * strength).to(x.dtype)
        x = F.leaky_relu(x + self.bias.to(x.dtype)[:, None, None], 0.2)
        scale, shift = self.style(w).chunk(2, dim=1)  # [B, out]
        return adaptive_instance_norm(x, scale + 1, shift)


class SynthesisNetwork(nn.Module):
    """w of every layer -> image.

    forward(ws [B, num_ws, w_dim], noise_mode="random" | "const" | "none", generator=None,
    compute_dtype=None) returns an image [B, image_channels, R, R], nominally in [-1, 1].
    """

    def __init__(self, w_dim, resolution, image_channels, channel_base, max_channels):
        super().__init__()
        resolutions = [2**i for i in range(2, int(math.log2(resolution)) + 1)]
        num_channels = [min(channel_base // r, max_channels) for r in resolutions]
        self.const = nn.Parameter(torch.ones(num_channels[0], 4, 4))
        layers = []
        for i, (r, c) in enumerate(zip(resolutions, num_channels, strict=True)):
            layers.append(SynthesisLayer(num_channels[i - 1] if i else 0, c, w_dim, r, up=i > 0))
            layers.append(SynthesisLayer(c, c, w_dim, r))
        self.layers = nn.ModuleList(layers)
        self.to_image = nn.Parameter(torch.randn(image_channels, num_channels[-1], 1, 1))
        self.to_image_bias = nn.Parameter(torch.zeros(image_channels))
        self.num_ws = len(layers)
        self.w_dim = w_dim

    def forward(self, ws, noise_mode="random", generator=None, compute_dtype=None):
        if noise_mode not in NOISE_MODES:
            raise ValueError(f"noise_mode is {noise_mode!r}; choose {', '.join(NOISE_MODES)}.")
        if ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws must be [B, {self.num_ws}, {self.w_dim}]; got {list(ws.shape)}.")
        if isinstance(generator, list | tuple) and len(generator) != len(ws):
            raise ValueError(
                f"{len(generator)} generators for {len(ws)} images; give one for each, or a single "
                "one."
            )
        x = self.const.to(compute_dtype or self.const.dtype).expand(len(ws), -1, -1, -1)
        x = x.contiguous(memory_format=torch.channels_last)  # [B, C, 4, 4]
        for layer, w in zip(self.layers, ws.unbind(dim=1), strict=True):
            x = layer(x, w, noise_mode, generator)  # [B, C', R', R']
        x = x.to(self.const.dtype)
        return F.conv2d(x, self.to_image / math.sqrt(self.to_image.shape[1]), self.to_image_bias)


class StyleGAN1Generator(StyleGenerator):
    """The generator of StyleGAN (Karras et al. 2019), with adaptive instance normalisation.

    Args as in `StyleGAN2Generator`.
    """

    @register_to_config
    def __init__(
        self,
        resolution: int = 256,
        image_channels: int = 1,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_depth: int = 8,
        channel_base: int = 16384,
        max_channels: int = 512,
        num_classes: int = 0,
        class_means: bool = False,
    ):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution is {resolution}; give a power of two of at least 8.")
        if channel_base < resolution:
            raise ValueError(f"channel_base is {channel_base}; give at least {resolution}.")
        self.mapping_network = MappingNetwork(
            z_dim, w_dim, mapping_depth, num_classes, class_means=class_means
        )
        self.synthesis_network = SynthesisNetwork(
            w_dim, resolution, image_channels, channel_base, max_channels
        )

    @property
    def num_ws(self) -> int:
        """Number of style inputs: one for each layer."""
        return self.synthesis_network.num_ws

    def synthesis(
        self,
        ws: torch.Tensor,
        noise_mode: str = "random",
        generator: torch.Generator | list[torch.Generator] | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Turn ws [B, num_ws, w_dim] into images [B, image_channels, R, R] around [-1, 1]."""
        return self.synthesis_network(ws, noise_mode, generator, compute_dtype)
