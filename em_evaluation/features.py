"""Feature extractors by their names."""

from pathlib import Path

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
        resize_mode: Of inception: "clean" (default) or "legacy_pytorch".
        weights: A local file in place of the published one; for dinov2 and clip a folder.
        input_px: Of efficientnet-lite0. Default: 128 for a `resolution` up to 128, else 224.
        resolution: Side of the images, if it is known.
        device, dtype: Of the network; bfloat16 is for hardware that has it.

    Raises:
        ValueError: An unknown name, or an option that the extractor does not have.
    """
    if resize_mode is not None and name != "inception":
        own = ", its own option is input_px" if name == "efficientnet-lite0" else ""
        raise ValueError(f"{name} has one resizing; resize_mode belongs to inception{own}")
    if input_px is not None and name != "efficientnet-lite0":
        own = " reads 299 x 299 pixels" if name == "inception" else " reads its own size"
        raise ValueError(f"{name}{own}; input_px belongs to efficientnet-lite0")
    options = {"device": device, "dtype": dtype}
    if name == "efficientnet-lite0":
        if input_px is None:
            input_px = 128 if resolution is not None and resolution <= 128 else 224
        return EfficientNetLite0(input_px, weights=weights, **options)
    if name == "inception":
        return Inception(resize_mode or "clean", weights, **options)
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
