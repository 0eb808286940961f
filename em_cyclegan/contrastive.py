"""The contrastive loss of CUT: a patch of the translated image matches the same patch before.

From Park et al. 2020, arXiv:2007.15651, section 3. There is no way back to the source, so nothing
but this loss keeps the content, and the generator invents more than one of a cycle.
"""

import torch
import torch.nn.functional as F
from torch import nn

from em_cyclegan.em_resnet_generator import INIT_STD, EMResnetGenerator

NUM_BLOCKS = 5  # the features of the first and the fifth residual block are used
PROJECTION_WIDTH = 256


class PatchProjection(nn.Module):
    """Projects features at random places of an image to unit vectors, by one MLP a layer."""

    def __init__(self, base_channels: int):
        super().__init__()
        widths = (1, *(base_channels * factor for factor in (2, 4, 4, 4)))
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, PROJECTION_WIDTH),
                nn.ReLU(),
                nn.Linear(PROJECTION_WIDTH, PROJECTION_WIDTH),
            )
            for width in widths
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def forward(
        self, features: list[torch.Tensor], num_patches: int, rng: torch.Generator
    ) -> list[torch.Tensor]:
        """Return unit vectors [B, n, 256] of each layer at places that `rng` (on the CPU) draws.

        The same state of `rng` draws the same places. n is `num_patches`, or the number of pixels
        of a layer that has fewer.
        """
        vectors = []
        for layer, each in zip(self.layers, features, strict=True):
            pixels = each.flatten(2).transpose(1, 2)  # [B, HW, C]
            places = torch.randperm(pixels.shape[1], generator=rng)[:num_patches]
            chosen = pixels[:, places.to(pixels.device)]
            vectors.append(F.normalize(layer(chosen).float(), dim=-1))
        return vectors


def find_features(generator: EMResnetGenerator, images: torch.Tensor) -> list[torch.Tensor]:
    """Return five layers of features: pixels, both steps down, first and fifth residual block."""
    outputs = generator.encode(images, NUM_BLOCKS)
    return [*outputs[:4], outputs[-1]]


def contrastive_loss(
    queries: torch.Tensor, keys: torch.Tensor, temperature: float = 0.07
) -> torch.Tensor:
    """Return the mean cross-entropy of finding each query's own key among those of its image.

    Args:
        queries, keys: Unit vectors [B, n, C] of the translated and of the source image.
        temperature: Divides the cosines.
    """
    logits = queries @ keys.detach().transpose(1, 2) / temperature  # [B, n, n]
    own = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    return F.cross_entropy(logits.flatten(0, 1), own.flatten())
