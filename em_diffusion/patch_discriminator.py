"""The discriminator of VQGAN, which judges images patch by patch, and its losses."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from em_training import seed_for

MAX_WIDENING = 8  # channels grow up to so many times those of the first layer
MAX_NORM_GROUPS = 8
ADAPTIVE_EPSILON = 1e-6  # delta of equation 7
MAX_ADAPTIVE_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """PatchGAN: one logit for each patch of an image.

    From Isola et al. 2017, arXiv:1611.07004, section 3.2 and appendix 6.1.2: `num_layers`
    convolutions of 4 x 4 with stride 2, one of stride 1, and one to the logits. Channels double
    from `base_channels` to eight times as many. A logit sees a patch of 16, 34, 70, 142 pixels a
    side for 1 to 4 layers.

    Norms are group norms instead of the paper's batch norms. They have no statistics to restore
    when a run resumes, and treat each image by itself: neither the number of processes nor the
    other images of a batch change an answer.
    """

    def __init__(self, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        widths = [base_channels * min(2**i, MAX_WIDENING) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(1, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, width) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if i < num_layers else 1
            groups = next(n for n in range(min(MAX_NORM_GROUPS, width), 0, -1) if width % n == 0)
            layers.append(nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False))
            layers += [nn.GroupNorm(groups, width), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)  # appendix 6.2
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images):
        """Return logits [B, 1, h, w], positive for real, of images [B, 1, H, W] in [-1, 1].

        h = H / 2^num_layers - 2.
        """
        return self.layers(images)


def create_discriminator(config, device):
    """Create the patch discriminator and its Adam, or two Nones with a `discriminator_weight` of 0.

    Its learning rate is the autoencoder's times the ratio of the two. The betas are VQGAN's.
    """
    if config.discriminator_weight == 0:
        return None, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "autoencoder discriminator"))
        discriminator = PatchDiscriminator(
            config.discriminator_channels, config.discriminator_layers
        )
    discriminator = discriminator.to(device, memory_format=torch.channels_last)
    scale = config.discriminator_learning_rate / config.learning_rate
    groups = [{"params": list(discriminator.parameters()), "rate_scale": scale}]
    return discriminator, torch.optim.Adam(groups, betas=(0.5, 0.9), fused=True)


def smallest_side(num_layers: int) -> int:
    """Return the side in pixels of the smallest image that gives a logit."""
    return 3 * 2**num_layers


def hinge_loss(logits_real, logits_fake):
    """Return the discriminator's loss (E[max(0, 1 - D(x))] + E[max(0, 1 + D(x^))]) / 2.

    From Lim and Ye 2017, arXiv:1705.02894.
    """
    return (F.relu(1 - logits_real.float()).mean() + F.relu(1 + logits_fake.float()).mean()) / 2


def adaptive_weight(reconstruction_loss, generator_loss, last_layer, scale: float = 1.0):
    """Return |grad L_rec| / (|grad L_G| + delta) at the decoder's last layer, without gradient.

    With it, both losses change the decoder equally strongly, whatever their scales (Esser et al.
    2021, arXiv:2012.09841, equation 7).

    Args:
        last_layer: Weight of the decoder's last convolution.
        scale: Factor on both losses while their gradients are computed. In float16, gradients of
            means over many pixels would vanish.
    """
    norm, norm_G = (
        torch.autograd.grad(loss * scale, last_layer, retain_graph=True)[0].float().norm() / scale
        for loss in (reconstruction_loss, generator_loss)
    )
    return (norm / (norm_G + ADAPTIVE_EPSILON)).clamp(max=MAX_ADAPTIVE_WEIGHT)
