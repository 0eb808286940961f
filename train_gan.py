"""Train a StyleGAN on electron micrographs."""

from em_commands.train_gan import main

if __name__ == "__main__":
    main()
