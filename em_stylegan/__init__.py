"""StyleGAN generators, discriminator, losses, loop and pipeline."""
