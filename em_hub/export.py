"""A trained model -> a folder of the package: half-precision weights, card and record, no code."""

import json
from pathlib import Path
from typing import Any

import torch

from em_data import save_image_grid
from em_data.files import replace_folder, write_atomically
from em_generation.loading import read_model
from em_hub.card import make_card, read_evaluation
from em_hub.publish import draw_samples, make_record
from em_training.config import read_json_object

NUM_SAMPLES = 16  # images in the picture of the card


def export_model(
    source: str, folder: str | Path, license: str, *, parts: dict[str, Any] | None = None
) -> Path:
    """Write a trained model into `folder`, in place of what is there; its name is the folder's.

    Weights are float16, but for codes that are searched and for the grain. The code of the pipeline
    is left out: the package has it.

    Args:
        source: A run's folder or a saved pipeline.
        license: Of the weights, by its name on the Hub.
        parts: {name: network} of networks that are saved beside the pipeline's own, such as a
            discriminator.

    Raises:
        ValueError: A weight is not finite in float16.
    """
    folder = Path(folder)
    model = read_model(source)
    pipeline = model.load()
    record = make_record(model) | {"name": folder.name}
    with replace_folder(folder) as out:
        save_half(pipeline, model.family.find_exact_modules(pipeline), out, parts)
        write_atomically(Path(out) / "run.json", json.dumps(record, indent=2) + "\n")
    write_card(folder, license)
    return folder


def write_card(folder: str | Path, license: str, report: str | Path | None = None) -> None:
    """Write the card of an exported model and its picture, drawn with the weights in the folder.

    report: report.json of evaluate.py on these weights. Raises `ValueError` if it judges others.
    """
    folder = Path(folder)
    model = read_model(str(folder))
    evaluation = None if report is None else read_evaluation(report, model.weights_sha256)
    pipeline = model.load()
    save_image_grid(
        draw_samples(model, pipeline, NUM_SAMPLES), folder / "samples.png", min_width=512
    )
    card = make_card(
        pipeline,
        repo_id=folder.name,
        record=read_json_object(folder / "run.json"),
        evaluation=evaluation,
        license=license,
        num_samples=NUM_SAMPLES,
        is_in_package=True,
    )
    write_atomically(folder / "README.md", card)
    if evaluation is not None:
        write_atomically(folder / "evaluation.json", json.dumps(evaluation, indent=1) + "\n")


def save_half(
    pipeline: Any, exact_modules: tuple, out: Path, parts: dict[str, Any] | None = None
) -> None:
    """Save a pipeline in float16 without code, with other networks beside it.

    exact_modules: their weights stay float32. So does the grain, which is small.
    """
    kept = [(module, module.weight.detach().clone()) for module in exact_modules]
    parts = parts or {}
    components = {name: part for name, part in pipeline.components.items() if name != "grain"}
    for name, part in (components | parts).items():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch.float16)  # diffusers' own `to` warns
            _refuse_overflow(name, part)
    for module, weight in kept:
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    pipeline.save_pretrained(out)
    for name, part in parts.items():
        part.save_pretrained(Path(out) / name)
    for code in Path(out).rglob("*.py"):
        code.unlink()


def _refuse_overflow(name: str, part: torch.nn.Module) -> None:
    for key, tensor in part.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has weights that float16 cannot hold ({key}).")
