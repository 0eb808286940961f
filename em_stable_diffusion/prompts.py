"""The prompts of a run: made, encoded once, and the row of each image."""

from collections.abc import Callable
from pathlib import Path

import torch

from em_stable_diffusion.bases import Base
from em_stable_diffusion.config import CLASS, LoRAConfig
from em_stable_diffusion.em_prompts import EMPrompts
from em_training.config import read_json_object
from em_training.weights import save_model


def make_texts(config: LoRAConfig, class_names: tuple[str, ...]) -> list[str]:
    """Return the prompts: one, or one for each class.

    Raises:
        ValueError: The prompt asks for classes, but the data have none.
    """
    if not config.is_conditional:
        return [config.prompt]
    if not class_names:
        raise ValueError(
            f"prompt is {config.prompt!r}, but no micrograph of {config.data} has a class. Give "
            f"classes (docs/classes.md), or a --prompt without {CLASS}."
        )
    return [config.prompt.replace(CLASS, name) for name in class_names]


def encode_prompts(
    base: Base, texts: list[str], folder: Path, say: Callable[[str], object] = print
) -> EMPrompts:
    """Encode the empty prompt and `texts` and keep them in `folder`, or read them from there."""
    if not holds_prompts(folder, texts):
        embeddings = base.encode_prompts(["", *texts])
        prompts = EMPrompts(texts, *embeddings.shape[1:])
        prompts.embeddings.copy_(embeddings)
        save_model(prompts.eval(), folder)
        say(f"prompts: {', '.join(texts)}; encoded once and kept with the run")
    return EMPrompts.from_pretrained(folder).eval()


def holds_prompts(folder: Path, texts: list[str]) -> bool:
    """Return whether `folder` holds these prompts, encoded."""
    path = folder / "config.json"
    return path.is_file() and read_json_object(path).get("texts") == texts


def draw_rows(latents, ids, dropout: float, rng: torch.Generator) -> torch.Tensor:
    """Return the row of the prompt of each view, int64 [B]; some are of the empty prompt, row 0.

    So are all views whose class is unknown. latents: `em_training.Latents`.
    """
    labels = latents.class_labels(ids)
    rows = torch.ones(len(ids), dtype=torch.int64)
    if labels is not None:
        rows = torch.where(labels == latents.num_classes, 0, labels + 1)
    is_dropped = torch.rand(len(rows), generator=rng) < dropout
    return torch.where(is_dropped, 0, rows)
