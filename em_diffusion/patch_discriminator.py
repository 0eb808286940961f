"""The VQGAN's discriminator: real or reconstructed, judged patch by patch, with its losses."""

import itertools

import torch.nn.functional as F
from torch import nn

MAX_WIDENING = 8  # channels grow up to so many times those of the first layer
MAX_NORM_GROUPS = 8
ADAPTIVE_EPSILON = 1e-6  # delta of equation 7
MAX_ADAPTIVE_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv:1611.07004, section 3.2 and appendix 6.1.2): one logit for each patch of an image.

    `num_layers` convolutions of 4 x 4 with stride 2, one of stride 1, and one to the logits; channels double from
    `base_channels` to eight times as many. A logit sees a patch of 16, 34, 70, 142 pixels a side for 1 to 4 layers. Norms
    are group norms, not the paper's batch norms: they keep no statistics that a resumed run would have to restore, and see
    each image by itself, so that neither the number of processes nor the other images of a batch change an answer.
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
        """Logits [B, 1, h, w], positive for real, of images [B, 1, H, W] in [-1, 1]; h = H / 2^num_layers - 2."""
        return self.layers(images)


def smallest_side(num_layers: int) -> int:
    """Pixels a side of the smallest image for which a discriminator of so many layers has a logit."""
    return 3 * 2**num_layers


def hinge_loss(logits_real, logits_fake):
    """The discriminator's loss, (E[max(0, 1 - D(x))] + E[max(0, 1 + D(x^))]) / 2 (Lim and Ye 2017, arXiv:1705.02894)."""
    return (F.relu(1 - logits_real.float()).mean() + F.relu(1 + logits_fake.float()).mean()) / 2


def adaptive_weight(reconstruction_gradient, adversarial_gradient):
    """lambda = |grad L_rec| / (|grad L_GAN| + delta) at the decoder's last layer, clamped: a scalar without gradient.

    Esser et al. 2021, arXiv:2012.09841, equation 7: both losses pull the decoder equally hard, whatever their scales.
    """
    ratio = reconstruction_gradient.float().norm() / (
        adversarial_gradient.float().norm() + ADAPTIVE_EPSILON
    )
    return ratio.clamp(max=MAX_ADAPTIVE_WEIGHT).detach()
