"""The extractors that evaluate.py's flags name."""

import torch

from em_evaluation import get_extractor
from em_evaluation.metrics import choose_metrics, refuse_unmeasurable
from em_evaluation.protocol import FLOORS


def create_extractors(config, summary: dict, state) -> list:
    """Return the feature extractors of an `EvaluationConfig` before anything long begins: mistakes show at once."""
    unknown = set(config.floors) - set(FLOORS)
    if unknown:
        raise ValueError(
            f"unknown floors {', '.join(sorted(unknown))}; there are {', '.join(FLOORS)}"
        )
    if not config.extractors or len(set(config.extractors)) < len(config.extractors):
        raise ValueError("--extractors takes one or more names, each once")
    if config.feature_precision not in ("no", "bf16"):
        raise ValueError(f"--feature-precision is no or bf16, not {config.feature_precision!r}")
    weights = pair_weights(config.weights, config.extractors)
    options = {
        "inception": {"resize_mode": config.resize_mode},
        "efficientnet-lite0": {"input_px": config.input_px},
    }
    for owner, option in options.items():
        (flag, value), *_ = option.items()
        if value is not None and owner not in config.extractors:
            raise ValueError(
                f"--{flag.replace('_', '-')} belongs to {owner}, which is not among the --extractors"
            )
    extractors = [
        get_extractor(
            name,
            weights=weights.get(name),
            resolution=summary["resolution"],
            device=state.device,
            dtype=torch.bfloat16 if config.feature_precision == "bf16" else torch.float32,
            **options.get(name, {}),
        )
        for name in config.extractors
    ]
    choose_metrics(config.metrics, extractors[0], config.num_images)
    refuse_unmeasurable(config.metrics, extractors)
    return extractors


def pair_weights(weights: tuple[str, ...], extractors: tuple[str, ...]) -> dict[str, str]:
    """Return {extractor: path} of EXTRACTOR=PATH texts; a path alone belongs to the only extractor."""
    paired = {}
    for text in weights:
        name, equals, path = text.partition("=")
        if not equals or name not in extractors:
            if len(extractors) > 1:
                raise ValueError(
                    f"--weights takes EXTRACTOR=PATH with one of {', '.join(extractors)}, not {text!r}"
                )
            name, path = extractors[0], text
        paired[name] = path
    return paired
