"""Images along a walk through w, with mixed styles, and at growing truncation."""

from pathlib import Path

import torch
from tqdm.auto import tqdm

import em_pretrained
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_training import make_generator
from em_training.classes import find_class
from em_training.config import read_json_object
from em_training.saved_models import check_pipeline, explain_failure, refuse_diverged
from em_training.walk import walk


def load_for_class(model, class_label: str | None):
    """Load a generator, and return it with the number of a class; its name or number is given."""
    pipeline = load_pipeline(model)
    if class_label is None:
        return pipeline.generator, None
    return pipeline.generator, find_class(pipeline, class_label, "--class-label")


def load_pipeline(model):
    """Load the pipeline, in evaluation mode, of a run, a saved pipeline or a model's name."""
    path = em_pretrained.find(str(model)) or Path(model)
    for folder in (path, path / "pipeline"):
        if (folder / "model_index.json").is_file():
            name = read_json_object(folder / "model_index.json").get("_class_name")
            name = name[-1] if isinstance(name, list) and name else name
            if isinstance(name, str) and name != EMStyleGANPipeline.__name__:
                raise ValueError(f"{model} is no StyleGAN. Give a run of train_gan.py.")
            check_pipeline(folder, EMStyleGANPipeline)
            pipeline = EMStyleGANPipeline.from_pretrained(folder)
            refuse_diverged(str(model), pipeline.generator)
            pipeline.generator.eval().requires_grad_(False)
            return pipeline
    raise ValueError(
        f"{model} holds no finished StyleGAN (no model_index.json). Give the folder of a finished "
        f"run or of a saved pipeline.{em_pretrained.suggest(model)}"
    )


@torch.no_grad()
def draw_ws(generator, seed: int, count: int, truncation_psi: float = 1.0, class_label=None):
    """Draw ws [count, num_ws, w_dim] from `seed`, all of one class if the generator has classes."""
    rng = make_generator(seed, stream="interpolation")
    z = torch.randn(count, generator.config.z_dim, generator=rng)
    with explain_failure():
        return generator.mapping(z, class_label, truncation_psi)


@torch.no_grad()
def render(generator, ws, batch_size: int = 16, description: str = "images"):
    """Turn ws [N, num_ws, w_dim] into images [N, 1, R, R] on the CPU, with the stored noise.

    Of a colour image, the mean of the channels is taken.
    """
    bar = tqdm(ws.split(batch_size), desc=description, unit="batch")
    with explain_failure():
        images = [generator.synthesis(ws, "const").mean(dim=1, keepdim=True).cpu() for ws in bar]
    return torch.cat(images)


def mix_styles(ws_rows, ws_columns, layers):
    """Mix every row's styles with every column's (StyleGAN paper, section 3.1).

    Args:
        ws_rows, ws_columns: [N, num_ws, w_dim].
        layers: (first, end), the layers that take the column's styles.

    Returns:
        [rows, columns, num_ws, w_dim].
    """
    num_ws = ws_rows.shape[1]
    first, end = layers
    if not 0 <= first < end <= num_ws:
        raise ValueError(
            f"layers {first} to {end} are not among the generator's {num_ws}. "
            f"Give 0 <= FIRST < END <= {num_ws}."
        )
    mixed = ws_rows.unsqueeze(1).repeat(1, len(ws_columns), 1, 1)
    mixed[:, :, first:end] = ws_columns[None, :, first:end]
    return mixed


def make_walk(generator, seed, num_keys, frames_per_key, truncation_psi=1.0, class_label=None):
    """Make the frames [N, 1, R, R] of a closed walk through `num_keys` images."""
    keys = draw_ws(generator, seed, num_keys, truncation_psi, class_label)
    return render(generator, walk(keys, frames_per_key), description="frames")


def make_mixing(
    generator, seed, num_rows, num_columns, layers=None, truncation_psi=1.0, class_label=None
):
    """Make the images of a grid whose rows take the columns' styles in `layers`.

    The first row and column show the images that are mixed; the corner is white. `layers` defaults
    to the coarsest third.
    """
    ws = draw_ws(generator, seed, num_rows + num_columns, truncation_psi, class_label)
    rows, columns = ws[:num_rows], ws[num_rows:]
    mixed = mix_styles(rows, columns, layers or (0, generator.num_ws // 3))
    body = torch.cat([rows.unsqueeze(1), mixed], dim=1).flatten(0, 1)
    images = render(generator, torch.cat([columns, body]))
    return torch.cat([torch.ones_like(images[:1]), images])


def make_truncation(generator, seed, num_rows, psis, class_label=None):
    """Make the images of a grid: `num_rows` images, each at every truncation of `psis`."""
    ws = draw_ws(generator, seed, num_rows, class_label=class_label)
    mean = generator.mapping_network.find_mean(class_label, num_rows)
    ws = torch.stack([mean.lerp(ws, psi) for psi in psis], dim=1)  # [rows, psis, num_ws, w_dim]
    return render(generator, ws.flatten(0, 1))
