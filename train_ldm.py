"""Train a latent diffusion model on electron micrographs."""

from em_commands.train_ldm import main

if __name__ == "__main__":
    main()
