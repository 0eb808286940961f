"""StyleGAN2 generator, for grey or colour images.

Written from "A Style-Based Generator Architecture for GANs" (Karras et al. 2019) and "Analyzing and
Improving the Image Quality of StyleGAN" (Karras et al. 2020). From leaf to root: filters, equalised
layers, modulated convolution, synthesis, `StyleGAN2Generator`. The mapping is in
em_style_mapping.py.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .em_style_mapping import NOISE_MODES, EqualizedLinear, MappingNetwork, StyleGenerator

ARCHITECTURES = ("skip", "orig", "resnet")


# ----------------------------------------------------------------------------------------- filters


def blur_kernel():
    """Return the separable filter [1, 3, 3, 1] as a 4 x 4 kernel of sum 1 (2020, section 2)."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / 64


def blur(x, kernel, *, padding, stride=1, gain=1.0):
    """Zero-pad and filter x [B, C, H, W] with a 4 x 4 kernel; keep every `stride`-th pixel."""
    num_channels = x.shape[1]
    weight = (kernel * gain).to(x.dtype).expand(num_channels, 1, 4, 4)
    return F.conv2d(x, weight, padding=padding, stride=stride, groups=num_channels)


def upsample(x, kernel):
    """Double the side of x [B, C, H, W]: insert zeros between pixels, filter with gain 4."""
    num_channels = x.shape[1]
    weight = (kernel * 4).to(x.dtype).expand(num_channels, 1, 4, 4)
    return F.conv_transpose2d(x, weight, stride=2, padding=1, groups=num_channels)


def pointwise_conv2d(x, weight, bias=None):
    """Convolve x [B, I, H, W] with a 1 x 1 kernel [O, I, 1, 1], as a matrix product per pixel.

    Channels-last maps, such as ours, are not copied. Libraries are slow for a single channel.
    """
    y = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias)  # [B, H, W, O]
    return y.permute(0, 3, 1, 2)  # [B, O, H, W]


# -------------------------------------------------------------------------------- equalised layers


class EqualizedConv2d(nn.Module):
    """Convolution with an equalised learning rate, then leaky ReLU.

    `down` halves the side (filter, then stride 2). `up`, for 1 x 1 kernels, doubles it
    (convolution, then filter). forward(x [B, in, H, W], gain=1.0, clamp=None) returns
    [B, out, H', W'] in the dtype of x.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        *,
        down=False,
        up=False,
        bias=True,
        activation=True,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.kernel_size = kernel_size
        self.down = down
        self.up = up
        self.activation = activation
        if down or up:
            self.register_buffer("kernel", blur_kernel(), persistent=False)

    def forward(self, x, gain=1.0, clamp=None):
        # leaky_relu(a x) = a leaky_relu(x) for a > 0: scale the weights, not the maps
        clamp = None if clamp is None else clamp * gain
        gain = gain * math.sqrt(2) if self.activation else gain
        weight = (self.weight * (self.weight_gain * gain)).to(x.dtype)
        bias = None if self.bias is None else (self.bias * gain).to(x.dtype)
        if self.up:
            x = upsample(pointwise_conv2d(x, weight, bias), self.kernel)  # [B, out, 2H, 2W]
        elif self.kernel_size == 1:
            x = blur(x, self.kernel, padding=1, stride=2) if self.down else x
            x = pointwise_conv2d(x, weight, bias)  # [B, out, H, W] or [B, out, H/2, W/2]
        elif self.down:
            x = blur(x, self.kernel, padding=2)
            x = F.conv2d(x, weight, bias, stride=2)  # [B, out, H/2, W/2]
        else:
            x = F.conv2d(x, weight, bias, padding=self.kernel_size // 2)  # [B, out, H, W]
        if self.activation:
            # pointwise_conv2d returns a view; changing it in place would cost copies in backward
            x = F.leaky_relu(x, 0.2, inplace=self.kernel_size > 1)
        return x if clamp is None else x.clamp(-clamp, clamp)


# --------------------------------------------------------------------------- modulated convolution


def demodulation(weight, styles):
    """Return 1 / norm of each output map's modulated weights, [B, O] (2020, equation 3).

    rsqrt(sum_i s_i^2 sum_kk w_oikk^2 + 1e-8) for weight [O, I, k, k] and styles [B, I].
    """
    return (F.linear(styles.square(), weight.square().sum(dim=(2, 3))) + 1e-8).rsqrt()


def modulated_conv2d(x, weight, styles, *, demodulate=True, kernel=None, gain=1.0):
    """Convolve x with weights that are scaled for each sample (2020, section 2.2).

    Convolution is linear, so (w s) * x = w * (s x), and demodulation multiplies whole output maps.
    Scaling the maps instead of the weights leaves one ordinary convolution for the batch.

    Args:
        x: [B, I, H, W]; weight: [O, I, k, k]; styles: [B, I].
        kernel: 4 x 4. If given, the side doubles: transposed convolution, then this filter.

    Returns:
        [B, O, H, W] or [B, O, 2H, 2W].
    """
    dtype = x.dtype
    if demodulate and dtype == torch.float16:
        # stay within its range; demodulation undoes the scales (ADA, 2020, appendix D.1)
        largest = weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
        weight = weight / largest / math.sqrt(weight[0].numel())
        styles = styles / styles.detach().abs().amax(dim=1, keepdim=True)
    if not demodulate and gain != 1:
        styles = styles * gain
    if kernel is None and weight.shape[2] == 1:
        return _modulated_pointwise_conv2d(x, weight, styles, demodulate, gain)
    x = x * styles.to(dtype)[:, :, None, None]  # [B, I, H, W]
    if kernel is None:
        x = F.conv2d(x, weight.to(dtype), padding=weight.shape[2] // 2)  # [B, O, H, W]
    else:
        x = F.conv_transpose2d(x, weight.to(dtype).transpose(0, 1), stride=2)  # [B, O, 2H+1, 2W+1]
        x = blur(x, kernel, padding=1, gain=4)  # [B, O, 2H, 2W]
    if demodulate:
        x = x * (demodulation(weight, styles) * gain).to(dtype)[:, :, None, None]
    return x


def _modulated_pointwise_conv2d(x, weight, styles, demodulate, gain):
    """The same for 1 x 1 kernels, where scaling the small weights saves passes over the maps."""
    weights = weight.flatten(1) * styles[:, None]  # [B, O, I]
    if demodulate:
        weights = weights * (demodulation(weight, styles) * gain)[:, :, None]
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, H W, I]
    y = pixels @ weights.to(x.dtype).transpose(1, 2)  # [B, H W, O]
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # [B, O, H, W]


# --------------------------------------------------------------------------------------- synthesis


class SynthesisLayer(nn.Module):
    """Modulated 3 x 3 convolution, noise, bias, leaky ReLU; `up` doubles the side (figure 2d)."""

    def __init__(self, in_channels, out_channels, w_dim, resolution, *, up=False, clamp=None):
        super().__init__()
        self.resolution = resolution
        self.up = up
        self.clamp = clamp
        self.style = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        if up:
            self.register_buffer("kernel", blur_kernel(), persistent=False)

    def forward(self, x, w, noise_mode, generator, gain=1.0):
        clamp = None if self.clamp is None else self.clamp * gain
        # leaky_relu(a x) = a leaky_relu(x): apply the gain to demodulation, noise and bias
        gain = gain * math.sqrt(2)
        styles = self.style(w)  # [B, in]
        kernel = self.kernel if self.up else None
        x = modulated_conv2d(x, self.weight, styles, kernel=kernel, gain=gain)  # [B, out, R, R]
        if noise_mode == "random":
            shape = (x.shape[0], 1, self.resolution, self.resolution)
            noise = randn_tensor(
                shape, generator=generator, device=x.device, dtype=self.noise_strength.dtype
            )
            x = x.add_((noise * (self.noise_strength * gain)).to(x.dtype))
        elif noise_mode == "const":
            x = x.add_((self.noise_const * (self.noise_strength * gain)).to(x.dtype))
        x = F.leaky_relu_(x.add_((self.bias * gain).to(x.dtype)[:, None, None]), 0.2)
        return x if clamp is None else x.clamp(-clamp, clamp)


class ToImage(nn.Module):
    """Modulated 1 x 1 convolution to image channels, without demodulation (2020, figure 7)."""

    def __init__(self, in_channels, image_channels, w_dim, clamp=None):
        super().__init__()
        self.clamp = clamp
        self.style = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(image_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(image_channels))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x, w):
        styles = self.style(w) * self.weight_gain  # [B, in]
        x = modulated_conv2d(x, self.weight, styles, demodulate=False)  # [B, image_channels, R, R]
        x = x + self.bias.to(x.dtype)[:, None, None]
        x = x if self.clamp is None else x.clamp(-self.clamp, self.clamp)
        return x.to(self.bias.dtype)


class SynthesisBlock(nn.Module):
    """One resolution: a doubling layer, a layer, and the image of this resolution (2020, figure 7).

    "skip": Each block adds an image to the doubled image of the block before. "orig": Only the last
    block makes an image. "resnet": The same, and a 1 x 1 convolution of the block's doubled input
    is added to its output, both scaled by 1 / sqrt(2). The first block has a learned constant
    instead of the doubling layer.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        w_dim,
        resolution,
        image_channels,
        architecture,
        is_last,
        clamp=None,
    ):
        super().__init__()
        self.first = in_channels == 0
        if self.first:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
            self.conv0 = None
        else:
            self.conv0 = SynthesisLayer(
                in_channels, out_channels, w_dim, resolution, up=True, clamp=clamp
            )
            self.register_buffer("kernel", blur_kernel(), persistent=False)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, clamp=clamp)
        self.to_image = self.skip = None
        if is_last or architecture == "skip":
            self.to_image = ToImage(out_channels, image_channels, w_dim, clamp=clamp)
        if not self.first and architecture == "resnet":
            self.skip = EqualizedConv2d(
                in_channels, out_channels, 1, up=True, bias=False, activation=False
            )
        self.num_convs = 1 if self.first else 2

    def forward(self, x, image, ws, noise_mode, generator, compute_dtype):
        ws = list(ws.unbind(dim=1))  # num_convs + 1 of [B, w_dim]
        gain = 1.0 if self.skip is None else math.sqrt(0.5)
        if self.first:
            x = self.const.to(compute_dtype).expand(ws[0].shape[0], -1, -1, -1)
            x = x.contiguous(memory_format=torch.channels_last)  # [B, C, 4, 4]
        else:
            x = x.to(compute_dtype)
            y = None if self.skip is None else self.skip(x, gain=gain)  # [B, C, R, R]
            x = self.conv0(x, ws.pop(0), noise_mode, generator)  # [B, C, R, R]
        x = self.conv1(x, ws.pop(0), noise_mode, generator, gain)  # [B, C, R, R]
        if self.skip is not None:
            x = x + y
        if image is not None:
            image = upsample(image, self.kernel)  # [B, image_channels, R, R]
        if self.to_image is not None:
            own = self.to_image(x, ws.pop(0))  # [B, image_channels, R, R]
            image = own if image is None else image + own
        return x, image


class SynthesisNetwork(nn.Module):
    """w of every layer -> image.

    forward(ws [B, num_ws, w_dim], noise_mode="random" | "const" | "none", generator=None,
    compute_dtype=None) returns an image [B, image_channels, R, R], nominally in [-1, 1].
    `compute_dtype`, for example torch.bfloat16, is the dtype of the feature maps of the highest
    `num_reduced_resolutions` (None: all). Styles, demodulation and the sum of images keep the dtype
    of the parameters.
    """

    def __init__(
        self,
        w_dim,
        resolution,
        image_channels,
        channel_base,
        max_channels,
        architecture,
        clamp=None,
        num_reduced_resolutions=None,
    ):
        super().__init__()
        resolutions = [2**i for i in range(2, int(math.log2(resolution)) + 1)]
        num_channels = [min(channel_base // r, max_channels) for r in resolutions]
        self.blocks = nn.ModuleList(
            SynthesisBlock(a, b, w_dim, r, image_channels, architecture, r == resolution, clamp)
            for a, b, r in zip([0] + num_channels[:-1], num_channels, resolutions, strict=True)
        )
        self.w_dim = w_dim
        # a block's image shares its w with the next block
        self.num_ws = sum(block.num_convs for block in self.blocks) + 1
        reduced = len(resolutions) if num_reduced_resolutions is None else num_reduced_resolutions
        self.num_full_resolutions = max(len(resolutions) - reduced, 0)

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
        dtype = self.blocks[0].const.dtype
        x = image = None
        index = 0
        for i, block in enumerate(self.blocks):
            block_ws = ws[:, index : index + block.num_convs + 1]
            block_dtype = dtype if i < self.num_full_resolutions else compute_dtype or dtype
            x, image = block(x, image, block_ws, noise_mode, generator, block_dtype)
            index += block.num_convs
        return image


class StyleGAN2Generator(StyleGenerator):
    """StyleGAN2 generator (Karras et al. 2020).

    Args:
        resolution: Side of the image in pixels, a power of two, at least 8.
        image_channels: 1 for micrographs.
        z_dim, w_dim: Width of the latent and of the intermediate latent.
        mapping_depth: Layers of the mapping network.
        channel_base, max_channels: There are min(channel_base // r, max_channels) feature maps at
            resolution r.
        num_classes: 0 for an unconditional generator.
        class_means: Truncate towards the mean w of the class instead of that of all classes.
        clamp: Bound on the feature maps, or None. Official checkpoints trained in half precision
            have 256.
        architecture: "skip", "orig" or "resnet" (2020, figure 7); see `SynthesisBlock`.
        num_reduced_resolutions: How many of the highest resolutions `compute_dtype` applies to;
            None for all.
        image_mean, image_std: The image is image_mean + image_std times what the layers draw, so
            that they draw images of mean 0 and deviation 1, for which they are initialised.
        noise_strength: Strength of all noise inputs before training. At 0, where the paper's
            begins, the expected gradient of a strength is zero, since the noise is symmetric.
        reduction: The layers draw images of side resolution / reduction. They are enlarged, and
            grain is added: the noise of the training images that so small images lack. Its
            spectrum and strength are measured, not learned (`em_stylegan.grain`).
    """

    @register_to_config
    def __init__(
        self,
        resolution: int = 256,
        image_channels: int = 1,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_depth: int = 4,
        channel_base: int = 32768,
        max_channels: int = 512,
        num_classes: int = 0,
        clamp: float | None = None,
        architecture: str = "skip",
        num_reduced_resolutions: int | None = None,
        image_mean: float = 0.0,
        image_std: float = 1.0,
        noise_strength: float = 0.0,
        reduction: int = 1,
        class_means: bool = False,
    ):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f'architecture is "{architecture}"; choose {", ".join(ARCHITECTURES)}.'
            )
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution is {resolution}; give a power of two of at least 8.")
        if reduction not in (1, 2, 4) or resolution // reduction < 8:
            raise ValueError(f"reduction is {reduction}; give 1, 2 or 4, for layers of at least 8.")
        if channel_base < resolution // reduction:
            raise ValueError(
                f"channel_base is {channel_base}; give at least {resolution // reduction}."
            )
        self.mapping_network = MappingNetwork(
            z_dim, w_dim, mapping_depth, num_classes, class_means=class_means
        )
        self.synthesis_network = SynthesisNetwork(
            w_dim,
            resolution // reduction,
            image_channels,
            channel_base,
            max_channels,
            architecture,
            clamp,
            num_reduced_resolutions,
        )
        self.image_mean, self.image_std, self.reduction = image_mean, image_std, reduction
        if reduction > 1:
            self.register_buffer("grain_amplitude", torch.zeros(resolution, resolution // 2 + 1))
            self.register_buffer("grain_strength", torch.zeros(2))  # mean, deviation of its log
            self.register_buffer("grain_const", torch.randn(resolution, resolution))
        for layer in self.modules():
            if isinstance(layer, SynthesisLayer):
                nn.init.constant_(layer.noise_strength, noise_strength)

    @property
    def num_ws(self) -> int:
        """Number of style inputs: one for each convolution and one for the last image layer."""
        return self.synthesis_network.num_ws

    def synthesis(
        self,
        ws: torch.Tensor,
        noise_mode: str = "random",
        generator: torch.Generator | list[torch.Generator] | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Turn ws [B, num_ws, w_dim] into images [B, image_channels, R, R] around [-1, 1]."""
        images = self.draw(ws, noise_mode, generator, compute_dtype)
        return self.finish(images, noise_mode, generator)

    def draw(
        self,
        ws: torch.Tensor,
        noise_mode: str = "random",
        generator: torch.Generator | list[torch.Generator] | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Do the same without enlargement and grain: [B, image_channels, r, r]."""
        return self.scale(self.synthesis_network(ws, noise_mode, generator, compute_dtype))

    def scale(self, images: torch.Tensor) -> torch.Tensor:
        """Give what the layers draw the mean and deviation of images."""
        if (self.image_mean, self.image_std) == (0, 1):
            return images
        return images * self.image_std + self.image_mean

    def finish(
        self,
        images: torch.Tensor,
        noise_mode: str,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Enlarge images and add grain; its strength varies log-normally from image to image."""
        if self.reduction == 1:
            return images
        images = F.interpolate(images, scale_factor=self.reduction, mode="bicubic")
        if noise_mode == "none":
            return images
        noise, strength = self.grain_const.float(), self.grain_strength[0].float()
        if noise_mode == "random":
            options = {"generator": generator, "device": images.device, "dtype": torch.float32}
            noise = randn_tensor((len(images), 1, *noise.shape), **options)
            normal = randn_tensor((len(images), 1, 1, 1), **options)
            strength = strength + normal * self.grain_strength[1].float()
        spectrum = torch.fft.rfft2(noise) * self.grain_amplitude.float()
        grain = torch.fft.irfft2(spectrum, s=noise.shape[-2:])
        return images + (grain * strength.exp()).to(images.dtype)
