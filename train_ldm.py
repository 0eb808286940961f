"""Train a latent diffusion model on micrographs: autoencoder, latents, denoiser, pipeline."""

from em_diffusion.presets import PRESETS
from em_diffusion.train import train_ldm
from em_training.cli import parse_preset, run_command

DESCRIPTION = """Train a latent diffusion model on electron micrographs.

  python train_ldm.py demo                                  the embedded synthetic micrographs, minutes on 2 CPU cores
  python train_ldm.py small --data FOLDER --out runs/mine   your own micrographs (TIFF, PNG, JPEG, BMP; 8 or 16 bit)
  accelerate launch train_ldm.py paper --data FOLDER        all GPUs of the machine

A run that was stopped or killed goes on when the same command is given again.
`python train_ldm.py PRESET --help` lists the flags of a preset with their values."""


def main():
    train_ldm(parse_preset(PRESETS, default="demo", description=DESCRIPTION))


if __name__ == "__main__":
    run_command(main)
