"""The latent diffusion model: autoencoder, latents, denoiser, pipeline."""
