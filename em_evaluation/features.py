"""Feature extractors by their names."""

from pathlib import Path
from typing import Any

import torch

from em_evaluation.efficientnet import EfficientNetLite0
from em_evaluation.extractor import Extractor
from em_evaluation.inception import Inception
from em_evaluation.vision_models import CLIP, DINOV2, TimmModel, TransformersModel

NAMES = "efficientnet-lite0, inception, dinov2, clip, timm:NAME or transformers:NAME"


def get_extractor(
    name: str = "efficientnet-lite0",
    *,
    resize_mode: str | None = None,
    weights: str | Path | None = None,
    input_px: int | None = None,
    resolution: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Extractor:
    """Return an extractor by its name.

    Args:
        name: efficientnet-lite0 (offline), inception, dinov2 (facebook/dinov2-base), clip (the
            embedding of openai/clip-vit-large-patch14-336, for CMMD), timm:NAME or
            transformers:NAME, where NAME may be a folder for transformers.
        resize_mode: Of inception: "clean" (default) or "legacy_pytorch". Of dinov2, clip, timm: and
            transformers: models: "own", their own preprocessing. Default: whole tiles, in floats.
        weights: A local file in place of the published one; for dinov2 and clip a folder.
        input_px: Of efficientnet-lite0. Default: 128 for a `resolution` up to 128, else 224.
        resolution: Side of the images, if it is known.
        device, dtype: Of the network; bfloat16 is for hardware that has it.

    Raises:
        ValueError: An unknown name, or an option that the extractor does not have.
    """
    if resize_mode is not None and name == "efficientnet-lite0":
        raise ValueError(
            f"{name} has one resizing; resize_mode belongs to inception and the vision models, its "
            "own option is input_px"
        )
    if input_px is not None and name != "efficientnet-lite0":
        own = " reads 299 x 299 pixels" if name == "inception" else " reads its own size"
        raise ValueError(f"{name}{own}; input_px belongs to efficientnet-lite0")
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if name == "efficientnet-lite0":
        if input_px is None:
            input_px = 128 if resolution is not None and resolution <= 128 else 224
        return EfficientNetLite0(input_px, weights=weights, **options)
    if name == "inception":
        return Inception(resize_mode or "clean", weights, **options)
    options["resize_mode"] = resize_mode
    if name == "dinov2":
        return TransformersModel(DINOV2, weights, label="dinov2", **options)
    if name == "clip":
        return TransformersModel(CLIP, weights, label="clip", embedding=True, **options)
    library, _, model = name.partition(":")
    if library not in ("timm", "transformers") or not model:
        raise ValueError(f"the extractor must be {NAMES}, not {name!r}")
    if weights is not None:
        raise ValueError(
            f"{library}:NAME takes no --weights. Name the folder itself: transformers:FOLDER or "
            "timm:local-dir:FOLDER."
        )
    return TimmModel(model, **options) if library == "timm" else TransformersModel(model, **options)
