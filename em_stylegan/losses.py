"""Losses of StyleGAN and R3GAN, each from its equation.

Goodfellow et al. 2014; Mescheder et al. 2018; Karras et al. 2020 (StyleGAN2) and 2021 (StyleGAN3);
Huang et al. 2024 (R3GAN, "The GAN is dead; long live the GAN!").
"""

import math

import torch
import torch.nn.functional as F


def generator_loss(scores_fake):
    """Non-saturating loss of the generator, E[softplus(-D(G(z)))] (2014, section 3)."""
    return F.softplus(-scores_fake).mean()


def discriminator_loss(scores_real, scores_fake):
    """Loss of the discriminator, E[softplus(D(G(z)))] + E[softplus(-D(x))] (2014, equation 1)."""
    return F.softplus(scores_fake).mean() + F.softplus(-scores_real).mean()


def relativistic_generator_loss(scores_real, scores_fake):
    """Relativistic loss of the generator, E[softplus(D(x) - D(G(z)))] (R3GAN, equation 2).

    Scores [B, 1] are paired by their order.
    """
    return F.softplus(scores_real - scores_fake).mean()


def relativistic_discriminator_loss(scores_real, scores_fake):
    """Relativistic loss of the discriminator, E[softplus(D(G(z)) - D(x))]."""
    return F.softplus(scores_fake - scores_real).mean()


def r1_penalty(scores_real, images):
    """Squared norm of the gradient of D at real images, |dD/dx|^2 [B], differentiable.

    Mescheder et al. 2018, equation 9, without gamma / 2. At generated images it is R2 (equation
    10). scores_real [B, 1] must be computed from images [B, C, H, W] that require a gradient.
    """
    (gradient,) = torch.autograd.grad(scores_real.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3))


def path_lengths(images, ws, noise):
    """Length of the image's gradient in w along a random image, |J_w^T y| [B], differentiable.

    StyleGAN2 paper, equation 4. The noise is divided by the square root of the number of pixels, so
    that lengths do not depend on the resolution. The square is summed over w and averaged over
    layers.

    Args:
        images: [B, C, H, W], computed from ws.
        ws: [B, num_ws, w_dim].
        noise: [B, C, H, W], standard normal.
    """
    noise = noise / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()


def gaussian_blur(images, sigma_px):
    """Blur images [B, C, H, W] by a Gaussian with reflected borders; sigma_px 0 changes nothing.

    StyleGAN3 blurs the discriminator's images at first, so that it does not judge by sharpness
    before the generator has any (2021, appendix E).
    """
    radius = min(math.ceil(3 * sigma_px), images.shape[2] - 1)
    if radius < 1:
        return images
    x = torch.arange(-radius, radius + 1, device=images.device) / sigma_px
    taps = torch.exp(-0.5 * x.square())
    taps = (taps / taps.sum()).to(images.dtype)
    num_channels = images.shape[1]
    images = F.pad(images, (radius,) * 4, mode="reflect")
    images = F.conv2d(images, taps.expand(num_channels, 1, 1, -1), groups=num_channels)
    return F.conv2d(images, taps[:, None].expand(num_channels, 1, -1, 1), groups=num_channels)


def blur_sigma(num_images_seen, initial_sigma_px, fade_images):
    """Return the blur's sigma in pixels, which falls linearly to 0 at `fade_images`."""
    return initial_sigma_px * max(1 - num_images_seen / fade_images, 0) if fade_images > 0 else 0.0


def find_class_weight(num_images_seen: int, ramp_images: tuple[int, int]) -> float:
    """Return the weight lambda of the classes: 0 before the ramp, 1 after it, linear within.

    Shahbazi et al. 2022, arXiv:2201.06578, section 4: small sets train well without classes first.
    """
    start, end = ramp_images
    if start < num_images_seen < end:
        return (num_images_seen - start) / (end - start)
    return float(num_images_seen >= end)


class PathLengthMean:
    """Running mean of the path lengths, the constant a of equation 4."""

    def __init__(self, decay=0.01, device="cpu"):
        self.decay = decay
        self.mean = torch.zeros((), device=device)

    def next(self, batch_mean):
        """Return what the mean will be after a batch of this mean length."""
        return self.mean.lerp(batch_mean.detach().to(self.mean), self.decay)

    def update(self, batch_mean):
        """Move the mean towards the mean length of a batch and return it."""
        self.mean = self.next(batch_mean)
        return self.mean

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = torch.as_tensor(state["mean"], dtype=self.mean.dtype).to(self.mean.device)
