"""Original autoencoders that diffusers' stock classes cannot represent.

All parameters have the stock names.
"""

import inspect

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from em_training.em_saved_model import SavesSafetensors


class EMTamingVQModel(SavesSafetensors, VQModel):
    """diffusers' `VQModel` with everything else that the original format allows.

    Args:
        stem_channels: Channels after the encoder's first convolution. Default: those of the first
            level.
        resample_with_conv: Join levels by convolutions; if False, by 2 x 2 means and repeated
            pixels.
        tanh_output: End the decoder with a tanh.
        average_output: Average the channels of the decoder's answer into one. If the decoder ends
            linearly, average its last convolution instead (`em_diffusion.grey.fold_to_grey`).
        latents_mean: Mean of each latent channel, for a diffusion model over them.
        latents_std: Deviation of each latent channel.

    The other arguments are those of `VQModel`; `scaling_factor` is 1 by default.
    """

    quantizer_class: type[torch.nn.Module] | None = None  # the stock one

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 1.0,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
        stem_channels: int | None = None,
        resample_with_conv: bool = True,
        tanh_output: bool = False,
        average_output: bool = False,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ):
        super().__init__(**_stock_arguments(VQModel, self.config))
        if self.quantizer_class is not None:
            self.quantize = self.quantizer_class(num_vq_embeddings, vq_embed_dim or latent_channels)
        _adapt(self)

    def decode(self, h, force_not_quantize=False, return_dict=True, shape=None):
        """Return images [B, out, H, W] of latents [B, C, h, w], as the stock model does."""
        output = super().decode(h, force_not_quantize, True, shape)
        output.sample = _finish(self, output.sample)
        return output if return_dict else (output.sample, output.commit_loss)


class GumbelQuantizer(nn.Module):
    """Replace latent vectors by their most probable codes; interface of `VectorQuantizer`."""

    def __init__(self, num_codes, channels):
        super().__init__()
        self.n_e, self.vq_embed_dim = num_codes, channels
        self.proj = nn.Conv2d(channels, num_codes, 1)
        self.embed = nn.Embedding(num_codes, channels)

    def forward(self, z):
        """Return (codes [B, C, h, w], 0, (None, None, indices [B h w])) of latents [B, C, h, w]."""
        indices = self.proj(z).argmax(dim=1)  # [B, h, w]
        codes = self.embed(indices).movedim(-1, 1).contiguous()  # [B, C, h, w]
        return codes, codes.new_zeros(()), (None, None, indices.flatten())

    def get_codebook_entry(self, indices, shape):
        """Return codes [B, C, h, w] of indices for the shape (B, h, w, C), or [N, C] for None."""
        codes = self.embed(indices)
        return codes if shape is None else codes.view(shape).movedim(-1, 1).contiguous()


class EMGumbelVQModel(EMTamingVQModel):
    """taming-transformers' `GumbelVQ`: a classifier chooses the code, not the nearest distance.

    `encode` returns the latents after `quant_conv`; `quantize.proj`, a 1 x 1 convolution, gives the
    logits of the codes at each position; `quantize.embed` holds the codes, and `post_quant_conv`
    leads them into the decoder. The original draws the code with Gumbel noise, even in evaluation;
    this model takes the arg-max, the code that the original draws most often.
    """

    quantizer_class = GumbelQuantizer


class EMTamingAutoencoderKL(SavesSafetensors, AutoencoderKL):
    """diffusers' `AutoencoderKL` with everything else that the original format allows.

    Args:
        z_channels: Channels between encoder and `quant_conv`, and between `post_quant_conv` and
            decoder. Default: `latent_channels`.
        stem_channels, resample_with_conv, tanh_output, average_output: As in `EMTamingVQModel`.

    The other arguments are those of `AutoencoderKL`; `scaling_factor` is 1 by default.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        z_channels: int | None = None,
        stem_channels: int | None = None,
        resample_with_conv: bool = True,
        tanh_output: bool = False,
        average_output: bool = False,
    ):
        super().__init__(**_stock_arguments(AutoencoderKL, self.config))
        if z_channels is not None and z_channels != latent_channels:
            last = block_out_channels[-1]
            self.encoder.conv_out = nn.Conv2d(last, 2 * z_channels, 3, padding=1)
            self.quant_conv = nn.Conv2d(2 * z_channels, 2 * latent_channels, 1)
            self.post_quant_conv = nn.Conv2d(latent_channels, z_channels, 1)
            self.decoder.conv_in = nn.Conv2d(z_channels, last, 3, padding=1)
        _adapt(self)

    def decode(self, z, return_dict=True, generator=None):
        """Return images [B, out, H, W] of latents [B, C, h, w], as the stock model does."""
        output = super().decode(z, return_dict=True, generator=generator)
        output.sample = _finish(self, output.sample)
        return output if return_dict else (output.sample,)


def _stock_arguments(stock, config):
    return {name: config[name] for name in inspect.signature(stock).parameters}


def _adapt(model):
    """Replace the stock stem and resampling by those of the model's config."""
    config = model.config
    first = config.block_out_channels[0]
    if config.stem_channels is not None and config.stem_channels != first:
        model.encoder.conv_in = nn.Conv2d(config.in_channels, config.stem_channels, 3, padding=1)
        model.encoder.down_blocks[0].resnets[0] = ResnetBlock2D(
            in_channels=config.stem_channels,
            out_channels=first,
            temb_channels=None,
            eps=1e-6,
            groups=config.norm_num_groups,
        )
    if not config.resample_with_conv:
        for block in model.encoder.down_blocks:
            if block.downsamplers is not None:
                channels = block.downsamplers[0].channels
                block.downsamplers = nn.ModuleList(
                    [Downsample2D(channels, use_conv=False, name="op")]
                )
        for block in model.decoder.up_blocks:
            if block.upsamplers is not None:
                channels = block.upsamplers[0].channels
                block.upsamplers = nn.ModuleList([Upsample2D(channels, use_conv=False)])


def _finish(model, images: torch.Tensor) -> torch.Tensor:
    images = images.tanh() if model.config.tanh_output else images
    return images.mean(dim=1, keepdim=True) if model.config.average_output else images
