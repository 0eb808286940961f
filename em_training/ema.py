"""Exponential moving average of weights with a half-life counted in images."""

import copy

import torch


class EMA:
    """A copy of `model` that follows its weights: w_ema <- b w_ema + (1 - b) w.

    b = 0.5^(batch_size / half-life). Buffers are copied, not averaged. `.model` is in eval mode and
    takes no gradient.

    Args:
        half_life_images: Images after which an old weight counts half.
        ramp_up: The half-life is at most this share of the images seen, so that the random first
            weights are soon forgotten; None for no such limit.
    """

    def __init__(
        self, model: torch.nn.Module, half_life_images: float, ramp_up: float | None = 0.05
    ):
        self.half_life_images = half_life_images
        self.ramp_up = ramp_up
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._followed: torch.nn.Module | None = None

    def decay(self, num_images_seen: int, batch_size: int) -> float:
        """Return b, in [0, 1), of a step that brought the count to `num_images_seen`."""
        half_life = self.half_life_images
        if self.ramp_up is not None:
            half_life = min(half_life, num_images_seen * self.ramp_up)
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, model: torch.nn.Module, num_images_seen: int, batch_size: int) -> None:
        """Move the average towards `model` after a step."""
        decay = self.decay(num_images_seen, batch_size)
        if model is not self._followed:
            # listing the tensors of a large model takes longer than averaging them on a GPU
            self._followed = model
            self._weights = [p.detach() for p in model.parameters()]
            self._averages = [p.detach() for p in self.model.parameters()]
            self._buffers = list(zip(self.model.buffers(), model.buffers()))
        if self._averages:
            torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        for average, buffer in self._buffers:
            average.copy_(buffer)

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state)
