"""The adapters: what they change, merged and not, and in diffusers' own files."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from em_stable_diffusion.adapters import add_adapters, find_layers, use_weights
from em_stable_diffusion.config import AdapterConfig, LoRAConfig
from em_stable_diffusion.em_adapters import AdaptedLinear, LowRank


def make(base, seed=0, **lora):
    """A denoiser with adapters, and the adapters."""
    config = LoRAConfig(seed=seed, lora=AdapterConfig(**{"rank": 3} | lora))
    denoiser = base.load_denoiser()
    return denoiser, add_adapters(denoiser, base.source, config, base.targets)


def shake(adapters):
    """Give the second matrices, which begin as 0, other values."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, pair in adapters.pairs():
            pair.lora_B.weight.normal_(std=0.3, generator=rng)


def predict(base, denoiser):
    """What the denoiser answers to fixed latents and prompts, flat."""
    rng = torch.Generator().manual_seed(0)
    if base.source.kind == "stable-diffusion":
        inputs = torch.randn(2, 4, 8, 8, generator=rng), torch.tensor([10, 700])
        return denoiser(*inputs, torch.randn(2, 5, 16, generator=rng)).sample.flatten()
    stock = base.model.pipeline_class
    embeddings = torch.randn(2, 5, 24, generator=rng)
    latents = torch.randn(2, 16, 4, 4, generator=rng)
    return denoiser(
        hidden_states=stock._pack_latents(latents),
        timestep=torch.tensor([0.1, 0.7]),
        guidance=None,
        encoder_hidden_states=embeddings,
        txt_ids=stock._prepare_text_ids(embeddings),
        img_ids=stock._prepare_latent_ids(latents),
    ).sample.flatten()


@torch.no_grad()
def test_they_change_nothing_at_first(base):
    denoiser, adapters = make(base)
    torch.testing.assert_close(predict(base, denoiser), predict(base, base.load_denoiser()))
    shake(adapters)
    assert (predict(base, denoiser) - predict(base, base.load_denoiser())).abs().max() > 1e-3


def test_they_alone_are_trained(base):
    denoiser, adapters = make(base)
    trained = {id(each) for each in denoiser.parameters() if each.requires_grad}
    assert trained == {id(each) for each in adapters.parameters()}
    assert all("lora_" in name for name, each in denoiser.named_parameters() if each.requires_grad)
    predict(base, denoiser).square().sum().backward()
    assert all(pair.lora_B.weight.grad.abs().max() > 0 for _, pair in adapters.pairs())


@torch.no_grad()
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_merged_equals_unmerged(base, alpha):
    """W x + alpha / rank B (A x) is (W + alpha / rank B A) x."""
    denoiser, adapters = make(base, alpha=alpha)
    shake(adapters)
    merged = adapters.merge_into(base.load_denoiser())
    torch.testing.assert_close(predict(base, merged), predict(base, denoiser), rtol=1e-3, atol=1e-4)
    name, pair = next(adapters.pairs())
    before = base.load_denoiser().get_parameter(f"{name}.weight")
    change = merged.get_parameter(f"{name}.weight") - before
    scale = 1.0 if alpha is None else 0.5
    expected = scale * pair.lora_B.weight @ pair.lora_A.weight
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 3


@torch.no_grad()
def test_diffusers_loads_them(base, tmp_path):
    """By the stock pipeline, without this package; alpha is not the rank."""
    denoiser, adapters = make(base, alpha=1.5)
    shake(adapters)
    adapters.save_lora_weights(tmp_path)
    pipeline = base.model.make_pipeline(
        base.load_denoiser(), base.load_vae(), base.load_scheduler()
    )
    pipeline.load_lora_weights(tmp_path)
    loaded = getattr(pipeline, base.model.denoiser)
    torch.testing.assert_close(predict(base, loaded), predict(base, denoiser))
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) == 2 * len(adapters.config.layers)
    assert all(name.startswith(f"{base.model.denoiser}.") for name in names)


def test_they_are_saved_and_loaded(base, tmp_path):
    _, adapters = make(base, alpha=1.5)
    shake(adapters)
    adapters.save_pretrained(tmp_path)
    loaded = type(adapters).from_pretrained(tmp_path)
    assert loaded.scale == 0.5
    for (name, pair), (other_name, other) in zip(adapters.pairs(), loaded.pairs(), strict=True):
        assert name == other_name
        assert torch.equal(pair.lora_A.weight, other.lora_A.weight)
        assert torch.equal(pair.lora_B.weight, other.lora_B.weight)


def test_first_weights_depend_on_the_seed_alone(base):
    torch.manual_seed(5)
    _, first = make(base)
    torch.manual_seed(6)
    _, second = make(base)
    _, other = make(base, seed=1)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() == 0 or not torch.equal(a, c)


@torch.no_grad()
def test_other_weights_are_used_for_a_while(base):
    denoiser, adapters = make(base)
    average = deepcopy(adapters)
    shake(average)
    before = predict(base, denoiser)
    with use_weights(adapters, average):
        assert (predict(base, denoiser) - before).abs().max() > 1e-3
    assert torch.equal(predict(base, denoiser), before)
    with pytest.raises(KeyError), use_weights(adapters, average):
        raise KeyError
    assert torch.equal(predict(base, denoiser), before)


def test_targets_are_ends_of_names(base):
    denoiser = base.load_denoiser()
    layers = find_layers(denoiser, ("to_q",))
    assert layers
    assert all(name.endswith(".to_q") for name in layers)
    assert find_layers(denoiser, base.targets).keys() > layers.keys()
    with pytest.raises(ValueError, match=r"lora\.targets has 'to_z', but no linear .* to_q"):
        find_layers(denoiser, ("to_q", "to_z"))


def test_all_attention_gets_adapters_by_default(base):
    denoiser = base.load_denoiser()
    layers = find_layers(denoiser, base.targets)
    attention = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn" in name and "_add_" not in name
    ]
    rest = {name for name in attention if name not in layers}
    assert all(".add_" in name or ".to_add_out" in name for name in rest), rest


def test_adapters_of_another_base_are_refused(base):
    _, adapters = make(base)
    denoiser = base.load_denoiser()
    name = next(iter(adapters.config.layers))
    place, _, last = name.rpartition(".")
    setattr(denoiser.get_submodule(place), last, torch.nn.Linear(3, 5))
    with pytest.raises(ValueError, match=r"base has one of \[5, 3\]\. It is another base"):
        adapters.merge_into(denoiser)


@torch.no_grad()
def test_a_narrow_base_keeps_exact_adapters(base):
    config = replace(LoRAConfig(), lora=AdapterConfig(rank=2))
    denoiser = base.load_denoiser()
    adapters = add_adapters(denoiser, base.source, config, base.targets, dtype=torch.bfloat16)
    assert denoiser.dtype == torch.bfloat16
    assert {each.dtype for each in adapters.parameters()} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_put_in_equals_merged(base, alpha):
    _, adapters = make(base, alpha=alpha)
    shake(adapters)
    merged = adapters.merge_into(base.load_denoiser())
    adapted = adapters.put_into(base.load_denoiser())
    assert {each.dtype for each in adapted.parameters()} == {torch.float32}
    torch.testing.assert_close(predict(base, adapted), predict(base, merged), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [2, 8, 32])
def test_small_changes_are_kept_in_16_bits(size):
    """A change that is `size` times smaller than the rounding of the weights in bfloat16.

    The slope says how much of it is there: 1 for all, 0 for nothing.
    """
    rng = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(128, 128).to(torch.bfloat16)
    change = LowRank(128, 128, 4)
    for weight in (layer.weight, change.lora_A.weight, change.lora_B.weight):
        weight.copy_(torch.randn(weight.shape, generator=rng))
    product = change.lora_B.weight @ change.lora_A.weight
    rounding = layer.weight.float().abs().mean() / 2**9
    change.lora_B.weight.mul_(rounding / size / product.abs().mean())
    x = torch.randn(8192, 128, generator=rng).to(torch.bfloat16)
    expected = x.float() @ (change.lora_B.weight @ change.lora_A.weight).T

    def find_slope(changed):
        moved = changed.float() - layer(x).float()
        return float((moved * expected).sum() / expected.square().sum())

    assert find_slope(AdaptedLinear(layer, change, 1.0)(x)) == pytest.approx(1, abs=0.1)
    merged = layer.weight.float() + change.lora_B.weight @ change.lora_A.weight
    assert find_slope(F.linear(x, merged.to(torch.bfloat16), layer.bias)) < 0.7
