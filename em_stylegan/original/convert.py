"""Convert the network pickles of stylegan2-ada-pytorch and stylegan3 to folders that diffusers loads.

Nothing in a pickle is executed: see `em_stylegan.original.reader`.
"""

import os
import shutil
from pathlib import Path

from em_stylegan.original.networks import discriminator_from_official, generator_from_official
from em_stylegan.original.reader import Network, read_pickle
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline

CONVERTERS = {
    "G_ema": generator_from_official,
    "G": generator_from_official,
    "D": discriminator_from_official,
}


def convert(source, out_dir):
    """Write the networks of the pickle `source` into the folder `out_dir`, which must be new or empty, and a pipeline of G_ema, or of G
    where there is no G_ema; return the names of what was written.

    Nothing appears in the folder before all is written. Raises `ValueError` when the folder holds something, and with the way out when
    `source` is no official pickle or its networks are others than ours.
    """
    out_dir = Path(out_dir)
    _check_folder(out_dir)
    contents = read_pickle(source)
    models = {}
    for key, make in CONVERTERS.items():
        if isinstance(contents.get(key), Network):
            try:
                models[key] = make(contents[key])
            except ValueError as error:
                raise ValueError(f"{key} of {source}: {error}") from error
    if not models:
        raise ValueError(
            f"{source} holds no network: expected 'G_ema', 'G' or 'D', found {', '.join(map(str, contents))}."
        )
    if "G_ema" in models or "G" in models:
        models["pipeline"] = EMStyleGANPipeline(models.get("G_ema") or models["G"])
    temporary = out_dir / f".converting-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        for name, model in models.items():
            model.save_pretrained(temporary / name)
        for name in models:
            os.replace(temporary / name, out_dir / name)
    finally:
        shutil.rmtree(temporary)
    return list(models)


def _check_folder(out_dir):
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file; give a folder for the networks.")
    if out_dir.is_dir() and (found := sorted(path.name for path in out_dir.iterdir())):
        raise ValueError(
            f"{out_dir} is not empty ({', '.join(found[:4])}{', ...' if len(found) > 4 else ''}): networks of two checkpoints must not "
            "mix in it; give a new folder."
        )
