"""Convert network pickles of stylegan2-ada-pytorch and stylegan3 for diffusers.

Nothing in a pickle is executed: see `em_stylegan.original.reader`.
"""

from pathlib import Path

from em_data.files import replace_folder
from em_stylegan.original.networks import discriminator_from_official, generator_from_official
from em_stylegan.original.reader import Network, read_pickle
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline

CONVERTERS = {
    "G_ema": generator_from_official,
    "G": generator_from_official,
    "D": discriminator_from_official,
}


def convert(source, out_dir):
    """Write the networks of a pickle and a pipeline of G_ema (or G) into a new or empty folder.

    Nothing appears before everything is written. Returns the names of what was written.
    Raises `ValueError` if the folder holds something, or if `source` cannot be converted.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file; give a folder for the networks.")
    if out_dir.is_dir() and (found := sorted(path.name for path in out_dir.iterdir())):
        names = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise ValueError(f"{out_dir} is not empty ({names}); give a new folder.")
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
            f"{source} holds no network: expected 'G_ema', 'G' or 'D', found "
            f"{', '.join(map(str, contents))}."
        )
    if "G_ema" in models or "G" in models:
        models["pipeline"] = EMStyleGANPipeline(models.get("G_ema") or models["G"])
    with replace_folder(out_dir) as folder:
        for name, model in models.items():
            model.save_pretrained(folder / name)
    return list(models)
