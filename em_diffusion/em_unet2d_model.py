"""A `UNet2DModel` with a fixed number of attention heads."""

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D

from em_training.em_saved_model import SavesSafetensors


class EMUNet2DModel(SavesSafetensors, UNet2DModel):
    """diffusers' `UNet2DModel` with two more arguments; parameters have the stock names and shapes.

    The stock model has one width of head for all levels: a width of 64 gives 8 heads at 512
    channels and 16 at 1024. Models trained with a fixed number of heads (latent diffusion's
    `num_heads`) load into it without an error, but give wrong answers.

    Args:
        num_attention_heads: Heads of every attention, each channels / num_attention_heads wide,
            with the softmax of q k^T / sqrt(channels / num_attention_heads). `attention_head_dim`
            is then not used, and stored as null. None: the stock model with `attention_head_dim`.
        resample_with_conv: False joins the levels by 2 x 2 means and repeated pixels alone, without
            the convolutions of `downsample_type` and `upsample_type` "conv".

    All other arguments are the stock ones.

    Raises:
        ValueError: If the number of heads does not divide the channels of an attention.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = (
            "DownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = (
            "AttnUpBlock2D",
            "AttnUpBlock2D",
            "AttnUpBlock2D",
            "UpBlock2D",
        ),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int | None = None,
        resample_with_conv: bool = True,
    ):
        arguments = dict(locals())
        for name in ("self", "__class__", "num_attention_heads", "resample_with_conv"):
            del arguments[name]
        if num_attention_heads is not None:
            arguments["attention_head_dim"] = None  # one head of full width, which is then divided
        super().__init__(**arguments)
        if num_attention_heads is not None:
            set_attention_heads(self, num_attention_heads)
        if not resample_with_conv:
            remove_resampling_convolutions(self)


def set_attention_heads(model: torch.nn.Module, num_heads: int) -> None:
    """Divide every attention of `model` into `num_heads` heads; no parameter changes."""
    for name, module in model.named_modules():
        if not isinstance(module, Attention):
            continue
        if num_heads < 1 or module.inner_dim % num_heads:
            raise ValueError(
                f"num_attention_heads is {num_heads}; it must divide the channels of every "
                f"attention, and {name} has {module.inner_dim}."
            )
        module.heads = module.sliceable_head_dim = num_heads
        module.scale = (module.inner_dim // num_heads) ** -0.5


def remove_resampling_convolutions(model: UNet2DModel) -> None:
    """Replace every convolution between two levels by 2 x 2 means or repeated pixels."""
    for block in [*model.down_blocks, *model.up_blocks]:
        for name, layer in (("downsamplers", Downsample2D), ("upsamplers", Upsample2D)):
            old = getattr(block, name, None)
            if old is not None and isinstance(old[0], layer) and old[0].use_conv:
                own_name = "op" if layer is Downsample2D else "conv"
                setattr(
                    block,
                    name,
                    torch.nn.ModuleList([layer(old[0].channels, use_conv=False, name=own_name)]),
                )
