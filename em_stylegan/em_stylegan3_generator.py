"""StyleGAN3 generator (T and R), for grey or colour images.

Written from "Alias-Free Generative Adversarial Networks" (Karras et al. 2021) and "A Style-Based
Generator Architecture for GANs" (Karras et al. 2019). From leaf to root: filter design, filtered
leaky ReLU, modulated convolution, Fourier features, synthesis, `StyleGAN3Generator`. The mapping is
in em_style_mapping.py.

The signal is a continuous function on a canvas of width 1 with `sampling_rate` samples along it.
Frequencies are in cycles per canvas.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from .em_style_mapping import NOISE_MODES, EqualizedLinear, MappingNetwork, StyleGenerator

SQRT_2 = math.sqrt(2)
# Up to this side in pixels, filters run as matrix products, beyond it as convolutions. On the CPU
# the two were measured to be equally fast there; for a GPU it is a count of operations, unmeasured.
DENSE_SIZE, DENSE_SIZE_CPU = 320, 128
MAX_PIXELS = 2**24  # of one canvas: 4096 x 4096


# ----------------------------------------------------------------------------------- filter design


def kaiser_beta(num_taps, width, sampling_rate):
    """Return Kaiser's beta for `num_taps` and a transition band `width` (2021, equation 17)."""
    attenuation = 2.285 * (num_taps - 1) * math.pi * width / (sampling_rate / 2) + 7.95  # dB
    if attenuation > 50:
        return 0.1102 * (attenuation - 8.7)
    if attenuation > 21:
        return 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    return 0.0


def design_filter(num_taps, cutoff, width, sampling_rate):
    """Return a low-pass filter [num_taps] in float64, a windowed sinc of sum 1 (appendix B)."""
    if num_taps == 1:
        return np.ones(1)
    x = (np.arange(num_taps) - (num_taps - 1) / 2) / sampling_rate
    taps = np.sinc(2 * cutoff * x) * np.kaiser(
        num_taps, kaiser_beta(num_taps, width, sampling_rate)
    )
    return taps / taps.sum()


def bessel_j1(x):
    """Compute the Bessel function J1 from (1 / pi) int_0^pi cos(t - x sin t) dt.

    The integrand is periodic and analytic: with more points than max |x|, the midpoint rule is
    exact up to rounding.
    """
    x = np.asarray(x, dtype=np.float64)
    num_points = 64 + 2 * math.ceil(float(np.abs(x).max(initial=0)))
    t = (np.arange(num_points) + 0.5) * (math.pi / num_points)
    return np.cos(t - x[..., None] * np.sin(t)).mean(axis=-1)


def design_radial_filter(num_taps, cutoff, width, sampling_rate):
    """Return a low-pass filter [num_taps, num_taps] that is the same in all directions, float64.

    A jinc times the outer product of Kaiser windows, of sum 1 (2021, section 3.2 and appendix B).
    """
    if num_taps == 1:
        return np.ones((1, 1))
    x = (np.arange(num_taps) - (num_taps - 1) / 2) / sampling_rate
    r = np.hypot(x[:, None], x[None])
    safe = np.where(r > 0, r, 1.0)
    # constant factors are left out, since the sum is set to 1
    jinc = np.where(r > 0, bessel_j1(2 * math.pi * cutoff * safe) / (math.pi * safe), cutoff)
    window = np.kaiser(num_taps, kaiser_beta(num_taps, width, sampling_rate))
    taps = jinc * np.outer(window, window)
    return taps / taps.sum()


def upsampling_matrix(taps, size, factor, padding):
    """Return the matrix [size * factor + sum(padding) - num_taps + 1, size] of upsampling.

    It inserts zeros between the samples, pads (negative: crops), filters with `taps` [num_taps] and
    multiplies by `factor`. Sample i lands at i * factor + padding[0] and reaches output o with tap
    num_taps - 1 - (i * factor + padding[0] - o).
    """
    rows = size * factor + sum(padding) - len(taps) + 1
    tap = np.arange(size)[None] * factor + padding[0] - np.arange(rows)[:, None]
    inside = (tap >= 0) & (tap < len(taps))
    return np.where(inside, factor * taps[::-1][tap.clip(0, len(taps) - 1)], 0.0)


def downsampling_matrix(taps, size, factor):
    """Return the matrix [(size - num_taps) // factor + 1, size] of downsampling.

    It filters where all taps lie within the samples, and keeps every `factor`-th result.
    """
    rows = (size - len(taps)) // factor + 1
    tap = np.arange(size)[None] - np.arange(rows)[:, None] * factor
    inside = (tap >= 0) & (tap < len(taps))
    return np.where(inside, taps[::-1][tap.clip(0, len(taps) - 1)], 0.0)


# ----------------------------------------------------------------------------- filtered leaky ReLU


def resample_dense(x, matrix):
    """Multiply rows and columns of x [B, C, S, S], channels-last, by `matrix` [M, S]."""
    B, C, H, W = x.shape
    matrix = matrix.to(x.dtype)
    x = x.permute(0, 2, 3, 1).reshape(B, H, W * C)
    x = torch.matmul(matrix, x).view(B * len(matrix), W, C)
    return torch.matmul(matrix, x).view(B, len(matrix), len(matrix), C).permute(0, 3, 1, 2)


def upsample(x, taps, factor, padding):
    """Upsample x [B, C, H, W]: a side S becomes S * factor + sum(padding) - num_taps + 1.

    Inserts zeros between the samples, pads both sides by (left, right) (negative: crops), filters
    with `taps` [num_taps] and multiplies by factor^2.
    """
    num_channels, num_taps = x.shape[1], len(taps)
    weight = (taps.flip(0) * factor).to(x.dtype).expand(num_channels, 1, 1, num_taps)
    # a transposed convolution pads by num_taps - 1; crop to the padding that was asked for
    left = num_taps - 1 - padding[0]
    for dim in (3, 2):
        length = x.shape[dim] * factor + sum(padding) - num_taps + 1
        stride = (1, factor) if dim == 3 else (factor, 1)
        x = F.conv_transpose2d(x, weight, stride=stride, groups=num_channels)
        right = length + left - x.shape[dim]
        x = F.pad(x, (-left, right) if dim == 3 else (0, 0, -left, right))
        weight = weight.transpose(2, 3)
    return x


def downsample(x, taps, factor):
    """Filter x [B, C, H, W] with `taps` [n] or [n, n], unpadded; keep every `factor`-th sample."""
    num_channels, num_taps = x.shape[1], len(taps)
    if taps.ndim == 2:
        weight = taps.flip((0, 1)).to(x.dtype).expand(num_channels, 1, num_taps, num_taps)
        return F.conv2d(x, weight, stride=factor, groups=num_channels)
    weight = taps.flip(0).to(x.dtype).expand(num_channels, 1, 1, num_taps)
    x = F.conv2d(x, weight, stride=(1, factor), groups=num_channels)
    return F.conv2d(x, weight.transpose(2, 3), stride=(factor, 1), groups=num_channels)


class FilteredLeakyReLU(nn.Module):
    """Leaky ReLU for continuous signals, at a higher sampling rate between two low-pass filters.

    From 2021, section 3.2. forward(x [B, C, in_size, in_size], bias [C]) returns
    [B, C, out_size, out_size]. It adds the bias, inserts zeros, pads or crops, filters, applies the
    leaky ReLU, gain and clamp, filters, and keeps every `down`-th sample. Output and input are
    centred on each other. up_taps [n] and down_taps [m] or [m, m] are numpy arrays. Inputs of other
    sizes are padded alike.
    """

    def __init__(
        self, in_size, out_size, up, down, up_taps, down_taps, gain=SQRT_2, slope=0.2, clamp=None
    ):
        super().__init__()
        self.up, self.down, self.gain, self.slope, self.clamp = up, down, gain, slope, clamp
        # samples needed before the second filter, minus those after the first
        total = (out_size - 1) * down + len(down_taps) - (in_size * up - len(up_taps) + 1)
        # zeros follow each sample, so the centre of the samples is (up - 1) / 2 to the left
        left = (total + up) // 2
        self.padding = (left, total - left)
        self.identity = up == down == len(up_taps) == len(down_taps) == 1 and total == 0
        self.in_size, self.size = in_size, max(in_size, out_size)
        self.dense = self.size <= DENSE_SIZE
        middle = (out_size - 1) * down + len(down_taps)
        self._buffer("up_taps", up_taps)
        self._buffer("down_taps", down_taps)
        if self.dense:
            self._buffer("up_matrix", upsampling_matrix(up_taps, in_size, up, self.padding))
            if down_taps.ndim == 1:
                self._buffer("down_matrix", downsampling_matrix(down_taps, middle, down))

    def _buffer(self, name, array):
        self.register_buffer(name, torch.from_numpy(array.astype(np.float32)), persistent=False)

    def forward(self, x, bias):
        # leaky_relu(a x) = a leaky_relu(x): apply the gain to the input, which has fewer samples
        x = (x + bias.to(x.dtype)[:, None, None]) * self.gain
        dense = self.dense and (self.size <= DENSE_SIZE_CPU or x.device.type != "cpu")
        dense = dense and x.shape[2] == x.shape[3] == self.in_size  # the matrices' size
        if not self.identity:
            x = x.contiguous(memory_format=torch.channels_last)
            if dense:
                x = resample_dense(x, self.up_matrix)
            else:
                x = upsample(x, self.up_taps, self.up, self.padding)
        x = x if self.slope == 1 else F.leaky_relu(x, self.slope)
        x = x if self.clamp is None else x.clamp(-self.clamp, self.clamp)
        if self.identity:
            return x
        if dense and self.down_taps.ndim == 1:
            return resample_dense(x, self.down_matrix)
        return downsample(x, self.down_taps, self.down)


# --------------------------------------------------------------------------- modulated convolution


def modulated_conv2d(x, weight, styles, *, demodulate=True, input_gain=None):
    """Convolve x with weights that are scaled for each sample, by scaling the maps; full padding.

    With demodulation, output map o is divided by the norm of its modulated weights. Weights and
    styles are first normalised to a mean square of 1, which does not change the result and keeps
    half precision in its range.

    Args:
        x: [B, I, H, W]; weight: [O, I, k, k]; styles: [B, I]; input_gain: A factor on x.

    Returns:
        [B, O, H + k - 1, W + k - 1].
    """
    dtype = x.dtype
    if demodulate:
        weight = weight * weight.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()
        styles = styles * styles.square().mean().rsqrt()
        norm = F.linear(styles.square(), weight.square().sum(dim=(2, 3)))  # [B, O], squared
        scale = (norm + 1e-8).rsqrt()
    if input_gain is not None:
        styles = styles * input_gain
    x = x * styles.to(dtype)[:, :, None, None]  # [B, I, H, W]
    x = F.conv2d(x, weight.to(dtype), padding=weight.shape[2] - 1)  # [B, O, H + k - 1, W + k - 1]
    return x * scale.to(dtype)[:, :, None, None] if demodulate else x


# --------------------------------------------------------------------------------------- synthesis


class FourierFeatures(nn.Module):
    """The first signal: waves with frequencies in a disc, moved by w and mixed by a matrix.

    From 2021, section 3.1 and appendix F. forward(w [B, w_dim]) returns
    [B, num_channels, size, size]. `transform` [3, 3] maps the canvas's coordinates (x, y, 1), with
    the origin in the middle, to those of the waves. It shifts or turns the whole image, to measure
    equivariance or to animate it, and must be affine: its third row is taken to be (0, 0, 1).
    `extra` samples (rows, columns) enlarge the canvas around its middle.
    """

    def __init__(self, w_dim, num_channels, size, sampling_rate, bandwidth):
        super().__init__()
        self.size, self.sampling_rate, self.bandwidth = size, sampling_rate, bandwidth
        # uniform directions; the radii fill the disc nearly evenly
        frequencies = torch.randn(num_channels, 2)
        radii = frequencies.norm(dim=1, keepdim=True)
        frequencies = frequencies / (radii * radii.square().exp().pow(0.25)) * bandwidth
        self.weight = nn.Parameter(torch.randn(num_channels, num_channels))
        self.affine = EqualizedLinear(w_dim, 4)
        with torch.no_grad():
            self.affine.weight.zero_()
            self.affine.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("phases", torch.rand(num_channels) - 0.5)
        self.register_buffer("transform", torch.eye(3))

    def forward(self, w, extra=(0, 0)):
        w = w.to(self.weight.dtype)
        t = self.affine(w)  # [B, 4]: cosine and sine of the turn, shift
        t = t / t[:, :2].norm(dim=1, keepdim=True)
        cos, sin, shift = t[:, 0], t[:, 1], t[:, 2:]
        turn = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
        # x -> turn (A x + b - shift), with A and b from `transform`
        matrix = turn @ self.transform[:2, :2]  # [B, 2, 2]
        offset = turn @ (self.transform[:2, 2] - shift).unsqueeze(2)  # [B, 2, 1]
        phases = self.phases + (self.frequencies @ offset).squeeze(2)  # [B, C]
        frequencies = self.frequencies @ matrix  # [B, C, 2]
        # `transform` may raise frequencies: fade out those near half the sampling rate
        excess = frequencies.norm(dim=2) - self.bandwidth  # [B, C]
        amplitudes = (1 - excess / (self.sampling_rate / 2 - self.bandwidth)).clamp(0, 1)
        y, x = (self._list_positions(self.size + each, w) for each in extra)  # [H], [W]
        along_x = frequencies[:, :, 0, None] * x  # [B, C, W]
        along_y = frequencies[:, :, 1, None] * y + phases[:, :, None]  # [B, C, H]
        cycles = along_x[:, :, None, :] + along_y[:, :, :, None]  # [B, C, H, W]
        waves = torch.sin(2 * math.pi * cycles)
        weight = self.weight * amplitudes[:, None, :] / math.sqrt(self.weight.shape[1])  # [B, C, C]
        B, C, H, W = waves.shape
        return (weight @ waves.reshape(B, C, H * W)).view(B, C, H, W)

    def _list_positions(self, num, like):
        """Return coordinates of `num` samples around 0."""
        position = torch.arange(num, device=like.device, dtype=like.dtype)
        return (position - (num - 1) / 2) / self.sampling_rate


class SynthesisLayer(nn.Module):
    """Modulated convolution of the normalised input, then a filtered leaky ReLU.

    The last layer has neither demodulation nor filters and makes the image (2021, figure 4b).
    """

    def __init__(self, plan, w_dim, clamp, magnitude_decay):
        super().__init__()
        self.to_image = plan.to_image
        self.reduced = plan.reduced
        self.magnitude_decay = magnitude_decay
        k = plan.kernel_size
        self.style = EqualizedLinear(w_dim, plan.in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(plan.out_channels, plan.in_channels, k, k))
        self.bias = nn.Parameter(torch.zeros(plan.out_channels))
        self.register_buffer("magnitude", torch.ones(()))  # running mean square of the input
        self.activation = FilteredLeakyReLU(
            plan.in_size + k - 1,
            plan.out_size,
            plan.up,
            plan.down,
            plan.up_taps,
            plan.down_taps,
            gain=1.0 if plan.to_image else SQRT_2,
            slope=1.0 if plan.to_image else 0.2,
            clamp=clamp,
        )

    def forward(self, x, w, update_magnitude, compute_dtype):
        if update_magnitude:
            with torch.no_grad():
                current = x.to(self.magnitude.dtype).square().mean()
                self.magnitude.copy_(current.lerp(self.magnitude, self.magnitude_decay))
        styles = self.style(w)  # [B, in]
        if self.to_image:
            styles = styles / math.sqrt(self.weight[0].numel())
        reduced_dtype = compute_dtype if self.reduced else None
        x = x.to(reduced_dtype or styles.dtype)  # [B, in, S, S]
        gain = self.magnitude.to(styles.dtype).rsqrt()
        x = modulated_conv2d(x, self.weight, styles, demodulate=not self.to_image, input_gain=gain)
        return self.activation(x, self.bias)


@dataclass(frozen=True)
class LayerPlan:
    """What a layer's place decides. `in_size` is the size before the convolution."""

    index: int
    in_channels: int
    out_channels: int
    in_size: int
    out_size: int
    in_sampling_rate: int
    out_sampling_rate: int
    middle_sampling_rate: int
    in_cutoff: float
    out_cutoff: float
    in_half_width: float
    out_half_width: float
    kernel_size: int
    filter_size: int
    to_image: bool
    radial: bool
    reduced: bool

    @property
    def up(self):
        return self.middle_sampling_rate // self.in_sampling_rate

    @property
    def down(self):
        return self.middle_sampling_rate // self.out_sampling_rate

    @property
    def up_taps(self):
        num_taps = self.filter_size * self.up if self.up > 1 and not self.to_image else 1
        return design_filter(
            num_taps, self.in_cutoff, 2 * self.in_half_width, self.middle_sampling_rate
        )

    @property
    def down_taps(self):
        num_taps = self.filter_size * self.down if self.down > 1 and not self.to_image else 1
        design = design_radial_filter if self.radial and num_taps > 1 else design_filter
        return design(num_taps, self.out_cutoff, 2 * self.out_half_width, self.middle_sampling_rate)


def plan_layers(config):
    """Return the `LayerPlan` of each of the `num_layers` + 1 layers of a `StyleGAN3Generator`.

    Cutoff and stopband grow geometrically up to the critically sampled last layers. A layer's
    sampling rate is the smallest power of two that holds its stopband (2021, section 3.2).
    """
    resolution, num_layers = config.resolution, config.num_layers
    last_cutoff = resolution / 2
    last_stopband = last_cutoff * config.last_stopband_ratio
    progress = np.minimum(np.arange(num_layers + 1) / (num_layers - config.num_critical), 1)
    cutoffs = config.first_cutoff * (last_cutoff / config.first_cutoff) ** progress
    stopbands = config.first_stopband * (last_stopband / config.first_stopband) ** progress
    sampling_rates = np.exp2(np.ceil(np.log2(np.minimum(stopbands * 2, resolution)))).astype(int)
    half_widths = np.maximum(stopbands, sampling_rates / 2) - cutoffs
    sizes = sampling_rates + 2 * config.margin
    sizes[-2:] = resolution
    channels = np.minimum(config.channel_base / 2 / cutoffs, config.max_channels)
    channels = np.rint(channels).astype(int)
    channels[-1] = config.image_channels
    plans = []
    for i in range(num_layers + 1):
        before = max(i - 1, 0)
        to_image = i == num_layers
        middle = max(sampling_rates[before], sampling_rates[i])
        plans.append(
            LayerPlan(
                index=i,
                in_channels=int(channels[before]),
                out_channels=int(channels[i]),
                in_size=int(sizes[before]),
                out_size=int(sizes[i]),
                in_sampling_rate=int(sampling_rates[before]),
                out_sampling_rate=int(sampling_rates[i]),
                middle_sampling_rate=int(middle if to_image else middle * config.lrelu_upsampling),
                in_cutoff=float(cutoffs[before]),
                out_cutoff=float(cutoffs[i]),
                in_half_width=float(half_widths[before]),
                out_half_width=float(half_widths[i]),
                kernel_size=1 if to_image else config.kernel_size,
                filter_size=config.filter_size,
                to_image=to_image,
                # critical sampling needs the whole square of frequencies
                radial=config.radial_filters and i < num_layers - config.num_critical,
                reduced=bool(sampling_rates[i] * 2**config.num_reduced_resolutions > resolution),
            )
        )
    return plans


class SynthesisNetwork(nn.Module):
    """w of every layer -> image.

    forward(ws [B, num_ws, w_dim], update_magnitudes=False, compute_dtype=None, extra=(0, 0))
    returns an image [B, image_channels, R, R], nominally in [-1, 1]. The first w goes to the
    Fourier features, one to each layer. `update_magnitudes` moves the running magnitudes of the
    layers' inputs, in training. `compute_dtype` is the dtype of the feature maps of the highest
    resolutions. `extra` is that of `FourierFeatures`.
    """

    def __init__(self, w_dim, plans, output_scale, clamp, magnitude_decay):
        super().__init__()
        first = plans[0]
        self.output_scale = output_scale
        self.num_ws = len(plans) + 1
        self.w_dim = w_dim
        self.input = FourierFeatures(
            w_dim, first.in_channels, first.in_size, first.in_sampling_rate, first.in_cutoff
        )
        self.layers = nn.ModuleList(
            SynthesisLayer(plan, w_dim, clamp, magnitude_decay) for plan in plans
        )

    def forward(self, ws, *, update_magnitudes=False, compute_dtype=None, extra=(0, 0)):
        if ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws must be [B, {self.num_ws}, {self.w_dim}]; got {list(ws.shape)}.")
        ws = ws.unbind(dim=1)
        x = self.input(ws[0], extra)  # [B, C, S, S]
        for layer, w in zip(self.layers, ws[1:], strict=True):
            x = layer(x, w, update_magnitudes, compute_dtype)  # [B, C', S', S']
        return x.to(ws[0].dtype) * self.output_scale


class StyleGAN3Generator(StyleGenerator):
    """Alias-free generator of StyleGAN3 (Karras et al. 2021).

    The defaults are StyleGAN3-T, equivariant to translation. StyleGAN3-R is also equivariant to
    rotation: it has kernel_size=1, radial_filters=True, and twice channel_base and max_channels.

    Args:
        resolution: Side of the image in pixels, a power of two, at least 16.
        image_channels: 1 for micrographs.
        z_dim, w_dim: Width of the latent and of the intermediate latent.
        mapping_depth: Layers of the mapping network.
        channel_base, max_channels: A layer of cutoff c has min(channel_base / (2 c), max_channels)
            feature maps.
        num_classes: 0 for an unconditional generator.
        class_means: Truncate towards the mean w of the class instead of that of all classes.
        num_layers: Layers before the last, which makes the image.
        num_critical: How many of these, at the end, are critically sampled.
        first_cutoff, first_stopband, last_stopband_ratio: Ends of the geometric schedules, in
            cycles per image; the last is relative to half the resolution.
        margin: Samples beyond each border of the canvas.
        kernel_size: Side of the convolutions.
        filter_size: Taps of a filter at the lower of its two sampling rates.
        lrelu_upsampling: Sampling rate of the non-linearity relative to the layer's.
        radial_filters: Use filters that are the same in all directions, except in critically
            sampled layers.
        output_scale: Factor on the image.
        clamp: Bound on the activations before the second filter, or None.
        magnitude_decay: Decay per step of the running magnitude of each layer's input.
        num_reduced_resolutions: How many of the highest sampling rates `compute_dtype` applies to.
    """

    # in half precision, frequencies and phases would be off by pixels; diffusers needs a list
    _keep_in_fp32_modules = ["input"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        resolution: int = 256,
        image_channels: int = 1,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_depth: int = 2,
        channel_base: int = 32768,
        max_channels: int = 512,
        num_classes: int = 0,
        num_layers: int = 14,
        num_critical: int = 2,
        first_cutoff: float = 2.0,
        first_stopband: float = 2**2.1,
        last_stopband_ratio: float = 2**0.3,
        margin: int = 10,
        kernel_size: int = 3,
        filter_size: int = 6,
        lrelu_upsampling: int = 2,
        radial_filters: bool = False,
        output_scale: float = 0.25,
        clamp: float | None = 256,
        magnitude_decay: float = 0.999,
        num_reduced_resolutions: int = 4,
        class_means: bool = False,
    ):
        super().__init__()
        if not 16 <= resolution <= 4096 or resolution & (resolution - 1):
            raise ValueError(f"resolution is {resolution}; give a power of two from 16 to 4096.")
        for name, value, largest in (
            ("num_layers", num_layers, 256),
            ("margin", margin, 256),
            ("kernel_size", kernel_size, 15),
            ("filter_size", filter_size, 32),
            ("lrelu_upsampling", lrelu_upsampling, 8),
        ):
            if not 0 <= value <= largest:
                raise ValueError(f"{name} is {value}; give at most {largest}.")
        if channel_base < resolution:
            raise ValueError(f"channel_base is {channel_base}; give at least {resolution}.")
        if not 0 <= num_critical < num_layers:
            raise ValueError(f"num_critical is {num_critical}; give 0 to {num_layers - 1}.")
        self.plans = plan_layers(self.config)
        self.mapping_network = MappingNetwork(
            z_dim, w_dim, mapping_depth, num_classes, class_means=class_means
        )
        self.synthesis_network = SynthesisNetwork(
            w_dim, self.plans, output_scale, clamp, magnitude_decay
        )

    @property
    def num_ws(self) -> int:
        """Number of style inputs: one for the Fourier features and one for each layer."""
        return self.synthesis_network.num_ws

    def synthesis(
        self,
        ws: torch.Tensor,
        noise_mode: str = "none",
        generator: torch.Generator | list[torch.Generator] | None = None,
        compute_dtype: torch.dtype | None = None,
        update_magnitudes: bool = False,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Turn ws [B, num_ws, w_dim] into images [B, image_channels, R, R] around [-1, 1].

        StyleGAN3 has no noise inputs: `noise_mode` and `generator` have no effect.

        Args:
            size: (H, W) in pixels of a larger canvas, see `find_extra`. Its first signal has the
                same waves, which go on beyond the tile, so that it has no seams. It is computed as
                a whole.

        Raises:
            ValueError: The canvas cannot have this size.
        """
        if noise_mode not in NOISE_MODES:
            raise ValueError(f"noise_mode is {noise_mode!r}; choose {', '.join(NOISE_MODES)}.")
        return self.synthesis_network(
            ws,
            update_magnitudes=update_magnitudes,
            compute_dtype=compute_dtype,
            extra=(0, 0) if size is None else self.find_extra(size),
        )

    def find_extra(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the samples by which the first signal grows for a canvas of `size` (H, W).

        Raises:
            ValueError: A side is smaller than a tile or no multiple of its first sample.
        """
        resolution, rate = self.config.resolution, self.plans[0].in_sampling_rate
        cell = max(1, resolution // rate)  # pixels of a sample of the first signal
        for side in size:
            if side < resolution or (side - resolution) % cell:
                nearest = resolution + max(0, round((side - resolution) / cell)) * cell
                raise ValueError(
                    f"images of {size[0]} x {size[1]} pixels cannot be drawn: a side must be a "
                    f"multiple of {cell} and at least {resolution}. The nearest size is {nearest}."
                )
        height, width = size
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"images of {height} x {width} pixels have more than {MAX_PIXELS:,} pixels, and a "
                "canvas is computed as a whole. Choose a smaller size."
            )
        return (height - resolution) // cell, (width - resolution) // cell
