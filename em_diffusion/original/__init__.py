"""Read checkpoints of taming-transformers, latent-diffusion and DALL-E's dVAE."""
