"""What every training loop shares, and no loop: checkpoints, EMA, seeding, run log, strict configuration."""
