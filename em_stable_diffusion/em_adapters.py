"""Low-rank adapters of a pretrained denoiser (LoRA), as a model of their own.

It needs only torch, diffusers and the standard library.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from em_stable_diffusion.em_base_models import BASE_MODELS, VARIANTS
from em_training.em_saved_model import SavesSafetensors


class LowRank(nn.Module):
    """The change of one linear layer: lora_B lora_A, of a rank below that of the weight."""

    def __init__(self, num_out: int, num_in: int, rank: int):
        super().__init__()
        self.lora_A = nn.Linear(num_in, rank, bias=False)
        self.lora_B = nn.Linear(rank, num_out, bias=False)


class AdaptedLinear(nn.Module):
    """A linear layer with its change beside it: W x + s lora_B (lora_A x), as one product.

    The change is not added to the weight, whose rounding to 16 bits could swallow it; and the sum
    is rounded once, so that a change below the rounding of W x is kept on average.

    Args:
        layer: The layer of the base.
        change: What is added to its weight, divided by `scale`.
        scale: s above.
    """

    def __init__(self, layer: Any, change: LowRank, scale: float):
        super().__init__()
        weight = layer.weight.detach()
        lora_A = change.lora_A.weight.detach().to(weight)  # [rank, in]
        lora_B = (scale * change.lora_B.weight.detach().float()).to(weight)  # [out, rank]
        self.weight = nn.Parameter(torch.cat([weight, lora_B], dim=1), requires_grad=False)
        self.lora_A = nn.Parameter(lora_A, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, with the change, of inputs [..., in]."""
        x = torch.cat([x, F.linear(x, self.lora_A)], dim=-1)  # [..., in + rank]
        return F.linear(x, self.weight, self.bias)


class EMAdapters(SavesSafetensors, ModelMixin, ConfigMixin):
    """Adapters: a weight W of the base becomes W + alpha / rank * lora_B lora_A.

    From Hu et al. 2022, arXiv:2106.09685, section 4.

    Args:
        base: Kind of the base, a key of `BASE_MODELS`.
        layers: {name of a linear layer of the base's denoiser: [outputs, inputs]}.
        rank: Rank of the change of each weight.
        alpha: See above.
        repository, revision: Repository on the Hub, and commit, that hold the base; None for a base
            that is saved with the model.
        colourfulness: That of images drawn after the training, see `draw_grey`; None if unknown.
        variants: {part of the base: name of its weight files}, where there are no plain ones.

    Raises:
        ValueError: The base or a variant is not known.
    """

    @register_to_config
    def __init__(
        self,
        base: str,
        layers: dict[str, list[int]],
        rank: int = 16,
        alpha: float = 16.0,
        repository: str | None = None,
        revision: str | None = None,
        colourfulness: float | None = None,
        variants: dict[str, str] | None = None,
    ):
        super().__init__()
        if base not in BASE_MODELS:
            raise ValueError(f"`base` is {base!r}; known are {', '.join(BASE_MODELS)}.")
        for variant in (variants or {}).values():  # a part of the names of files
            if variant not in VARIANTS:
                raise ValueError(f"A variant is {variant!r}; known are {', '.join(VARIANTS)}.")
        self.changes = nn.Module()
        for name, (num_out, num_in) in layers.items():
            *parents, last = name.split(".")
            place = self.changes
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(last, LowRank(num_out, num_in, rank))

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied with."""
        return self.config.alpha / self.config.rank

    def pairs(self) -> Iterator[tuple[str, LowRank]]:
        """Yield the name of each layer of the base, and its change."""
        for name in self.config.layers:
            pair = self.changes.get_submodule(name)
            assert isinstance(pair, LowRank)
            yield name, pair

    @torch.no_grad()
    def merge_into(self, denoiser: Any) -> Any:
        """Add the changes to the weights of the base's denoiser, in place; return it.

        Sums are computed in float32. In 16 bits, they lose changes below the rounding of the
        weights: use `put_into`.

        Raises:
            ValueError: The denoiser lacks a layer, or has one of another size.
        """
        for layer, pair in self._find_layers(denoiser).values():
            change = pair.lora_B.weight.float() @ pair.lora_A.weight.float()
            layer.weight.copy_(layer.weight.float() + self.scale * change.to(layer.weight.device))
        return denoiser

    @torch.no_grad()
    def put_into(self, denoiser: Any) -> Any:
        """Replace layers of the base's denoiser by `AdaptedLinear`, in place; return it.

        Raises:
            ValueError: The denoiser lacks a layer, or has one of another size.
        """
        for name, (layer, pair) in self._find_layers(denoiser).items():
            place, _, last = name.rpartition(".")
            adapted = AdaptedLinear(layer, pair, self.scale)
            setattr(denoiser.get_submodule(place), last, adapted)
        return denoiser

    def _find_layers(self, denoiser):
        """Return {name: (layer of the base's denoiser, its change)}, see `merge_into`."""
        modules, found = dict(denoiser.named_modules()), {}
        for name, pair in self.pairs():
            weight = getattr(modules.get(name), "weight", None)
            if weight is None or list(weight.shape) != list(self.config.layers[name]):
                size = "no such layer" if weight is None else f"one of {list(weight.shape)}"
                raise ValueError(
                    f"These adapters change the layer {name} of {self.config.layers[name]}, but "
                    f"the base has {size}. It is another base than they were trained for."
                )
            found[name] = modules[name], pair
        return found

    def save_lora_weights(self, folder: str | os.PathLike) -> None:
        """Write pytorch_lora_weights.safetensors, which `load_lora_weights` of diffusers reads."""
        base = BASE_MODELS[self.config.base]
        weights = {
            f"{name}.{part}.weight": getattr(pair, part).weight.detach().cpu().contiguous()
            for name, pair in self.pairs()
            for part in ("lora_A", "lora_B")
        }
        facts = {
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "target_modules": sorted(self.config.layers),
        }
        base.pipeline_class.save_lora_weights(
            folder,
            **{
                f"{base.denoiser}_lora_layers": weights,
                f"{base.denoiser}_lora_adapter_metadata": facts,
            },
        )
