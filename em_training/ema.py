"""Exponential moving average of weights with a half-life counted in images."""

import copy

import torch


class EMA:
    """A second copy of `model` that follows its weights: w_ema <- b w_ema + (1 - b) w with b = 0.5^(batch_size / half-life).

    half_life_images: images after which an old weight counts half. ramp_up: the half-life is at most `ramp_up` times the images seen,
    so that the first random weights are soon forgotten; None for none.
    Buffers are copied, not averaged. `.model` is in eval mode and takes no gradient.
    """

    def __init__(
        self, model: torch.nn.Module, half_life_images: float, ramp_up: float | None = 0.05
    ):
        if half_life_images < 0:
            raise ValueError(
                f"the EMA's half-life is {half_life_images} images; it must be 0 (no averaging) or more"
            )
        self.half_life_images = half_life_images
        self.ramp_up = ramp_up
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._followed = None

    def decay(self, num_images_seen: int, batch_size: int) -> float:
        """Return b, in [0, 1), for a step of `batch_size` images that brought the count to `num_images_seen`."""
        half_life = self.half_life_images
        if self.ramp_up is not None:
            half_life = min(half_life, num_images_seen * self.ramp_up)
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, model: torch.nn.Module, num_images_seen: int, batch_size: int) -> None:
        """Move the average towards `model`, whose last step brought the count to `num_images_seen`."""
        decay = self.decay(num_images_seen, batch_size)
        if (
            model is not self._followed
        ):  # listing the tensors of a large model takes longer than averaging them on a GPU
            self._followed = model
            self._weights, self._averages = (
                [p.detach() for p in m.parameters()] for m in (model, self.model)
            )
            self._buffers = list(zip(self.model.buffers(), model.buffers()))
        if self._averages:
            torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        for average, buffer in self._buffers:
            average.copy_(buffer)

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state)
