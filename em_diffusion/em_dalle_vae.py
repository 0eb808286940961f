"""OpenAI's DALL-E dVAE as an autoencoder of images in [-1, 1].

It follows the published encoder and
decoder: residual blocks without normalisation, each of n adding 1 / n^2 of its branch; maximum
pooling; repeated pixels on the way up; a classifier over the codes at the end of the encoder; and
an output distribution on (0, 1) whose location is the sigmoid of the decoder's answer.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils import BaseOutput
from torch import nn

from em_training.em_saved_model import SavesSafetensors

PIXEL_MARGIN = 0.1  # pixels in [0, 1] are mapped to [0.1, 0.9] before the encoder


@dataclass
class DalleEncoderOutput(BaseOutput):
    """Output of `EMDalleVAE.encode`."""

    latents: torch.Tensor


class EMDalleVAE(SavesSafetensors, ModelMixin, ConfigMixin):
    """The dVAE with the interface of diffusers' `VQModel`.

    Latents [B, num_init, h, w] are the codes themselves, the most probable one at each position;
    `decode` takes the code nearest to each latent vector.

    Args:
        num_hidden: Channels of the finest of four levels; they double from level to level. Images
            are halved three times (f8).
        num_init: Channels of the codes.
        num_blocks_per_level: Residual blocks in each level of encoder and decoder.
        num_vq_embeddings: Number of codes.
        in_channels: Channels of the encoder's images.
        decoder_channels: Channels of the decoder's images.
        average_output: Average the decoder's colours into one channel. A sigmoid and a clamp come
            before that average, so no convolution can do it.
    """

    _supports_group_offloading = False

    @register_to_config
    def __init__(
        self,
        num_hidden: int = 256,
        num_init: int = 128,
        num_blocks_per_level: int = 2,
        num_vq_embeddings: int = 8192,
        in_channels: int = 3,
        decoder_channels: int = 3,
        average_output: bool = False,
        scaling_factor: float = 1.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        widths = [num_hidden * factor for factor in (1, 2, 4, 8)]
        gain = 1 / (len(widths) * num_blocks_per_level) ** 2
        self.encoder = DalleEncoder(
            in_channels, widths, num_blocks_per_level, num_vq_embeddings, gain
        )
        self.quantize = NearestCode(num_vq_embeddings, num_init)
        self.decoder = DalleDecoder(
            num_init, widths[::-1], num_blocks_per_level, decoder_channels, gain
        )

    def encode(self, images, return_dict=True):
        """Return codes [B, num_init, H / 8, W / 8] of images [B, in_channels, H, W] in [-1, 1]."""
        indices = self.compute_logits(images).argmax(dim=1)  # [B, h, w]
        latents = self.quantize.get_codebook_entry(indices, None).movedim(-1, 1).contiguous()
        return DalleEncoderOutput(latents=latents) if return_dict else (latents,)

    def compute_logits(self, images):
        """Return logits of the codes [B, num_vq_embeddings, H / 8, W / 8] of images in [-1, 1]."""
        return self.encoder((1 - 2 * PIXEL_MARGIN) * (images + 1) / 2 + PIXEL_MARGIN)

    def decode(self, h, force_not_quantize=False, return_dict=True):
        """Return images [B, 1 or decoder_channels, H, W] in [-1, 1] of latents."""
        codes = h if force_not_quantize else self.quantize(h)[0]
        # the other half of the decoder's answer is the distribution's width
        location = self.decoder(codes).chunk(2, dim=1)[0].sigmoid()
        pixels = ((location - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)
        images = 2 * pixels - 1
        images = images.mean(dim=1, keepdim=True) if self.config.average_output else images
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, images, return_dict=True):
        """Return the reconstruction of images."""
        return self.decode(self.encode(images).latents, return_dict=return_dict)


class NearestCode(nn.Module):
    """Replace latent vectors by their nearest codes; interface of diffusers' `VectorQuantizer`."""

    def __init__(self, num_codes, channels):
        super().__init__()
        self.n_e, self.vq_embed_dim = num_codes, channels
        self.embedding = nn.Embedding(num_codes, channels)

    def forward(self, z):
        """Return (codes [B, C, h, w], 0, (None, None, indices [B h w])) of latents [B, C, h, w]."""
        vectors = z.movedim(1, -1)  # [B, h, w, C]
        flat, codes = vectors.reshape(-1, vectors.shape[-1]).float(), self.embedding.weight.float()
        half_squares = codes.square().sum(dim=1) / 2
        parts = flat.split(max(1, 2**24 // len(codes)))
        indices = torch.cat(
            [torch.addmm(half_squares, part, codes.T, alpha=-1).argmin(dim=1) for part in parts]
        )
        found = self.embedding(indices).reshape(vectors.shape).movedim(-1, 1).contiguous()
        return found, found.new_zeros(()), (None, None, indices)

    def get_codebook_entry(self, indices, shape):
        """Return codes [..., C] of indices, or [B, C, h, w] for the shape (B, h, w, C)."""
        codes = self.embedding(indices)
        return codes if shape is None else codes.view(shape).movedim(-1, 1).contiguous()


class DalleEncoder(nn.Module):
    """Images [B, C, H, W] to logits [B, num_codes, H / 8, W / 8]."""

    def __init__(self, in_channels, widths, num_blocks, num_codes, gain):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 7, padding=3)
        self.levels = _levels(widths[0], widths, num_blocks, (3, 3, 3, 1), gain)
        self.conv_out = nn.Conv2d(widths[-1], num_codes, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for i, level in enumerate(self.levels):
            x = level(F.max_pool2d(x, 2) if i else x)
        return self.conv_out(F.relu(x))


class DalleDecoder(nn.Module):
    """Codes [B, num_init, h, w] to location and width of each pixel [B, 2 C, 8 h, 8 w]."""

    def __init__(self, num_init, widths, num_blocks, out_channels, gain):
        super().__init__()
        self.levels = _levels(num_init, widths, num_blocks, (1, 3, 3, 3), gain)
        self.conv_out = nn.Conv2d(widths[-1], 2 * out_channels, 1)

    def forward(self, x):
        for i, level in enumerate(self.levels):
            x = level(F.interpolate(x, scale_factor=2, mode="nearest") if i else x)
        return self.conv_out(F.relu(x))


def _levels(channels, widths, num_blocks, kernels, gain):
    """Return a sequence of residual blocks for each of `widths`."""
    levels = nn.ModuleList()
    for width in widths:
        blocks = [
            DalleBlock(width if i else channels, width, kernels, gain) for i in range(num_blocks)
        ]
        levels.append(nn.Sequential(*blocks))
        channels = width
    return levels


class DalleBlock(nn.Module):
    """x + gain f(x), f four convolutions with a ReLU before each, a quarter as wide inside."""

    def __init__(self, in_channels, out_channels, kernels, gain):
        super().__init__()
        self.gain = gain
        widths = [in_channels, *[out_channels // 4] * 3, out_channels]
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], kernel, padding=kernel // 2)
            for i, kernel in enumerate(kernels)
        )
        self.skip = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x):
        h = x
        for conv in self.convs:
            h = conv(F.relu(h))
        return self.skip(x) + self.gain * h
