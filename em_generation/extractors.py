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
    options = {
        "inception": {"resize_mode": config.resize_mode},
        "efficientnet-lite0": {"input_px": config.input_px},
    }
    for owner, option in options.items():
        (name, value), *_ = option.items()
        if value is not None and owner not in config.extractors:
            raise ValueError(
                f"--{name.replace('_', '-')} belongs to {owner}. Add it to --extractors, or leave "
                "the flag out."
            )
    extractors = [
        get_extractor(
            name,
            weights=weights.get(name),
            resolution=resolution,
            device=device,
            dtype=torch.bfloat16 if config.feature_precision == "bf16" else torch.float32,
            **options.get(name, {}),
        )
        for name in config.extractors
    ]
    check_metrics(config.metrics, extractors)
    return extractors


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
