"""Discriminators: one of patches of an image, one of patches of its log power spectrum."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from em_cyclegan.em_resnet_generator import INIT_STD

MAX_WIDENING = 8  # channels grow up to so many times those of the first layer
POWER_FLOOR = 1e-4  # white noise of 1.3 grey levels of 256; below it the logarithm is flat
LOG_MEAN, LOG_STD = -3.0, 3.0  # bring the logarithms of micrographs to about [-2, 2]


class PatchDiscriminator(nn.Module):
    """One score for each patch of a grey image.

    From Zhu et al. 2017, arXiv:1703.10593, appendix 7.2: C64-C128-C256-C512 of 4 x 4 convolutions
    with instance norm and leaky ReLU, then one channel. A score sees a patch of 16, 34, 70 pixels
    a side for 1, 2, 3 layers of stride 2. Group norms with one channel a group are instance norms
    that also take a single pixel.
    """

    def __init__(self, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        widths = [base_channels * min(2**i, MAX_WIDENING) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(1, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, width) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if i < num_layers else 1
            layers.append(nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False))
            layers += [nn.GroupNorm(width, width, affine=False), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return scores [B, 1, h, w], near 1 for real, of images [B, 1, H, W] in [-1, 1].

        h = H / 2^num_layers - 2.
        """
        return self.layers(images)


class SpectrumDiscriminator(PatchDiscriminator):
    """One score for each patch of the log power spectrum of a grey image.

    Noise and blur are small in an image and plain in its spectrum. A discriminator in reciprocal
    space is that of Khan et al. 2023, npj Computational Materials 9:85; the window, the logarithm
    and its scale are ours.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return scores [B, 1, h, w], near 1 for real, of images [B, 1, H, W] in [-1, 1]."""
        return super().forward(log_power_spectrum(images))


def log_power_spectrum(images: torch.Tensor) -> torch.Tensor:
    """Compute (log(|F|^2 + floor) - mean) / std of images [B, 1, H, W], in at least float32.

    F is the unitary discrete Fourier transform of the image without its mean, under a Hann window
    of unit mean square. White noise of variance v has the expected power v at every frequency,
    whatever the size. Frequency 0 lies at the pixel (H // 2, W // 2).
    """
    with torch.autocast(images.device.type, enabled=False):
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        images = images - images.mean(dim=(-2, -1), keepdim=True)
        spectrum = torch.fft.fft2(images * _hann_window(images), norm="ortho")
        power = spectrum.real.square() + spectrum.imag.square()
        power = torch.fft.fftshift(power, dim=(-2, -1))
        return ((power + POWER_FLOOR).log() - LOG_MEAN) / LOG_STD


def _hann_window(images):
    """Return a Hann window [H, W] of unit mean square for images [..., H, W]."""
    sides = [
        torch.hann_window(side, periodic=False, dtype=images.dtype, device=images.device)
        for side in images.shape[-2:]
    ]
    window = torch.outer(*sides)
    return window / window.square().mean().sqrt()


def least_squares(scores: torch.Tensor, target: float) -> torch.Tensor:
    """Return the mean of (scores - target)^2 in float32 (LSGAN, Mao et al. 2017)."""
    return F.mse_loss(scores.float(), torch.full_like(scores, target, dtype=torch.float32))


def discriminator_loss(
    discriminator: nn.Module, real: torch.Tensor, generated: torch.Tensor
) -> torch.Tensor:
    """Return (E[(D(real) - 1)^2] + E[D(generated)^2]) / 2; halved, as in Zhu et al. 2017."""
    scores_real, scores_generated = discriminator(torch.cat([real, generated])).chunk(2)
    return (least_squares(scores_real, 1.0) + least_squares(scores_generated, 0.0)) / 2
