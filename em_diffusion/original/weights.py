"""The weights of an original checkpoint: which of them a model of ours takes, and what becomes of the others."""

import re
from collections import Counter
from pathlib import Path

import torch

from em_training.torch_checkpoint import copy_tensor, read_torch_checkpoint

NOT_NEEDED = {
    "loss and discriminator": r"(first_stage_model\.)?(loss|discriminator)\.",
    "averages of the weights": r"model_ema\.",
    "noise schedule": r"(betas|logvar|scale_factor|lvlb_weights|.*alphas_cumprod.*|posterior_.*|.*recipm?1?_alphas.*)$",
    "codebook statistics": r"(first_stage_model\.)?quantize\.(used|embedding\.(cluster_size|embed_avg))$",
    "colours of a segmentation": r"(first_stage_model\.)?colorize$",
}
"""Names in a checkpoint that no model of ours has a use for, by what they are: they are counted and left."""


class OriginalWeights:
    """The tensors of a checkpoint by name. `load` moves them into a model; `count_left` says what nobody took.

    Raises `ValueError` in one sentence, with the way out, for a file of another kind.
    """

    def __init__(self, path):
        self.path = Path(path)
        contents = read_torch_checkpoint(self.path)
        if isinstance(contents, dict) and isinstance(contents.get("state_dict"), dict):
            contents = contents["state_dict"]
        if not isinstance(contents, dict) or not any(
            isinstance(value, torch.Tensor) for value in contents.values()
        ):
            raise ValueError(
                f"{self.path} holds no `state_dict` of tensors by name: it is not a checkpoint of taming-transformers or "
                "latent-diffusion."
            )
        self.tensors, self._used = contents, set()

    def __contains__(self, name):
        return name in self.tensors

    def has_prefix(self, prefix):
        """Whether any tensor's name begins with this."""
        return any(isinstance(name, str) and name.startswith(prefix) for name in self.tensors)

    def read(self, name):
        """The tensor of this name, float32 where it is a floating one."""
        value = self.tensors[name]
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} in {self.path} is no tensor, but {value!r}.")
        self._used.add(name)
        return copy_tensor(value)

    def load(self, model, find_source, *, what, ema_name=None, use_ema=None):
        """Give `model`, which may be on the meta device, the tensors that it needs, all of them; return it in evaluation mode.

        find_source: name in `model` -> (name in the checkpoint, function of the tensor, or None for the tensor itself).
        ema_name: name in the checkpoint -> that of its average; None where there are none.
        use_ema: True for the averages, False for the raw weights, None for averages where the checkpoint has them.
        """
        sources = {name: find_source(name) for name in model.state_dict()}
        raw = {source for source, _ in sources.values()}
        stored = {source: source for source in raw}
        averages = {source: ema_name(source) for source in raw} if ema_name is not None else {}
        num_averages = sum(name in self.tensors for name in averages.values())
        if use_ema and not num_averages:
            raise ValueError(f"{self.path} holds no averaged weights of {what}; load the raw ones.")
        if num_averages and use_ema is not False:
            stored = averages
        self._refuse_missing(
            sorted(name for name in stored.values() if name not in self.tensors), len(stored), what
        )
        state = {}
        for name, target in model.state_dict().items():
            source, transform = sources[name]
            tensor = self.read(stored[source])
            tensor = tensor if transform is None else transform(tensor)
            while tensor.dim() > target.dim() and tensor.shape[-1] == 1:
                tensor = tensor[..., 0]  # a convolution of size 1 that is a linear layer here
            if tensor.shape != target.shape:
                raise ValueError(
                    f"{stored[source]} is {list(tensor.shape)} in {self.path}, and {list(target.shape)} by the yaml: it is "
                    "the yaml of another model; name the right one with --config."
                )
            state[name] = tensor.contiguous()
        self._used.update(raw & self.tensors.keys())
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    def _refuse_missing(self, missing, num_needed, what):
        if not missing:
            return
        if len(missing) > num_needed / 2:
            held = ", ".join(str(name) for name in list(self.tensors)[:3])
            raise ValueError(
                f"{self.path} is not the checkpoint of {what}: it holds {held} and so on, and no {missing[0]}."
            )
        raise ValueError(
            f"{self.path} has no {_list(missing)} for {what}: it is damaged, or the yaml is that of another model; name the right "
            "one with --config."
        )

    def count_left(self, *others) -> Counter:
        """How many tensors were left, by what they are. `others`: beginnings of names that belong to models which nobody asked for.

        Raises `ValueError` for a tensor that no part of the yaml explains.
        """
        left, unexpected = Counter(), []
        for name in self.tensors.keys() - self._used:
            kind = next(
                (kind for kind, pattern in NOT_NEEDED.items() if re.match(pattern, str(name))), None
            )
            if kind is None and str(name).startswith(others or ("\0",)):
                kind = "another model's"
            if kind is None:
                unexpected.append(str(name))
            else:
                left[kind] += 1
        if unexpected:
            raise ValueError(
                f"{self.path} also holds {_list(sorted(unexpected))}, which the yaml does not explain: it is the yaml of another "
                "model; name the right one with --config."
            )
        return left

    def read_number(self, name) -> float:
        """A tensor of one element as a number."""
        tensor = self.read(name)
        if tensor.numel() != 1 or not torch.isfinite(tensor).all():
            raise ValueError(f"{name} in {self.path} is no number.")
        return float(tensor)


def _list(names, count=3):
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
