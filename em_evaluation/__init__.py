"""Images -> features -> statistics -> numbers -> report; knows images, never models."""

from em_evaluation.distances import (
    bootstrap_interval,
    frechet_distance,
    frechet_distance_from_statistics,
    frechet_distance_interval,
    kernel_distance,
    kernel_distance_interval,
)
from em_evaluation.features import Extractor, get_extractor
from em_evaluation.images import ModelImages
from em_evaluation.protocol import evaluate_models
from em_evaluation.report import write_report
from em_evaluation.statistics import FeatureStatistics, compute_features
from em_evaluation.surrogates import phase_randomised_surrogates

__all__ = [
    "Extractor",
    "FeatureStatistics",
    "ModelImages",
    "bootstrap_interval",
    "compute_features",
    "evaluate_models",
    "frechet_distance",
    "frechet_distance_from_statistics",
    "frechet_distance_interval",
    "get_extractor",
    "kernel_distance",
    "kernel_distance_interval",
    "phase_randomised_surrogates",
    "write_report",
]
