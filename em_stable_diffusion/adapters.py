"""Adapters in a denoiser by peft, and the same weights as a model of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from em_stable_diffusion.base_source import BaseSource
from em_stable_diffusion.config import LoRAConfig
from em_stable_diffusion.em_adapters import EMAdapters
from em_training import seed_for

NAME = "default"  # of the adapter, in peft


def add_adapters(
    denoiser: Any,
    source: BaseSource,
    config: LoRAConfig,
    targets: tuple[str, ...],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> EMAdapters:
    """Put adapters into a denoiser by peft, and bring it to `device`; return the adapters.

    The parameters of the returned model are those in the denoiser. They are float32 and depend on
    the seed alone; at first they change nothing. All other weights are frozen.

    Args:
        denoiser: On the CPU, float32.
        targets: Used if the configuration names none.
        dtype: Of the frozen weights.

    Raises:
        ValueError: peft is not installed, or a target names no layer.
    """
    lora = config.lora
    layers = find_layers(denoiser, lora.targets or targets)
    alpha = float(lora.rank if lora.alpha is None else lora.alpha)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "adapters"))
        denoiser.add_adapter(
            import_peft().LoraConfig(
                r=lora.rank,
                lora_alpha=alpha,
                target_modules=list(layers),
                init_lora_weights="gaussian",
            )
        )
    for parameter in denoiser.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    denoiser.to(device)
    adapters = EMAdapters(
        source.kind,
        layers,
        lora.rank,
        alpha,
        source.repository,
        source.revision,
        variants=source.find_variants() or None,
    )
    for name, pair in adapters.pairs():
        layer: Any = denoiser.get_submodule(name)
        pair.lora_A.weight = layer.lora_A[NAME].weight
        pair.lora_B.weight = layer.lora_B[NAME].weight
    return adapters


def find_layers(denoiser: nn.Module, targets: tuple[str, ...]) -> dict[str, list[int]]:
    """Return {name: [outputs, inputs]} of the linear layers whose names end with a target.

    Raises:
        ValueError: A target names no linear layer.
    """
    linear = {
        name: list(module.weight.shape)
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear)
    }
    found: dict[str, list[int]] = {}
    for target in targets:
        names = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not names:
            ends = sorted({name.rpartition(".")[2] for name in linear} - set("0123456789"))
            raise ValueError(
                f"lora.targets has {target!r}, but no linear layer of this base ends so. There "
                f"are: {', '.join(ends)}. Use --lora.targets."
            )
        found |= {name: linear[name] for name in names}
    return dict(sorted(found.items()))  # as its file has them


def import_peft() -> Any:
    """Import peft; raise `ValueError` if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "Training LoRA needs peft. Install it with: pip install 'em-synthesis[lora]'."
        ) from error
    return peft


@contextmanager
def use_weights(adapters: nn.Module, others: nn.Module) -> Iterator[None]:
    """Let `adapters` have the weights of `others` within the block."""
    weights: list[torch.Tensor] = list(adapters.parameters())
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        torch._foreach_copy_(weights, list(others.parameters()))
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)
