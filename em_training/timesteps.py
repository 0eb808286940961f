"""The noise levels that a denoiser is trained at."""

import torch


def draw_timesteps(
    count: int,
    num_train_timesteps: int,
    rng: torch.Generator,
    density: str = "uniform",
    continuous: bool = False,
) -> torch.Tensor:
    """Draw `count` timesteps that are spread evenly over their distribution.

    One uniform offset shifts a comb of `count` teeth over the quantiles. Each timestep is drawn as
    often as by independent draws, but a batch covers the range, which lowers the variance of its
    loss.

    Args:
        density: "uniform", or "logit_normal": sigmoid(u) of the range for a standard normal u.
        continuous: Return float32 anywhere in 0 .. num_train_timesteps, for flow matching, not
            int64 in 0 .. num_train_timesteps - 1.
    """
    offset = torch.rand((), generator=rng, device=rng.device)
    quantiles = (torch.arange(count, device=rng.device) + offset) / count  # [count] in [0, 1)
    if density == "logit_normal":
        quantiles = torch.special.ndtri(quantiles).sigmoid()
    timesteps = quantiles * num_train_timesteps
    return timesteps if continuous else timesteps.long().clamp(0, num_train_timesteps - 1)


def average_losses(
    losses: torch.Tensor, timesteps: torch.Tensor, num_train_timesteps: int
) -> dict[str, torch.Tensor]:
    """Return mean losses on held-out images.

    Args:
        losses: Of each image, [N].
        timesteps: Of each image, [N] in 0 .. num_train_timesteps.

    Returns:
        "held_out_loss" over all, and "held_out_loss_q1" to "held_out_loss_q4" over those quarters
        of the timesteps, from the least noise to the most, that have any.
    """
    quarters = (timesteps * 4 / num_train_timesteps).long().clamp(max=3)  # [N]
    means = {"held_out_loss": losses.mean()}
    for quarter in quarters.unique().tolist():
        in_quarter = (quarters == quarter).to(losses.device)
        means[f"held_out_loss_q{quarter + 1}"] = losses[in_quarter].mean()
    return means
