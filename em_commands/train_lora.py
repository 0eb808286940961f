"""Tune a pretrained text-to-image model on electron micrographs."""

from em_commands.training import EPILOG, run_training
from em_stable_diffusion.family import FAMILY
from em_training.cli import run_command

DESCRIPTION = f"""Tune a pretrained text-to-image model on electron micrographs by adapters (LoRA).

  python train_lora.py demo
      Stable Diffusion 1.5 on the embedded synthetic micrographs, on one GPU
  python train_lora.py small --data FOLDER --out runs/mine
      your own micrographs (TIFF, PNG, JPEG, BMP; 8 or 16 bits)
  python train_lora.py small --data FOLDER --prompt "a micrograph of {{class}}"
      one prompt a class; --base FOLDER_OR_REPOSITORY takes another model of the same kind
  accelerate launch train_lora.py klein --data FOLDER
      FLUX.2 [klein] on all GPUs of the machine

The base is downloaded once. Adapters are published without it; see docs/lora.md for licences.
The same command resumes a run that was stopped or killed.
{EPILOG}
`python train_lora.py PRESET --help` shows the main flags of a preset."""


def main() -> None:
    run_command(lambda: run_training(FAMILY, description=DESCRIPTION))
