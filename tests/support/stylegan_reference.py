"""The slow, obvious twins of the operations, step by step as the papers write them; tests hold the
fast ones equal to these.
"""

import math

import torch
import torch.nn.functional as F


def insert_zeros(x):
    """Put a zero after every pixel along both sides: [B, C, H, W] -> [B, C, 2H, 2W]."""
    B, C, H, W = x.shape
    y = x.new_zeros(B, C, H, 2, W, 2)
    y[:, :, :, 0, :, 0] = x
    return y.reshape(B, C, 2 * H, 2 * W)


def filter_image(x, kernel, padding, gain=1.0):
    """Convolve every channel with `kernel` [4, 4], tap by tap, after padding by (left, right, top,
    bottom) zeros.
    """
    x = F.pad(x, padding)
    height, width = x.shape[2] - 3, x.shape[3] - 3
    y = x.new_zeros(*x.shape[:2], height, width)
    for i in range(4):
        for j in range(4):  # a convolution turns the kernel; this one is symmetric
            y = y + gain * kernel[3 - i, 3 - j] * x[:, :, i : i + height, j : j + width]
    return y


def upsample(x, kernel):
    """Double the side: zeros between pixels, then the filter, whose gain of 4 keeps the mean."""
    return filter_image(insert_zeros(x), kernel, (2, 1, 2, 1), gain=4.0)


def downsample(x, kernel):
    """Halve the side: the filter, then every second pixel."""
    return filter_image(x, kernel, (1, 1, 1, 1))[:, :, ::2, ::2]


def modulated_conv2d(x, weight, styles, *, demodulate=True, kernel=None, gain=1.0):
    """Scale the weights of each sample (2020, equations 1 and 3) and convolve samples one by one.

    When the side doubles, zeros are put between the pixels, the weights are convolved over them,
    then the filter."""
    outputs = []
    for sample, style in zip(x, styles, strict=True):
        w = weight * style[None, :, None, None]  # [O, I, k, k]
        if demodulate:
            w = w / (w.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if kernel is None:
            y = F.conv2d(sample[None], w, padding=weight.shape[2] // 2)
        else:
            zeros = F.pad(insert_zeros(sample[None]), (2, 1, 2, 1))  # [1, I, 2H+3, 2W+3]
            y = filter_image(F.conv2d(zeros, w.flip((2, 3))), kernel, (1, 1, 1, 1), gain=4.0)
        outputs.append(y * gain)
    return torch.cat(outputs)


def equalized_conv2d(x, weight, bias=None, *, kernel=None, activation=True, gain=1.0, clamp=None):
    """weight / sqrt(fan in), (filter and stride 2), bias, leaky ReLU times sqrt(2), gain, clamp."""
    padding = weight.shape[2] // 2
    weight = weight / math.sqrt(weight[0].numel())
    if kernel is None:
        x = F.conv2d(x, weight, padding=padding)
    else:
        x = F.conv2d(filter_image(x, kernel, (padding + 1,) * 4), weight)[:, :, ::2, ::2]
    x = x if bias is None else x + bias[None, :, None, None]
    x = torch.where(x > 0, x, 0.2 * x) * math.sqrt(2) if activation else x
    x = x * gain
    return x if clamp is None else x.clamp(-clamp * gain, clamp * gain)


def minibatch_standard_deviation(x, group_size, num_maps=1):
    """For each group (images i, i + n, i + 2n, ... of n = B / G groups), the means of the
    deviations, as `num_maps` more channels.
    """
    B, _, H, W = x.shape
    num_groups = B // min(group_size or B, B)
    maps = []
    for i in range(B):
        group = x[i % num_groups :: num_groups]
        deviation = ((group - group.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt()
        maps.append(torch.stack([part.mean().expand(H, W) for part in deviation.chunk(num_maps)]))
    return torch.cat([x, torch.stack(maps)], dim=1)


def adaptive_instance_norm(x, scale, shift):
    """Map by map: subtract the mean, divide by the deviation, scale, shift (2019, equation 1)."""
    y = torch.empty_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            z = x[b, c] - x[b, c].mean()
            y[b, c] = z / (z.square().mean() + 1e-8).sqrt() * scale[b, c] + shift[b, c]
    return y


def resample(x, taps, up, down, padding):
    """Put up - 1 zeros after every sample of x [B, C, S, S], pad by (left, right) on both sides
    (negative: crop), convolve with `taps` [n] along both sides or [n, n], keep every `down`-th
    sample. No gain."""
    B, C, H, W = x.shape
    y = x.new_zeros(B, C, H, up, W, up)
    y[:, :, :, 0, :, 0] = x
    y = F.pad(y.reshape(B, C, H * up, W * up), (*padding, *padding))
    taps = torch.outer(taps, taps) if taps.ndim == 1 else taps
    kernel = taps.flip((0, 1)).to(y)[
        None, None
    ]  # conv2d does not turn its kernel, a convolution does
    return F.conv2d(y.flatten(0, 1)[:, None], kernel).unflatten(0, (B, C))[:, :, 0, ::down, ::down]


def filtered_leaky_relu(x, bias, up_taps, down_taps, *, up, down, padding, gain, slope, clamp):
    """Bias, upsampling with gain up^2, leaky ReLU, gain, clamp, downsampling (2021, figure 4b)."""
    x = resample(x + bias[None, :, None, None], up_taps, up, 1, padding) * up**2
    x = torch.where(x > 0, x, slope * x) * gain
    x = x if clamp is None else x.clamp(-clamp, clamp)
    return resample(x, down_taps, 1, down, (0, 0))


def alias_free_modulated_conv2d(x, weight, styles, *, demodulate=True, input_gain=1.0):
    """StyleGAN3's: weights scaled per sample and normed, the input's gain after that, a full
    convolution of sample by sample.
    """
    outputs = []
    for sample, style in zip(x, styles, strict=True):
        w = weight * style[None, :, None, None]  # [O, I, k, k]
        if demodulate:
            w = w / w.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
        outputs.append(F.conv2d(sample[None] * input_gain, w, padding=weight.shape[2] - 1))
    return torch.cat(outputs)


def fourier_features(
    w,
    size,
    sampling_rate,
    bandwidth,
    frequencies,
    phases,
    transform,
    weight,
    affine_weight,
    affine_bias,
):
    """Waves of StyleGAN3's input, wave by wave and pixel by pixel."""
    images = []
    for one in w:
        c, s, *shift = (affine_weight / math.sqrt(len(one)) @ one + affine_bias).unbind()
        length = (c.square() + s.square()).sqrt()
        c, s, shift = c / length, s / length, torch.stack(shift) / length
        image = w.new_zeros(len(weight), size, size)
        for i in range(size):
            for j in range(size):
                point = (
                    torch.tensor(
                        [j - (size - 1) / 2, i - (size - 1) / 2, sampling_rate], dtype=w.dtype
                    )
                    / sampling_rate
                )
                u, v = (transform @ point)[:2] - shift
                u, v = c * u - s * v, s * u + c * v
                image[:, i, j] = torch.sin(
                    2 * math.pi * (frequencies[:, 0] * u + frequencies[:, 1] * v + phases)
                )
        turn = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
        radius = (frequencies @ turn @ transform[:2, :2]).norm(dim=1)
        amplitude = (1 - (radius - bandwidth) / (sampling_rate / 2 - bandwidth)).clamp(0, 1)
        images.append(
            torch.einsum("oi,i,ihw->ohw", weight / math.sqrt(len(frequencies)), amplitude, image)
        )
    return torch.stack(images)
