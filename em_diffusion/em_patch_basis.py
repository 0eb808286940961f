"""A linear autoencoder of patches, fitted in closed form."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from torch import nn

from em_training.em_saved_model import SavesSafetensors


class EMPatchBasis(SavesSafetensors, ModelMixin, ConfigMixin):
    """Principal components of patches, and a linear decoder whose patches overlap.

    Each latent position holds the first `latent_channels` principal components of its patch. The
    decoder predicts a patch from the latents of the patch and its eight neighbours, which leaves no
    edges between patches. What it cannot know, it leaves out: the noise, which an `EMGrain` draws
    anew. `em_diffusion.patch_basis.fit_patch_basis` finds the weights.

    Args:
        patch_size: Side of a patch in pixels, and pixels per latent position along a side.
        latent_channels: Components of each patch.
        latents_mean, latents_std: Mean and deviation of each latent channel, for a diffusion model
            over them.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 8,
        latent_channels: int = 16,
        in_channels: int = 1,
        out_channels: int = 1,
        scaling_factor: float = 1.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        self.encoder = nn.Conv2d(in_channels, latent_channels, patch_size, patch_size)
        self.decoder = nn.Conv2d(
            latent_channels, out_channels * patch_size**2, 3, padding=1, padding_mode="replicate"
        )

    def encode(self, x):
        """Encode images [B, 1, H, W] in [-1, 1] to `.latents` [B, C, H / patch, W / patch]."""
        return VQEncoderOutput(latents=self.encoder(x))

    def decode(self, z):
        """Decode latents [B, C, h, w] to images in `.sample`, [B, 1, h patch, w patch]."""
        sample = nn.functional.pixel_shuffle(self.decoder(z), self.config.patch_size)
        return DecoderOutput(sample=sample)

    def forward(self, x):
        """Encode and decode images [B, 1, H, W]."""
        return self.decode(self.encode(x).latents)
