"""Move the weights of an original checkpoint into a diffusers model, and account for the others."""

import re
from collections import Counter
from pathlib import Path

import torch

from em_training.torch_checkpoint import copy_tensor, read_torch_checkpoint

NOT_NEEDED = {
    "loss and discriminator": r"(first_stage_model\.)?(loss|discriminator)\.",
    "averages of the weights": r"model_ema\.",
    "noise schedule": r"(betas|logvar|scale_factor|lvlb_weights|posterior_.*"
    r"|.*alphas_cumprod.*|.*recipm?1?_alphas.*)$",
    "codebook statistics": r"(first_stage_model\.)?quantize\."
    r"(used|embedding\.(cluster_size|embed_avg))$",
    "colours of a segmentation": r"(first_stage_model\.)?colorize$",
}
"""What our models have no use for -> its names in a checkpoint."""


class OriginalWeights:
    """The tensors of a checkpoint by name, and which of them were used."""

    def __init__(self, path):
        self.path = Path(path)
        contents = read_torch_checkpoint(self.path)
        if isinstance(contents, dict) and isinstance(contents.get("state_dict"), dict):
            contents = contents["state_dict"]
        if not isinstance(contents, dict) or not any(
            isinstance(value, torch.Tensor) for value in contents.values()
        ):
            raise ValueError(
                f"{self.path} holds no `state_dict` of tensors by name: it is not a checkpoint of "
                "taming-transformers or latent-diffusion."
            )
        self.tensors, self._used = contents, set()

    def __contains__(self, name):
        return name in self.tensors

    def has_prefix(self, prefix):
        """Return whether the name of any tensor begins with `prefix`."""
        return any(isinstance(name, str) and name.startswith(prefix) for name in self.tensors)

    def read(self, name) -> torch.Tensor:
        """Return a copy of the tensor of this name, float32 if it is a floating-point one."""
        value = self.tensors[name]
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} in {self.path} is no tensor, but {value!r}.")
        self._used.add(name)
        return copy_tensor(value)

    def read_number(self, name) -> float:
        """Return a tensor of one element as a number."""
        tensor = self.read(name)
        if tensor.numel() != 1 or not torch.isfinite(tensor).all():
            raise ValueError(f"{name} in {self.path} is no number.")
        return float(tensor)

    def load(self, model, find_source, *, what, ema_name=None, use_ema=None):
        """Give `model`, which may be on the meta device, all tensors that it needs.

        Args:
            find_source: Name in `model` -> (name in the checkpoint, function of the tensor or
                None).
            what: What the model is called in errors.
            ema_name: Name in the checkpoint -> name of its average. None: there are no averages.
            use_ema: True for averages, False for raw weights, None for averages if there are any.
        """
        target = model.state_dict()
        sources = {name: find_source(name) for name in target}
        raw = {source for source, _ in sources.values()}
        stored = {source: source for source in raw}
        averages = {source: ema_name(source) for source in raw} if ema_name is not None else {}
        has_averages = any(name in self.tensors for name in averages.values())
        if use_ema and not has_averages:
            raise ValueError(f"{self.path} holds no averaged weights of {what}; load the raw ones.")
        if has_averages and use_ema is not False:
            stored = averages
        self._refuse_missing(stored.values(), what)
        state = {}
        for name, (source, transform) in sources.items():
            tensor = self.read(stored[source])
            tensor = tensor if transform is None else transform(tensor)
            while tensor.dim() > target[name].dim() and tensor.shape[-1] == 1:
                tensor = tensor[..., 0]  # a convolution of size 1 that is a linear layer here
            if tensor.shape != target[name].shape:
                raise ValueError(
                    f"{stored[source]} is {list(tensor.shape)} in {self.path}, and "
                    f"{list(target[name].shape)} by the yaml: it is the yaml of another model; "
                    "name the right one with --config."
                )
            state[name] = tensor.contiguous()
        self._used.update(raw & self.tensors.keys())
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    def _refuse_missing(self, needed, what):
        missing = sorted(name for name in needed if name not in self.tensors)
        if not missing:
            return
        if len(missing) > len(needed) / 2:
            held = ", ".join(str(name) for name in list(self.tensors)[:3])
            raise ValueError(
                f"{self.path} is not the checkpoint of {what}: it holds {held} and so on, and no "
                f"{missing[0]}."
            )
        raise ValueError(
            f"{self.path} has no {_list(missing)} for {what}: it is damaged, or the yaml is that "
            "of another model; name the right one with --config."
        )

    def count_unused(self, *others) -> Counter:
        """Count the tensors that no model took, by what they are.

        `others` are prefixes of models that were not asked for. Raises `ValueError` for a tensor
        that no part of the yaml explains.
        """
        unused, unexpected = Counter(), []
        for name in map(str, self.tensors.keys() - self._used):
            kinds = [kind for kind, pattern in NOT_NEEDED.items() if re.match(pattern, name)]
            if not kinds and name.startswith(others):
                kinds = ["other model"]
            if kinds:
                unused[kinds[0]] += 1
            else:
                unexpected.append(name)
        if unexpected:
            raise ValueError(
                f"{self.path} also holds {_list(sorted(unexpected))}, which the yaml does not "
                "explain: it is the yaml of another model; name the right one with --config."
            )
        return unused


def _list(names, count=3):
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
