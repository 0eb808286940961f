"""The StyleGAN generator of 2019 in one file, for grey or colour images, for comparison.

It needs only torch, numpy, diffusers and the standard library. Written from "A Style-Based
Generator Architecture for GANs" (Karras et al. 2019, figure 1b and appendix C). Styles enter by
adaptive instance normalisation. All resolutions are trained at once, without progressive growing.
"""

import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

NOISE_MODES = ("random", "const", "none")


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


# Copied from em_stylegan.em_stylegan2_generator.EqualizedLinear
class EqualizedLinear(nn.Module):
    """Linear layer with an equalised learning rate (ProGAN, Karras et al. 2018).

    The stored weights have unit variance. They are scaled by 1 / sqrt(fan in) when used.
    """

    def __init__(
        self, in_features, out_features, *, bias_init=0.0, lr_multiplier=1.0, activation=False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_multiplier))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier
        self.activation = activation

    def forward(self, x):
        x = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return F.leaky_relu(x, 0.2) * math.sqrt(2) if self.activation else x


# Copied from em_stylegan.em_stylegan2_generator.normalize_second_moment
def normalize_second_moment(x):
    """Scale each row of x [B, D] to a mean square of one."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


# Copied from em_stylegan.em_stylegan2_generator.encode_classes
def encode_classes(class_labels, num_classes, batch_size, like):
    """Return class labels as rows [B, num_classes] with the dtype and device of `like`.

    class_labels: Integers [B], one integer for all, or rows of weights [B, num_classes]. Raises
    `ValueError` if they are missing, out of range, or given to a network without classes.
    """
    labels = torch.as_tensor([] if class_labels is None else class_labels, device=like.device)
    if num_classes == 0:
        if labels.numel() > 0:
            raise ValueError("This network has no classes. Leave class_labels out.")
        return None
    if labels.ndim == 0:
        labels = labels.expand(batch_size)
    is_index = labels.ndim == 1 and labels.numel() > 0 and not labels.is_floating_point()
    if is_index and 0 <= labels.min() <= labels.max() < num_classes:
        labels = F.one_hot(labels.long(), num_classes)
    if labels.shape != (batch_size, num_classes):
        raise ValueError(
            f"This network has {num_classes} classes. Give class_labels as integers [{batch_size}] "
            f"from 0 to {num_classes - 1}, or as rows [{batch_size}, {num_classes}]; got "
            f"{class_labels}."
        )
    return labels.to(like.dtype)


# Copied from em_stylegan.em_stylegan2_generator.MappingNetwork
class MappingNetwork(nn.Module):
    """z (and class) -> w: normalisation, then `depth` layers with leaky ReLU (2019, section 3).

    The layers learn a hundred times more slowly than others. forward(z [B, z_dim],
    class_labels=None, batch_size=None, class_weight=1.0) returns w [B, w_dim]. If z_dim is 0 there
    is no z, and B is `batch_size`. `class_weight` scales the class's vector; at 0 all classes are
    one. `w_mean` is the running mean of w for truncation, and `class_w_means` that of each class,
    if `class_means` asks for it; only `update_w_mean` and `update_class_means` move them.
    """

    w_mean: torch.Tensor
    class_w_means: torch.Tensor

    def __init__(self, z_dim, w_dim, depth, num_classes=0, track_mean=True, class_means=False):
        super().__init__()
        self.num_classes = num_classes
        self.z_dim = z_dim
        self.class_means = class_means and num_classes > 0
        self.embed = EqualizedLinear(num_classes, w_dim) if num_classes > 0 else None
        num_features = [z_dim + (w_dim if num_classes > 0 else 0)] + [w_dim] * depth
        self.layers = nn.ModuleList(
            EqualizedLinear(a, b, lr_multiplier=0.01, activation=True)
            for a, b in pairwise(num_features)
        )
        if track_mean:
            self.register_buffer("w_mean", torch.zeros(w_dim))
        if self.class_means:
            self.register_buffer("class_w_means", torch.zeros(num_classes, w_dim))

    def forward(self, z, class_labels=None, batch_size=None, class_weight=1.0):
        like = self.layers[0].weight
        inputs = []
        if self.z_dim > 0:
            if z.ndim != 2 or z.shape[1] != self.z_dim:
                raise ValueError(f"z must be [B, {self.z_dim}]; got {list(z.shape)}.")
            inputs.append(normalize_second_moment(z.to(like.dtype)))
        classes = encode_classes(class_labels, self.num_classes, batch_size or len(z), like)
        if classes is not None:
            inputs.append(normalize_second_moment(self.embed(classes)) * class_weight)
        x = torch.cat(inputs, dim=1)
        for layer in self.layers:
            x = layer(x)
        return x  # [B, w_dim]

    def find_mean(self, class_labels, batch_size):
        """Return the mean of w that truncation keeps to: [w_dim], or [B, 1, w_dim] of classes."""
        if not self.class_means:
            return self.w_mean
        classes = encode_classes(class_labels, self.num_classes, batch_size, self.w_mean)
        return (classes @ self.class_w_means).unsqueeze(1)

    @torch.no_grad()
    def update_w_mean(self, w_batch_mean, decay=0.998):
        """Move the running mean towards the mean [w_dim] of a batch of w."""
        self.w_mean.lerp_(w_batch_mean.to(self.w_mean.dtype), 1 - decay)

    @torch.no_grad()
    def update_class_means(self, sums, counts, decay=0.998):
        """Move each class's mean towards that of its w in a batch, the further the more there are.

        sums [num_classes, w_dim] and counts [num_classes] are those of the batch.
        """
        counts = counts.to(self.class_w_means.dtype).unsqueeze(1)  # [K, 1]
        means = sums.to(self.class_w_means.dtype) / counts.clamp(min=1)
        self.class_w_means.lerp_(means, 1 - decay ** (counts / counts.mean()))


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


# Copied from em_stylegan.em_stylegan2_generator.GeneratorOutput
@dataclass
class GeneratorOutput(BaseOutput):
    """Output of a generator: `sample`, images [B, image_channels, R, R]."""

    sample: torch.Tensor


class StyleGAN1Generator(ModelMixin, ConfigMixin):
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

    # Copied from em_stylegan.em_stylegan2_generator.StyleGAN2Generator.mapping
    def mapping(
        self,
        z: torch.Tensor,
        class_labels: torch.Tensor | list[int] | int | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> torch.Tensor:
        """Map z [B, z_dim] to ws [B, num_ws, w_dim], truncated (2019, section 2 and appendix B).

        w' = mean + psi (w - mean) in the first `truncation_cutoff` layers, by default in all. The
        mean is that of all w, or with `class_means` that of the class.
        """
        w = self.mapping_network(z, class_labels)
        ws = w.unsqueeze(1).repeat(1, self.num_ws, 1)  # a copy: styles can be mixed in place
        if truncation_psi == 1.0:
            return ws
        mean = self.mapping_network.find_mean(class_labels, len(z))
        truncated = mean.lerp(ws, truncation_psi)
        if truncation_cutoff is None:
            return truncated
        return torch.cat([truncated[:, :truncation_cutoff], ws[:, truncation_cutoff:]], dim=1)

    def synthesis(
        self,
        ws: torch.Tensor,
        noise_mode: str = "random",
        generator: torch.Generator | list[torch.Generator] | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Turn ws [B, num_ws, w_dim] into images [B, image_channels, R, R] around [-1, 1]."""
        return self.synthesis_network(ws, noise_mode, generator, compute_dtype)

    # Copied from em_stylegan.em_stylegan2_generator.StyleGAN2Generator.forward
    def forward(
        self,
        z: torch.Tensor,
        class_labels: torch.Tensor | list[int] | int | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str = "random",
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool | None = None,
    ) -> torch.Tensor | GeneratorOutput | tuple[torch.Tensor]:
        """Turn z [B, z_dim] into images [B, image_channels, R, R], nominally in [-1, 1].

        Args:
            class_labels: Integers [B], for a conditional generator.
            truncation_psi, truncation_cutoff: See `mapping`.
            noise_mode: "random" (fresh noise), "const" (the stored noise) or "none".
            generator: A `torch.Generator` for fresh noise, or a list with one for each image.
            return_dict: As in diffusers, True returns a `GeneratorOutput` and False a tuple.
                Default: the images themselves.
        """
        ws = self.mapping(z, class_labels, truncation_psi, truncation_cutoff)
        images = self.synthesis(ws, noise_mode, generator)
        if return_dict is None:
            return images
        return GeneratorOutput(sample=images) if return_dict else (images,)

    # Copied from em_stylegan.em_stylegan2_generator.StyleGAN2Generator.save_pretrained
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs: Any,
    ) -> None:
        """Save as `ModelMixin.save_pretrained` does; weights are always safetensors."""
        if not safe_serialization:
            raise ValueError(
                "safe_serialization is False, but pickled weights can run code when they are "
                "loaded, and our models do not load them. Leave safe_serialization out."
            )
        super().save_pretrained(
            save_directory,
            is_main_process,
            save_function,
            variant=variant,
            max_shard_size=max_shard_size,
            **kwargs,
        )

    # Copied from em_stylegan.em_stylegan2_generator.StyleGAN2Generator.enable_layerwise_casting
    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """Raise `NotImplementedError`: diffusers casts layers of torch.nn only; there are none."""
        raise NotImplementedError(
            "Layerwise casting has no effect on this network, whose layers are its own. Use "
            "model.to(torch.bfloat16) to halve its memory."
        )
