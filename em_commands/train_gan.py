"""Train a StyleGAN on micrographs."""

from em_commands.training import run_training
from em_stylegan.presets import PRESETS
from em_training.cli import run_command

DESCRIPTION = """Train a StyleGAN on electron micrographs.

  python train_gan.py demo
      the embedded synthetic micrographs, minutes on 2 CPU cores
  python train_gan.py small --data FOLDER --out runs/mine
      your own micrographs (TIFF, PNG, JPEG, BMP; 8 or 16 bits)
  accelerate launch train_gan.py paper --data FOLDER
      all GPUs of the machine

The same command resumes a run that was stopped or killed.
--push-to-hub REPO publishes the finished run (--private: for you alone).
`python train_gan.py PRESET --help` shows the main flags of a preset."""
MAIN_FLAGS = (
    "data",
    "out",
    "tiles.resolution",
    "tiles.downsample",
    "tiles.pixel_size_nm",
    "tiles.split",
    "tiles.label_bar",
    "generator.architecture",
    "training.num_images",
    "training.batch_size",
    "training.r1_gamma",
    "training.augmentation.mode",
    "precision",
    "seed",
)


def find_train():
    """Import the training, and torch with it, after the flags were read."""
    from em_stylegan.train import train_gan

    return train_gan


def run() -> None:
    run_training(
        PRESETS,
        find_train,
        command="train_gan.py",
        description=DESCRIPTION,
        main_flags=MAIN_FLAGS,
    )


def main() -> None:
    run_command(run)
