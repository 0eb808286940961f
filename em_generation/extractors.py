"""The extractors that evaluate.py's flags name."""

from collections.abc import Sequence

import torch

from em_evaluation import Extractor, get_extractor
from em_evaluation.feature_metrics import check_metrics


def create_extractors(config, resolution: int, device) -> list[Extractor]:
    """Return the extractors of an `EvaluationConfig`; raise `ValueError` for unfitting flags."""
    if not config.extractors or len(set(config.extractors)) < len(config.extractors):
        raise ValueError("--extractors takes one or more names, each once.")
    weights = pair_weights(config.weights, config.extractors)
    if config.input_px is not None and "efficientnet-lite0" not in config.extractors:
        raise ValueError(
            "--input-px belongs to efficientnet-lite0. Add it to --extractors, or leave the flag "
            "out."
        )
    is_own = config.resize_mode == "own"
    if config.resize_mode and not any(takes_mode(each, is_own) for each in config.extractors):
        owners = "dinov2, clip, timm: and transformers: models" if is_own else "inception"
        raise ValueError(
            f"--resize-mode {config.resize_mode} belongs to {owners}. Add one to --extractors, or "
            "leave the flag out."
        )
    extractors = [
        get_extractor(
            name,
            weights=weights.get(name),
            resolution=resolution,
            device=device,
            dtype=torch.bfloat16 if config.feature_precision == "bf16" else torch.float32,
            input_px=config.input_px if name == "efficientnet-lite0" else None,
            resize_mode=config.resize_mode if takes_mode(name, is_own) else None,
        )
        for name in config.extractors
    ]
    check_metrics(config.metrics, extractors)
    return extractors


def takes_mode(name: str, is_own: bool) -> bool:
    """Return whether an extractor takes a resize mode: "own", or one of inception's."""
    return name not in ("inception", "efficientnet-lite0") if is_own else name == "inception"


def pair_weights(weights: Sequence[str], extractors: Sequence[str]) -> dict[str, str]:
    """Return {extractor: path} of EXTRACTOR=PATH texts; a path alone is the only extractor's."""
    paired = {}
    for text in weights:
        name, equals, path = text.partition("=")
        if not equals or name not in extractors:
            if len(extractors) > 1:
                raise ValueError(
                    f"--weights takes EXTRACTOR=PATH with one of {', '.join(extractors)}, "
                    f"not {text!r}."
                )
            name, path = extractors[0], text
        paired[name] = path
    return paired
