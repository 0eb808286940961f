"""Pictures of what a StyleGAN has learned: walks, mixed styles, truncation, projection."""
