"""What the generators of all StyleGANs share: the mapping from z to w, and how they are called.

Written from "A Style-Based Generator Architecture for GANs" (Karras et al. 2019).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from em_training.em_saved_model import OwnLayers

NOISE_MODES = ("random", "const", "none")


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


def normalize_second_moment(x):
    """Scale each row of x [B, D] to a mean square of one."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


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


@dataclass
class GeneratorOutput(BaseOutput):
    """Output of a generator: `sample`, images [B, image_channels, R, R]."""

    sample: torch.Tensor


class StyleGenerator(OwnLayers, ModelMixin, ConfigMixin):
    """A generator: a mapping network, then a synthesis network; the base of all StyleGANs'."""

    mapping_network: MappingNetwork

    @property
    def num_ws(self) -> int:
        """Number of style inputs of the synthesis network."""
        raise NotImplementedError

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
    ) -> torch.Tensor:
        """Turn ws [B, num_ws, w_dim] into images [B, image_channels, R, R] around [-1, 1]."""
        raise NotImplementedError

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
