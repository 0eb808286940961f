"""Plain names and units of what training logs hold."""

HIDDEN = ("num_images_seen", "train_seconds", "images_per_second")  # no curves
CURVES = {  # key: title, unit
    "loss": ("Training loss", ""),
    "l1": ("Reconstruction error (L1)", "grey levels in [-1, 1]"),
    "l2": ("Reconstruction error (L2)", "grey levels squared"),
    "perceptual": ("Perceptual error", ""),
    "kl": ("KL divergence of the latents", "nats"),
    "commitment": ("Commitment loss", ""),
    "learning_rate": ("Learning rate", ""),
    "gradient_norm": ("Norm of the gradient", ""),
    "held_out_loss": ("Loss on held-out images", ""),
    "held_out_loss_q1": ("Held-out loss, least noise", ""),
    "held_out_loss_q2": ("Held-out loss, little noise", ""),
    "held_out_loss_q3": ("Held-out loss, much noise", ""),
    "held_out_loss_q4": ("Held-out loss, most noise", ""),
    "held_out_l1": ("Held-out reconstruction error (L1)", "grey levels in [-1, 1]"),
    "held_out_psnr": ("Held-out reconstruction (PSNR)", "dB"),
    "held_out_ssim": ("Held-out reconstruction (SSIM)", "1 is perfect"),
    "held_out_spectrum_error_db": ("Held-out error of the power spectrum", "dB"),
    "held_out_frechet_distance": ("Frechet distance to held-out images", ""),
    "codebook_usage": ("Share of codes in use", ""),
    "codebook_perplexity": ("Codes in even use (perplexity)", "codes"),
    "codes_revived": ("Unused codes that were replaced", "codes"),
    "loss_G": ("Loss of the generator", ""),
    "loss_D": ("Loss of the discriminator", ""),
    "scores_real": ("Discriminator on real images", "logit"),
    "scores_fake": ("Discriminator on generated images", "logit"),
    "gradient_norm_G": ("Norm of the generator's gradient", ""),
    "gradient_norm_D": ("Norm of the discriminator's gradient", ""),
    "learning_rate_G": ("Learning rate of the generator", ""),
    "learning_rate_D": ("Learning rate of the discriminator", ""),
    "r1": ("Gradient penalty (R1)", ""),
    "path_length": ("Path length of the generator", ""),
    "path_length_penalty": ("Path length penalty", ""),
    "augmentation_probability": ("Probability of augmentation", ""),
}


def name_curve(key: str) -> tuple[str, str]:
    """Return the title and the unit of a logged quantity."""
    return CURVES.get(key, (key.replace("_", " ").capitalize(), ""))
