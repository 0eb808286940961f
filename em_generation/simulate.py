"""Write simulated micrographs whose defects have the shapes and contrast of labelled ones.

The command: python -m em_generation.simulate --data DATA --out FOLDER
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from em_data import DataConfig, load_data
from em_data.files import build_folder
from em_data.labels import write_labelled
from em_data.micrograph import Micrograph
from em_data.module_command import run_module
from em_data.synthetic_imaging import make_background, record
from em_data.synthetic_micrographs import PIXEL_SIZE_NM, Specimen
from em_generation.pairs.drawer import enlarge_tiles
from em_generation.pairs.labelled import LabelledImages, read_labelled

STREAM = 77  # of random numbers
# change of the log-transmission for a contrast of 1, half of the grey levels. Grey levels do not
# give the absolute intensity, so this factor is a guess
LOG_PER_CONTRAST = 1.3


@dataclasses.dataclass(frozen=True)
class SimulationConfig:
    """Write simulated, labelled micrographs whose defects are like yours.

    Numbers, shapes, distances and contrast of the defects are those of your labelled micrographs.
    Background, noise and display are those of the embedded simulator. Such a folder is a source of
    train_cyclegan.py, which gives it the look of your micrographs.
    """

    data: Annotated[str, tyro.conf.arg(metavar="DATA")]
    """Labelled micrographs, as --data of a training. Only the training side of the split is used.
    Give the --tiles flags of the trainings: pixels are those of their tiles."""
    out: str
    """Folder for images/, masks/ and labels/. It must be new or empty."""
    num: int = 48
    """Number of micrographs."""
    size: int = 512
    """Side of a micrograph in pixels."""
    seed: int = 0
    """Micrograph i depends on this seed and on i alone."""
    tiles: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self):
        for name, least in (("num", 1), ("size", 16), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}, but must be at least {least}."
                )


def write_simulation(config: SimulationConfig, say=print) -> Path:
    """Measure the defects of labelled micrographs and write simulated ones with such defects.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds files, or no micrograph of the training side has labels.
    """
    out = Path(config.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder. Use another one with --out.")
    labelled = read_training_side(config, say)
    if labelled.pixel_size_nm is None:
        say(f"The pixel size is unknown: the background is that of {PIXEL_SIZE_NM:g} nm a pixel.")
    micrographs = list(simulate_like(labelled, config.num, config.size, config.seed))
    out.mkdir(parents=True, exist_ok=True)
    out.rmdir()
    with build_folder(out) as building:
        write_labelled(micrographs, building)
    number = sum(len(each.defects or ()) for each in micrographs)
    say(f"{out}: {config.num} micrographs in images/, {number:,} defects in labels/ and masks/")
    return out


def read_training_side(config: SimulationConfig, say) -> LabelledImages:
    """Return the labelled tiles of the training side, in larger tiles if they fit."""
    tiles = load_data(config.data, config.tiles, log=say).train
    name = config.data.rstrip("/").rpartition("/")[2]
    if not tiles.kinds or not tiles.is_labelled.any():
        raise ValueError(
            f"{name} has no labelled defects on the training side of the split. Give labelled "
            "micrographs with --data."
        )
    larger = enlarge_tiles(
        tiles, lambda tiling, log: load_data(config.data, tiling, log=log).train, config.tiles
    )
    return read_labelled(larger, name=name, seed=config.seed, say=say)


def simulate_like(
    labelled: LabelledImages, num: int, size: int, seed: int = 0
) -> Iterator[Micrograph]:
    """Draw `num` micrographs, uint8 [size, size], with defects like the labelled ones."""
    pixel_size_nm = labelled.pixel_size_nm or PIXEL_SIZE_NM
    for number in range(num):
        rng = np.random.default_rng([seed, number, STREAM])
        layout = labelled.draw_layout(size, size, rng)
        specimen = Specimen.from_seed(int(rng.integers(2**31)))
        log_transmission, visibility = make_background(rng, specimen, size, pixel_size_nm)
        contrast = labelled.appearance.draw(layout, (size, size), rng) * LOG_PER_CONTRAST
        transmission = np.exp(log_transmission + visibility * specimen.contrast * contrast)
        yield Micrograph(
            record(rng, transmission, specimen.dose, pixel_size_nm)[0],
            name=f"simulated-{number:06d}.png",
            pixel_size_nm=labelled.pixel_size_nm,
            defects=layout,
        )


def main():
    """Read the command line and write."""
    write_simulation(tyro.cli(SimulationConfig, prog="python -m em_generation.simulate"))


if __name__ == "__main__":
    run_module(main)
