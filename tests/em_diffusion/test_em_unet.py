"""`EMUNet2DModel`: the stock U-Net with a fixed number of heads, against explicit attention and
against the stock model.
"""

import inspect

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor

from em_diffusion.em_unet2d_model import EMUNet2DModel
from em_training.em_saved_pipeline import align_weights

SHAPE = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


class SlowAttention:
    """Attention head by head: softmax(q k^T / sqrt(channels / heads)) v, from the paper's equation
    (arXiv:1706.03762, 1).
    """

    def __init__(self, num_heads):
        self.num_heads = num_heads

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ):
        batch, channels, height, width = hidden_states.shape
        normed = attn.group_norm(hidden_states).flatten(2).transpose(1, 2)  # [B, h w, C]
        q, k, v = (linear(normed) for linear in (attn.to_q, attn.to_k, attn.to_v))
        head_width = channels // self.num_heads
        heads = []
        for i in range(self.num_heads):
            part = slice(i * head_width, (i + 1) * head_width)
            weights = torch.softmax(
                q[..., part] @ k[..., part].transpose(1, 2) / head_width**0.5, dim=-1
            )
            heads.append(weights @ v[..., part])
        out = (
            attn.to_out[0](torch.cat(heads, dim=-1))
            .transpose(1, 2)
            .reshape(batch, channels, height, width)
        )
        return out + hidden_states


def attentions(model):
    return [module for module in model.modules() if isinstance(module, Attention)]


def sharpen(model):
    """Larger queries, so that how attention is divided into heads shows in the output."""
    with torch.no_grad():
        for attention in attentions(model):
            attention.to_q.weight.mul_(20)


def create(num_heads, seed=0, **changes):
    torch.manual_seed(seed)
    model = EMUNet2DModel(**SHAPE | changes, num_attention_heads=num_heads).eval()
    sharpen(model)
    return model


def explicit(model, num_heads):
    """The same weights with every attention computed head by head."""
    twin = EMUNet2DModel.from_config(model.config)
    twin.load_state_dict(model.state_dict())
    for attention in attentions(twin):
        attention.set_processor(SlowAttention(num_heads))
    return twin.eval()


@pytest.fixture
def noisy():
    return torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor(
        [3, 700]
    )


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().std())


def test_signature_is_the_stock_one_and_two_more():
    ours, stock = (
        inspect.signature(cls.__init__).parameters for cls in (EMUNet2DModel, UNet2DModel)
    )
    assert {name: p.default for name, p in ours.items()} == {
        name: p.default for name, p in stock.items()
    } | {
        "num_attention_heads": None,
        "resample_with_conv": True,
    }


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8])
def test_output_and_gradients_equal_explicit_attention(num_heads, noisy):
    model = create(num_heads)
    assert len(attentions(model)) == 7
    twin = explicit(model, num_heads)
    outputs = [m(*noisy).sample for m in (model, twin)]
    assert relative(*outputs) < 1e-5
    for output in outputs:
        output.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(
            a.grad, b.grad, atol=1e-3, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )


@torch.no_grad()
def test_processors_that_read_the_scale_agree(noisy):
    model = create(8)
    expected = model(*noisy).sample
    for attention in attentions(model):
        attention.set_processor(AttnProcessor())
    assert relative(model(*noisy).sample, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("channels", [(16, 16, 16), (8, 16, 16)])
def test_equals_the_stock_model_where_the_two_coincide(channels, noisy):
    # 16 channels wherever there is attention: 4 heads are heads of width 4
    model = create(4, block_out_channels=channels)
    stock = UNet2DModel(**SHAPE | {"block_out_channels": channels}, attention_head_dim=4).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(*noisy).sample, stock(*noisy).sample)


@torch.no_grad()
def test_differs_from_every_stock_model_where_channels_differ(noisy):
    model = create(8)
    for width in (1, 2, 4, 8, 16):
        stock = UNet2DModel(**SHAPE, attention_head_dim=width).eval()
        stock.load_state_dict(model.state_dict(), strict=True)
        assert relative(stock(*noisy).sample, model(*noisy).sample) > 1e-3


@torch.no_grad()
def test_without_heads_it_is_the_stock_model(noisy):
    model = create(None, attention_head_dim=4)
    stock = UNet2DModel(**SHAPE, attention_head_dim=4).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(*noisy).sample, stock(*noisy).sample)


@torch.no_grad()
@pytest.mark.parametrize("num_heads", [8, None])
def test_round_trip_keeps_the_heads(tmp_path, num_heads, noisy):
    model = create(num_heads)
    model.save_pretrained(tmp_path)
    loaded = align_weights(EMUNet2DModel.from_pretrained(tmp_path))
    assert loaded.config.num_attention_heads == num_heads
    assert loaded.config.attention_head_dim == (None if num_heads else 8)
    assert torch.equal(loaded(*noisy).sample, model(*noisy).sample)
    again = EMUNet2DModel.from_config(loaded.config)
    assert {attention.heads for attention in attentions(again)} == {
        a.heads for a in attentions(model)
    }


def test_config_of_the_stock_model_takes_the_heads():
    stock = UNet2DModel(**SHAPE, attention_head_dim=4)
    model = EMUNet2DModel.from_config(dict(stock.config) | {"num_attention_heads": 2})
    assert {attention.heads for attention in attentions(model)} == {2}
    assert {a.to_q.weight.shape for a in attentions(model)} == {
        a.to_q.weight.shape for a in attentions(stock)
    }


def test_head_width_that_does_not_divide_is_no_obstacle():
    # the stock constructor with its default width of 8 would give attention of 8 of 12 channels
    model = EMUNet2DModel(**SHAPE | {"block_out_channels": (12, 12, 12)}, num_attention_heads=6)
    assert {tuple(a.to_q.weight.shape) for a in attentions(model)} == {(12, 12)}


@pytest.mark.parametrize("num_heads", [0, -2, 3])
def test_heads_must_divide_the_channels(num_heads):
    with pytest.raises(ValueError, match="must divide the channels of every attention"):
        EMUNet2DModel(**SHAPE, num_attention_heads=num_heads)


@torch.no_grad()
def test_resampling_without_convolutions_takes_means_and_repeats(tmp_path, noisy):
    model = create(2, resample_with_conv=False)
    assert not [name for name in model.state_dict() if "samplers" in name]
    seen = []
    for block, name in ((model.down_blocks[0], "downsamplers"), (model.up_blocks[0], "upsamplers")):
        getattr(block, name)[0].register_forward_hook(
            lambda _, args, output: seen.append((args[0], output))
        )
    expected = model(*noisy).sample
    (wide, narrow), (small, large) = seen
    torch.testing.assert_close(
        narrow, wide.reshape(*narrow.shape[:3], 2, narrow.shape[3], 2).mean((3, 5))
    )
    assert torch.equal(large, small.repeat_interleave(2, 2).repeat_interleave(2, 3))
    model.save_pretrained(tmp_path)
    assert torch.equal(
        align_weights(EMUNet2DModel.from_pretrained(tmp_path))(*noisy).sample, expected
    )


@torch.no_grad()
def test_autocast_stays_near_float32(noisy):
    model = create(8)
    twin = explicit(model, 8)
    expected = twin(*noisy).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast, slow = model(*noisy).sample, twin(*noisy).sample
    assert fast.dtype == torch.bfloat16
    assert relative(fast.float(), expected) < max(3 * relative(slow.float(), expected), 0.02)


def test_gradient_checkpointing_changes_no_gradient(noisy):
    gradients = []
    for checkpointing in (False, True):
        model = create(8).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*noisy).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-5)


def test_every_parameter_receives_a_gradient(noisy):
    model = create(8)
    model(*noisy).sample.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # keys share a bias that the softmax cancels: its gradient is zero up to rounding
    names = [
        n for n, p in model.named_parameters() if not p.grad.any() and not n.endswith("to_k.bias")
    ]
    assert not names
