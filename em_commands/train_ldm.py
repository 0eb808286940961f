"""Train a latent diffusion model on micrographs."""

from em_commands.training import run_training
from em_diffusion.presets import PRESETS
from em_training.cli import run_command

DESCRIPTION = """Train a latent diffusion model on electron micrographs.

  python train_ldm.py demo
      the embedded synthetic micrographs, minutes on 2 CPU cores
  python train_ldm.py small --data FOLDER --out runs/mine
      your own micrographs (TIFF, PNG, JPEG, BMP; 8 or 16 bits)
  accelerate launch train_ldm.py paper --data FOLDER
      all GPUs of the machine

The same command resumes a run that was stopped or killed.
--push-to-hub REPO publishes the finished run (--private: for you alone).
`python train_ldm.py PRESET --help` shows the main flags of a preset."""
MAIN_FLAGS = (
    "data",
    "out",
    "tiles.resolution",
    "tiles.downsample",
    "tiles.pixel_size_nm",
    "tiles.split",
    "tiles.label_bar",
    "autoencoder.num_images",
    "autoencoder.batch_size",
    "denoiser.num_images",
    "denoiser.batch_size",
    "last_stage",
    "precision",
    "seed",
)


def find_train():
    """Import the training, and torch with it, after the flags were read."""
    from em_diffusion.train import train_ldm

    return train_ldm


def run() -> None:
    run_training(
        PRESETS,
        find_train,
        command="train_ldm.py",
        description=DESCRIPTION,
        main_flags=MAIN_FLAGS,
    )


def main() -> None:
    run_command(run)
