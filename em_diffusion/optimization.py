"""The optimizer, its learning rate as a function of the images seen, and the average weights."""

import math

import torch

from em_training import EMA


def learning_rate_at(config, num_images_seen: int) -> float:
    """Return the learning rate of the step that begins after `num_images_seen` images.

    It is a linear warm-up, then config.learning_rate_decay: "cosine" (to zero at num_images),
    "constant", or "inverse_sqrt", which falls from `learning_rate_reference_images` on. The last
    two do not depend on num_images.
    """
    rate = config.learning_rate
    if config.warmup_images > 0:
        rate *= min(1.0, (num_images_seen + config.batch_size) / config.warmup_images)
    if config.learning_rate_decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, num_images_seen / config.num_images)))
    if config.learning_rate_decay == "inverse_sqrt":
        rate /= math.sqrt(max(1.0, num_images_seen / config.learning_rate_reference_images))
    return rate


def set_learning_rate(optimizer, rate: float):
    """Set the learning rate of all parameter groups, times their `rate_scale` if they have one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)


def create_optimizer(parameters, config):
    """Create Adam without weight decay, as one fused kernel for all parameters."""
    return torch.optim.Adam(
        parameters, lr=config.learning_rate, betas=config.adam_betas, fused=True
    )


def create_ema(model, config) -> EMA:
    """Create the average of the weights. Random first ones are soon forgotten, given ones stay."""
    ramp = {} if config.init_from is None else {"ramp_up": None}
    return EMA(model, config.ema_half_life_images, **ramp)
