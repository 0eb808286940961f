"""Train a translation from one kind of electron micrographs to another."""

import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from em_commands.training import EPILOG, run_training
from em_cyclegan.family import FAMILY
from em_training.cli import run_command
from em_training.flags import UsageError

DESCRIPTION = f"""Train a CycleGAN, which translates electron micrographs of a source, such as
simulated ones, to the style of a target. The two sets need not show the same places.

  python train_cyclegan.py demo
      embedded synthetic micrographs -> another microscope, minutes on 2 CPU cores
  python train_cyclegan.py small synthetic FOLDER --out runs/mine
      simulated micrographs with labels -> your own (TIFF, PNG, JPEG, BMP; 8 or 16 bits)
  accelerate launch train_cyclegan.py paper SOURCE TARGET
      all GPUs of the machine

SOURCE and TARGET are short for --source and --data. The same command resumes a run that was
stopped or killed.
{EPILOG}
`python train_cyclegan.py PRESET --help` shows the main flags of a preset."""


def name_sources(argv: Sequence[str], presets: Sequence[str]) -> list[str]:
    """Return the words of the command line with SOURCE and TARGET as flags."""
    has_preset = bool(argv) and argv[0] in presets
    preset, words = list(argv[:has_preset]), list(argv[has_preset:])
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    if count == 0:
        return list(argv)
    if not preset and (count == 1 or (count == 3 and get_close_matches(words[0], presets))):
        return list(argv)  # a mistyped preset
    if count != 2:
        raise UsageError(
            f"Give SOURCE and TARGET, not {shlex.join(words[:count])}: python train_cyclegan.py "
            f"{preset[0] if preset else 'demo'} synthetic FOLDER."
        )
    return [*(preset or ["demo"]), "--source", words[0], "--data", words[1], *words[2:]]


def run() -> None:
    presets = FAMILY.import_presets()
    run_training(FAMILY, name_sources(sys.argv[1:], list(presets)), DESCRIPTION)


def main() -> None:
    run_command(run)
